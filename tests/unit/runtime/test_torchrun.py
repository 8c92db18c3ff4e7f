"""The torchrun of launched jobs: its exit codes, restarts and signals."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher import api as launcher

from torchtitan.runtime import torchrun

RANK = """
import os, signal, sys, time
folder, mode = sys.argv[1:]
with open(f"{folder}/starts-{os.environ['RANK']}", "a") as file:
    file.write("x")
if mode == "open files":
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sys.exit(soft != hard)
if mode.isdigit() or mode == "crash once":
    # The first that fails has torchrun stop the other, which must have begun.
    other = f"{folder}/starts-{1 - int(os.environ['RANK'])}"
    while not os.path.exists(other) or os.stat(other).st_size < os.stat(file.name).st_size:
        time.sleep(0.01)
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    sys.exit(int(mode) if mode.isdigit() else not again)
signal.signal(getattr(signal, mode), lambda *_: sys.exit(75))
open(f"{folder}/ready-{os.environ['RANK']}", "w").close()
time.sleep(60)
"""


def start(folder: Path, mode: str, *first: str) -> subprocess.Popen:
    (folder / "rank.py").write_text(RANK)
    words = [sys.executable, "-m", "torchtitan.runtime.torchrun", *first]
    words += ["--nproc-per-node=2", "--max-restarts=1", "--rdzv-backend=c10d"]
    words += ["--rdzv-endpoint=localhost:0", str(folder / "rank.py"), str(folder), mode]
    return subprocess.Popen(
        ["bash", "-c", 'ulimit -Sn 256; exec "$@"', "bash", *words],
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("mode", "code", "starts"),
    [
        ("crash once", 0, 2),
        ("7", 1, 2),
        ("2", 2, 1),
        pytest.param("75", 75, 1, marks=pytest.mark.long),
        ("open files", 0, 1),
    ],
)
def test_crashes_are_started_again_and_leaving_is_not(
    mode: str, code: int, starts: int, tmp_path: Path
) -> None:
    _, err = (process := start(tmp_path, mode)).communicate(timeout=60)
    assert process.returncode == code, err
    assert len((tmp_path / "starts-0").read_text()) == starts
    if mode == "7":
        assert "exitcode  : 7" in err


@pytest.mark.parametrize(
    "name", ["SIGTERM", "SIGUSR1", pytest.param("SIGHUP", marks=pytest.mark.long)]
)
def test_a_signal_reaches_the_ranks(name: str, tmp_path: Path) -> None:
    process = start(tmp_path, name)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


def test_another_code_for_preempted_runs(tmp_path: Path) -> None:
    process = start(tmp_path, "75", "--preempted-code", "138")
    process.communicate(timeout=60)
    assert process.returncode == 138


@pytest.mark.parametrize("is_host", [0, 1])
def test_a_host_that_is_told_to_stop_while_it_waits_for_others_is_preempted(
    is_host: int, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torchtitan.runtime.torchrun", "--preempted-code", "138"]
    words += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    words += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    words += [f"--rdzv-conf=is_host={is_host},join_timeout=600", "rank.py"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        if is_host:
            wait_for_listener(port, process)
        else:
            assert "waiting for the first host" in process.stderr.readline()
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 138, err


def wait_for_listener(port: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)


OUTAGE = """
import ctypes, os, subprocess, sys
from torchtitan.cli import exit_on_user_error
from torchtitan.errors import OutageError

if "RANK" not in os.environ:
    from torchtitan.runtime import torchrun

    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come here, as to process 1
    torchrun._PAUSES = tuple(map(float, sys.argv.pop(1).split(",")))
    sys.exit(torchrun.main())
with exit_on_user_error():
    if sys.argv[1] == "orphan":  # as W&B's process, which may outlive a rank
        silent = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(["sleep", "60"], start_new_session=True, **silent)
    if sys.argv[1] == "crash":
        raise SystemExit(1)
    if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < 2:
        raise OutageError("the storage is away")
"""


def start_outage(folder: Path, pauses: str, mode: str) -> subprocess.Popen:
    (folder / "agent.py").write_text(OUTAGE)
    restarts = 1 if mode == "crash" else 2
    words = [sys.executable, str(folder / "agent.py"), pauses, f"--max-restarts={restarts}"]
    words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", words[1], mode]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_ranks_start_again_after_a_pause_which_grows_with_each_outage(tmp_path: Path) -> None:
    process = start_outage(tmp_path, "0,1,600", "outage")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert re.findall("restarting them in (.*) s", err) == ["0", "1"]


def test_a_crash_is_not_waited_for(tmp_path: Path) -> None:
    process = start_outage(tmp_path, "600", "crash")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "restarting" not in err


@pytest.mark.parametrize("mode", ["outage", "orphan"])
def test_a_signal_ends_the_pause(mode: str, tmp_path: Path) -> None:
    with start_outage(tmp_path, "600", mode) as process:
        assert any("restarting them in 600 s" in line for line in process.stderr)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err


@pytest.mark.parametrize("closed", [True, RendezvousConnectionError("the first host is gone")])
def test_the_pause_ends_with_the_job(closed: object) -> None:
    agent = torchrun._Agent.__new__(torchrun._Agent)
    handler = SimpleNamespace(is_closed=Mock(side_effect=[False, closed]))
    agent._outages = 1
    agent._worker_group = SimpleNamespace(spec=SimpleNamespace(rdzv_handler=handler))
    begin = time.monotonic()
    agent._wait_for_the_end_of_an_outage()
    assert time.monotonic() - begin < torchrun._PAUSES[0] / 2


@pytest.mark.parametrize("error", [RendezvousClosedError, RendezvousConnectionError])
def test_a_host_that_finds_the_job_ended_says_so_in_a_line(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torchrun, "_Signals", Mock)
    monkeypatch.setattr(torchrun, "torchrun", Mock(side_effect=error))
    assert torchrun.main(["rank.py"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the job has ended on another host" in line


OWNER = """
import os, sys
from pathlib import Path
from torch.distributed import HashStore
from torchtitan.components.checkpoint.owner import Claim, TakenOverError
from torchtitan.runtime.process_group import job_store
folder = Path(sys.argv[1])
try:
    Claim(folder, job_store()).take()
except TakenOverError:
    sys.exit(2)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    Claim(folder, HashStore()).take()  # another run, while this one crashes
    sys.exit(1)
"""


@pytest.mark.long
def test_a_restarted_run_does_not_take_back_a_folder_that_another_has(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(OWNER)
    words = [sys.executable, "-m", "torchtitan.runtime.torchrun", "--max-restarts=1"]
    words += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    words += [str(tmp_path / "rank.py"), str(tmp_path / "checkpoint")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr


def test_this_pytorch_has_the_private_names_that_the_agent_overrides_and_uses() -> None:
    """A release without one of them would run torchrun's own code instead, and say nothing."""
    overridden = {name for name in vars(torchrun._Agent) if hasattr(LocalElasticAgent, name)}
    assert overridden >= {
        "_monitor_workers",
        "_rendezvous",
        "_restart_workers",
        "_start_workers",
        "_stop_workers",
    }
    assert "self._pcontext.pids()" in inspect.getsource(LocalElasticAgent)
    agent = inspect.getsource(SimpleElasticAgent)
    assert "self._remaining_restarts" in agent and "rdzv_handler.num_nodes_waiting()" in agent
    handler = inspect.getsource(DynamicRendezvousHandler)
    for name in ("_state_holder", "_store", "_bootstrap_store_info"):
        assert f"self.{name} = " in handler or f"self.{name}: " in handler, name
    assert launcher.LocalElasticAgent is LocalElasticAgent
