"""A process ends with its code, whatever threads of its process groups still do."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from pstats import Stats

import pytest

from torchtitan.errors import TrainingError

ROOT = Path(__file__).parents[3]
BUSY_GROUP = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
group = dist.distributed_c10d._get_default_group()  # keeps its threads
work = dist.all_reduce(torch.zeros(1), async_op=True)
work.get_future().then(lambda _: time.sleep(0.3))  # in gloo's thread
"""
SCRIPT = """
import atexit, sys, time
from concurrent.futures import ThreadPoolExecutor

from torchtitan.cli import exit_on_user_error, leave
from torchtitan.errors import TrainingError
{group}
@exit_on_user_error()
def main():
    atexit.register(lambda: print("exit handlers run"))
    ThreadPoolExecutor(1).submit(lambda: (time.sleep(0.1), print("other threads end")))
    sys.stdout.write("the last words")
    {end}

leave(main)
"""


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
    )


@pytest.mark.parametrize("group", [BUSY_GROUP, ""])
@pytest.mark.parametrize(
    ("end", "code", "last_line"),
    [
        ("return 3", 3, ""),
        ("raise TrainingError('no more')", TrainingError.exit_code, "error: no more"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("sys.exit('told')", 1, "told"),
        ("sys.exit()", 0, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "interrupted"),
    ],
)
def test_a_process_ends_with_its_code(group: str, end: str, code: int, last_line: str) -> None:
    done = run(["-c", SCRIPT.format(group=group, end=end)])
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(f"{last_line}\n" if last_line else "")
    for said in ("exit handlers run", "other threads end", "the last words"):
        assert said in done.stdout


def test_a_profiler_that_runs_the_program_gets_its_end(tmp_path: Path) -> None:
    run(["-m", "cProfile", "-o", f"{tmp_path}/profile", "-m", "torchtitan", "models"])
    assert "cli.py" in str(Stats(f"{tmp_path}/profile").stats)
