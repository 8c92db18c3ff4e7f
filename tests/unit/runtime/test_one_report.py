"""Of ranks with the same error, one shows it; tests/distributed/test_error_report.py has ranks."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from torchtitan.runtime import error_report
from torchtitan.runtime.error_report import claim_report, show_tracebacks_once, write_error_file


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.TCPStore]:
    """The store of torchrun's agent."""
    store = dist.TCPStore("localhost", 0, is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(error_report, "_PATIENCE", timedelta(seconds=30))
    yield store


def claimed(message: str) -> bool:
    with claim_report(message) as first:
        return first


def test_the_first_to_ask_shows_a_message(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [claimed("one"), claimed("one"), claimed("other")] == [True, False, True]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [claimed("one"), claimed("one")] == [True, False]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert claimed("one")


def test_the_others_end_after_it_has_shown_the_message(agent: dist.TCPStore) -> None:
    other = threading.Thread(target=claimed, args=["one"])
    with claim_report("one"):
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join(20)
    assert not other.is_alive()


def test_one_that_dies_before_it_shows_the_message_holds_up_no_other(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error_report, "_PATIENCE", timedelta(milliseconds=100))
    with claim_report("one"):
        assert not claimed("one")


def test_a_rank_shows_the_message_where_torchrun_is_gone(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(error_report, "_PATIENCE", timedelta(milliseconds=100))
    assert claimed("one")


def test_errors_of_other_lines_are_shown_whole(
    agent: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    show_tracebacks_once(str)
    for number in 0, 1, 1:
        try:
            assert number, "none"
            raise AssertionError("one")
        except AssertionError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    assert capsys.readouterr().err.count("Traceback (most") == 2


def failure_of(file: Path) -> ProcessFailure:
    """As torchrun reads it."""
    return ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))


def test_the_summary_of_torchrun_has_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_error_file("without torchrun")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    before = int(time.time())
    write_error_file("error: lr is 'x'")
    found = failure_of(tmp_path / "error.json")
    told: Any = found.message
    assert told["message"] == told["extraInfo"]["py_callstack"] == "error: lr is 'x'"
    assert before <= found.timestamp <= time.time()


def test_a_full_disk_hides_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    file.symlink_to("/dev/full")
    write_error_file("error: No space left on device")
    assert not os.path.lexists(file) and "errors.html" in failure_of(file).message
