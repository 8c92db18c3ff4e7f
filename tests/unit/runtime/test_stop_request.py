"""Signals are remembered, however many come; a second Ctrl-C interrupts."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from torchtitan.runtime import stop_request
from torchtitan.runtime.stop_request import StopRequest, stop_signals

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_remembered_and_told_once(number, caplog, monkeypatch):
    left = []
    monkeypatch.setattr(stop_request, "leave_closed_terminal", lambda: left.append(True))
    stop = StopRequest()
    try:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        [told] = caplog.messages
        assert told.startswith(f"{number.name}: stopping after this step")
        assert bool(left) == (number == signal.SIGHUP)  # before it writes there
    finally:
        stop.close()


def test_only_a_second_ctrl_c_interrupts():
    stop = StopRequest()
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_that_a_second_one_interrupts(number, caplog):
    stop = StopRequest()
    try:
        os.kill(os.getpid(), number)
        assert ("Ctrl-C again" in caplog.text) == (number == signal.SIGINT)
    finally:
        stop.close()


def test_the_handlers_are_as_before():
    before = [signal.getsignal(number) for number in HANDLED]
    StopRequest().close()
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_another_thread_leaves_them_as_they_are():
    before = [signal.getsignal(number) for number in HANDLED]
    with ThreadPoolExecutor(1) as thread:
        stop = thread.submit(StopRequest).result()
    assert [signal.getsignal(number) for number in HANDLED] == before
    stop.close()


def test_nohup_keeps_a_run_going_when_the_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received and signal.SIGHUP not in stop_signals()
    finally:
        stop.close()
        signal.signal(signal.SIGHUP, before)
