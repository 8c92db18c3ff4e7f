"""Starting jobs; the whole way is in tests/e2e/test_converge.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from run_folder import write_config

from torchtitan.commands.converge import launch as launch_module
from torchtitan.commands.converge.command import main
from torchtitan.commands.converge.launch import command, launch, tail
from torchtitan.commands.converge.runs import Run, plan_runs


def plan(tmp_path: Path, *options: str) -> Run:
    path = write_config(tmp_path / "a.toml", *options)
    return plan_runs([str(path)], tmp_path / "runs", [], [])[0]


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    run = plan(tmp_path)
    assert command(run)[:3] == [sys.executable, "-m", "torchtitan.train"]


def test_several_processes_meet_on_this_machine(tmp_path: Path) -> None:
    words = command(plan(tmp_path, "--parallelism.data_parallel_shard_degree=2"))
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert {"--nproc-per-node=2", "--rdzv-endpoint=localhost:0"} <= set(words)
    assert words[words.index("torchtitan.train") + 1 :][-1].startswith("--")


def test_a_job_that_fails_gives_its_exit_code_and_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = plan(tmp_path)
    code = "import os; os.write(1, b'the reason, \\xff'); raise SystemExit(3)"  # is no UTF-8
    monkeypatch.setattr(launch_module, "command", lambda run: [sys.executable, "-c", code])
    failure = launch(run)
    assert failure == f"exit code 3; the end of {run.folder / 'log.txt'}:\nthe reason, \ufffd"


def test_values_of_an_earlier_comparison_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that dies before its first step must not be judged by old values."""
    run = plan(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "grad_norm": 1.0}\n')
    monkeypatch.setattr(launch_module, "command", lambda run: [sys.executable, "-c", "exit(1)"])
    launch(run)
    assert not (run.folder / "metrics.jsonl").exists()


def test_if_the_control_fails_no_test_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def fail(run: Run) -> list[str]:
        started.append(run.name)
        return [sys.executable, "-c", "exit(1)"]

    monkeypatch.setattr(launch_module, "command", fail)
    first = write_config(tmp_path / "first.toml")
    second = write_config(tmp_path / "second.toml", "--activation_checkpoint.mode=full")
    assert main([str(first), str(second), "--out", str(tmp_path / "out")]) == 1
    assert started == ["first"]
    printed = capsys.readouterr().out
    steps = "no loss and grad_norm of steps 1-3 (of 3)"
    assert f"first (control): FAILED: {steps}; exit code 1; the end of" in printed
    assert f"second: FAILED: the control failed; {steps}; not started" in printed


def test_sigterm_ends_the_job_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = plan(tmp_path)
    code = (
        "import os, signal, time; open('pid', 'w').write(str(os.getpid())); "
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(200)"
    )
    monkeypatch.setattr(launch_module, "command", lambda run: [sys.executable, "-c", code])
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        launch(run)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_tail_leaves_out_the_launchers_report() -> None:
    own = [f"line {number}" for number in range(30)]
    failed = "E1 1 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: -9) x"
    log = "\n".join([*own, failed, "Traceback (most recent call last):", "ChildFailedError"])
    assert tail(log).splitlines() == [*own[-19:], failed]
    assert tail("only\n") == "only"
    assert tail("") == ""
