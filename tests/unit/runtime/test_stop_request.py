"""Signals are remembered, however many come; a second Ctrl-C interrupts."""

import os
import signal

import pytest

from torchtitan.runtime.stop_request import StopRequest, stop_signals

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_remembered(number):
    stop = StopRequest()
    try:
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received
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


def test_nohup_keeps_a_run_going_when_the_terminal_is_closed():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.received and signal.SIGHUP not in stop_signals()
    finally:
        stop.close()
        signal.signal(signal.SIGHUP, before)
