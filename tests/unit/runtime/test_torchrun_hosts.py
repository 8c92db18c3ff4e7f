"""The torchrun of launched jobs on several hosts: one joins, one crashes, the first leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchtitan.components.checkpoint.manager import SAVE_TIMEOUT
from torchtitan.runtime import torchrun

# torch's 30 s, after which ranks are killed, are one here.
AGENT = """
import sys
from torch.distributed.elastic.multiprocessing.api import PContext
from torchtitan.runtime.torchrun import main

close = PContext.close
PContext.close = lambda self, death_sig=None, timeout=30: close(self, death_sig, min(timeout, 1))
sys.exit(main())
"""
RANK = """
import os, pathlib, signal, sys, time
folder, mode, host = pathlib.Path(sys.argv[1]), *sys.argv[2:]
ranks, first = os.environ["WORLD_SIZE"], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

def save(*_):
    if mode == "slow teardown" and host == "0":
        for other in folder.glob("pid-1"):
            os.kill(int(other.read_text()), signal.SIGTERM)
        sys.exit(75)
    time.sleep(3)
    (folder / "saved").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "crash" else save)
(folder / f"pid-{host}").write_text(str(os.getpid()))
(folder / f"ready-{host}-{ranks}").touch()
if mode == "join" and ranks == "2" or mode == "crash" and not first:
    sys.exit()
if mode == "crash" and host == "1":
    while not (folder / "ready-0-2").exists():
        time.sleep(0.05)
    sys.exit(1)
time.sleep(60)
"""
Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the agent of a host; the first one has the store."""
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    started = []

    def start(host: int, nodes: str, mode: str) -> subprocess.Popen:
        words = [sys.executable, str(tmp_path / "agent.py"), f"--nnodes={nodes}"]
        words += ["--nproc-per-node=1", "--max-restarts=2", "--rdzv-backend=c10d"]
        words += ["--rdzv-id=test", f"--rdzv-endpoint={endpoint}"]
        words += [f"--rdzv-conf=is_host={int(host == 0)},last_call_timeout=1"]
        words += [str(tmp_path / "rank.py"), str(tmp_path), mode, str(host)]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path, *processes: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < deadline, path.name
        time.sleep(0.05)


def test_ranks_save_for_as_long_as_it_takes_when_a_host_joins(start: Start, tmp_path: Path) -> None:
    assert SAVE_TIMEOUT.total_seconds() == torchrun._SAVE_SECONDS
    first = start(0, "1:2", "join")
    wait_for(tmp_path / "ready-0-1", first)
    second = start(1, "1:2", "join")
    errors = [process.communicate(timeout=60)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert (tmp_path / "saved").exists(), errors


@pytest.mark.long
def test_ranks_that_wait_for_one_that_crashed_are_not_waited_for(
    start: Start, tmp_path: Path
) -> None:
    hosts = [start(host, "2", "crash") for host in range(2)]
    begin = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in hosts]
    assert [process.returncode for process in hosts] == [0, 0], errors
    assert time.monotonic() - begin < 40


@pytest.mark.long
def test_hosts_that_take_longer_to_leave_than_the_first_are_preempted_too(
    start: Start, tmp_path: Path
) -> None:
    hosts = [start(host, "2", "slow teardown") for host in range(2)]
    for host in range(2):
        wait_for(tmp_path / f"ready-{host}-2", *hosts)
    os.kill(hosts[0].pid, signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in hosts]
    assert [process.returncode for process in hosts] == [75, 75], errors
