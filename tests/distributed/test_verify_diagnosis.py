"""A model that hangs, crashes or runs out of memory fails one check; the others go on."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from torchtitan.authoring.verify.check import Check, CheckFailedError, NotApplicableError, Outcome
from torchtitan.authoring.verify.run import run_check, run_checks
from torchtitan.authoring.verify.subject import Subject
from torchtitan.runtime.process_group import init_distributed
from torchtitan.tools.hardware import cores


def passes(subject: Subject) -> str:
    return "all is well"


def leaves_out_a_collective(subject: Subject) -> str:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(4))
    else:
        time.sleep(60)
    return ""


def returns_without_the_other(subject: Subject) -> str:
    if dist.get_rank() == 0:
        dist.recv(torch.ones(4), src=1)
    return ""


def waits_in_its_own_code(subject: Subject) -> str:
    while True:
        time.sleep(0.1)


def aborts(subject: Subject) -> str:
    if dist.get_rank() == 1:
        os.abort()
    dist.all_reduce(torch.ones(4))
    return ""


def is_killed(subject: Subject) -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def takes_all_memory(subject: Subject) -> str:
    limit = 64 << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.empty(1 << 40)
    return ""


def raises_memory_error(subject: Subject) -> str:
    raise MemoryError


def fails_on_one_rank(subject: Subject) -> str:
    if dist.get_rank() == 1:
        raise ValueError("head 7 is missing")
    dist.all_reduce(torch.ones(4))
    return ""


def prints_a_lot(subject: Subject) -> str:
    for _ in range(20_000):
        print("x" * 1000)
    raise RuntimeError("after a lot of output")


def fails_the_check(subject: Subject) -> str:
    if dist.get_rank() == 1:
        raise CheckFailedError("layers.3 differs", "the plan")
    dist.barrier()
    return ""


def does_not_apply(subject: Subject) -> str:
    raise NotApplicableError("there are no experts")


def as_a_rank(function, subject: Subject) -> str:
    init_distributed(timeout_seconds=100)
    return function(subject)


def run(function, tmp_path: Path, ranks: int = 1, timeout: float = 20.0) -> Outcome:
    run = partial(as_a_rank, function) if ranks > 1 else function
    check = Check("test.check", "it holds", run, ranks=ranks, timeout=timeout)
    return run_check(check, Subject("llama3", "debugmodel", tmp_path))


def test_a_hang_names_the_collective_and_the_line_on_each_rank(tmp_path: Path) -> None:
    outcome = run(leaves_out_a_collective, tmp_path, ranks=2, timeout=8.0)
    assert outcome.status == "fail"
    assert outcome.message.startswith("not done after 8 s: rank 0 in all_reduce (")
    assert "test_verify_diagnosis.py" in outcome.message
    assert "in leaves_out_a_collective); rank 1 in no collective (" in outcome.message
    assert "same order" in outcome.hint


def test_a_rank_that_waits_for_one_that_has_returned(tmp_path: Path) -> None:
    outcome = run(returns_without_the_other, tmp_path, ranks=2, timeout=8.0)
    assert outcome.status == "fail"
    # It depends on the moment whether gloo waits for the other or sees that it has left.
    assert "rank 0 in recv (" in outcome.message or "[127.0.0.1]" in outcome.message
    assert "returns_without_the_other" in outcome.message + outcome.hint


def test_a_loop_without_collectives_is_stopped(tmp_path: Path) -> None:
    outcome = run(waits_in_its_own_code, tmp_path, timeout=3.0)
    assert outcome.status == "fail"
    assert "rank 0 in no collective (" in outcome.message
    assert "in waits_in_its_own_code" in outcome.message
    assert outcome.seconds < 15


@pytest.mark.parametrize(
    ("function", "ranks", "message", "hint"),
    [
        (aborts, 2, "rank 1: killed by SIGABRT", "in aborts"),
        (is_killed, 1, "rank 0 was killed by SIGKILL", "smaller flavor"),
        (takes_all_memory, 1, "rank 0 ran out of memory: RuntimeError", "in takes_all_memory"),
        (raises_memory_error, 1, "rank 0 ran out of memory: MemoryError", "smaller flavor"),
        (fails_on_one_rank, 2, "rank 1: ValueError: head 7 is missing", "in fails_on_one_rank"),
        (prints_a_lot, 1, "rank 0: RuntimeError: after a lot of output", "in prints_a_lot"),
        (fails_the_check, 2, "layers.3 differs", "the plan"),
    ],
)
def test_what_became_of_a_rank_is_told(
    function, ranks: int, message: str, hint: str, tmp_path: Path
) -> None:
    outcome = run(function, tmp_path, ranks)
    assert outcome.status == "fail"
    assert message in outcome.message
    assert hint in outcome.hint
    assert len(outcome.details) < 20_000


def test_a_check_that_does_not_apply_is_skipped(tmp_path: Path) -> None:
    outcome = run(does_not_apply, tmp_path)
    assert (outcome.status, outcome.message) == ("skip", "there are no experts")


def test_the_other_checks_go_on_and_those_that_need_it_do_not(tmp_path: Path) -> None:
    checks = [
        Check("test.crash", "", is_killed),
        Check("test.needs_it", "", passes, needs=("test.crash",)),
        Check("test.other", "", passes),
    ]
    outcomes = run_checks(checks, Subject("llama3", "debugmodel", tmp_path))
    status = {outcome.check.name: outcome.status for outcome in outcomes}
    assert status == {"test.crash": "fail", "test.needs_it": "skip", "test.other": "pass"}


def test_closing_the_iterator_ends_the_processes(tmp_path: Path) -> None:
    checks = [
        Check("test.endless", "", waits_in_its_own_code, timeout=100.0),
        Check("test.pass", "", passes),
    ]
    if cores() == 1:
        checks.reverse()
    start = time.monotonic()
    outcomes = run_checks(checks, Subject("llama3", "debugmodel", tmp_path))
    assert next(outcomes).check.name == "test.pass"
    outcomes.close()
    assert time.monotonic() - start < 60
    assert not _ranks_of(os.getpid())


ENDLESS = """
import time
from torchtitan.models.llama3 import Llama3Model, get_train_spec as llama3
from torchtitan.protocols import register_train_spec
from dataclasses import replace

class Endless(Llama3Model):
    def forward(self, *args, **kwargs):
        open("started", "w").close()
        time.sleep(600)

def get_train_spec(flavor):
    return replace(llama3("debugmodel"), model_cls=Endless)

register_train_spec("endless", get_train_spec)
"""


def test_ctrl_c_ends_the_command_and_its_processes(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    temporary = tmp_path / ("long" * 25)  # too long for the name of a socket
    temporary.mkdir()
    command = ["-m", "torchtitan", "verify", "endless", "--custom-import", "endless"]
    process = subprocess.Popen(
        [sys.executable, *command, "--only", "layouts.one_device"],
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What a shell starts in the background ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 100
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert (tmp_path / "started").exists()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert output.rstrip().endswith("stopped")
    assert "Traceback" not in output
    deadline = time.monotonic() + 20
    while _processes_of_group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _processes_of_group(process.pid)
    assert not list(temporary.iterdir())


@pytest.mark.long
def test_a_model_that_fails_to_import_is_a_failed_check(tmp_path: Path) -> None:
    (tmp_path / "broken_model.py").write_text(
        "import torch\n\nraise RuntimeError('no such head')\n"
    )
    command = ["-m", "torchtitan", "verify", "broken", "--custom-import", "broken_model"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (failed,) = [line for line in lines if line.startswith("fail")]
    assert "contract.import" in failed and "RuntimeError: no such head" in failed
    assert "broken_model.py:3" in failed
    assert "0 passed, 1 failed" in lines[-1]
    assert "Traceback" not in done.stdout + done.stderr


def _ranks_of(pid: int) -> list[int]:
    """Ranks that live: processes whose grandparent is `pid`, as the fork server is in between."""
    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    return [child for child, parent in parents.items() if parents.get(parent) == pid]


def _parent(process: Path) -> int:
    return int(_stat(process)[1]) if _stat(process) else 0


def _processes_of_group(group: int) -> list[str]:
    processes = [p for p in Path("/proc").iterdir() if p.name.isdigit()]
    stats = [_stat(p) for p in processes]
    return [stat for stat in stats if stat and int(stat[2]) == group and stat[0] != "Z"]


def _stat(process: Path) -> list[str]:
    """State, parent and process group, as in /proc/PID/stat; empty if it has ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return []
