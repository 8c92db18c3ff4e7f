"""A rank that is done ends with its code, whatever threads of its process groups still do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from torchtitan.cli import leave

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.distributed_c10d._get_default_group()  # keeps its threads
work = dist.all_reduce(torch.zeros(1), async_op=True)
work.get_future().then(lambda _: time.sleep(0.3))  # in gloo's thread
atexit.register(lambda: print("exit handlers run"))
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("other threads end")))
sys.stdout.write("the last words")
leave(3)
"""


@pytest.mark.parametrize("world_size", ["2", "1"])
def test_a_rank_ends_with_its_code(world_size: str) -> None:
    environment = os.environ | {"WORLD_SIZE": world_size}
    script = SCRIPT if world_size == "2" else SCRIPT.replace("time.sleep(0.3)", "None")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    for said in ("exit handlers run", "other threads end", "the last words"):
        assert said in done.stdout
