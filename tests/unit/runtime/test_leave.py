"""A rank that is done ends with its code, whatever threads of its process groups still do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BUSY_GROUP = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.distributed_c10d._get_default_group()  # keeps its threads
work = dist.all_reduce(torch.zeros(1), async_op=True)
work.get_future().then(lambda _: time.sleep(0.3))  # in gloo's thread
"""
SCRIPT = """
atexit.register(lambda: print("exit handlers run"))
ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("other threads end")))
sys.stdout.write("the last words")
leave(3)
"""
IMPORTS = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor

from torchtitan.cli import leave
"""


@pytest.mark.parametrize(("world_size", "group"), [("2", BUSY_GROUP), ("1", "")])
def test_a_rank_ends_with_its_code(world_size: str, group: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS + group + SCRIPT],
        env=os.environ | {"WORLD_SIZE": world_size},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3, done.stderr
    for said in ("exit handlers run", "other threads end", "the last words"):
        assert said in done.stdout
