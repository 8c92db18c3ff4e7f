"""Checks for tests of the frame, one for each way that a check can end."""

import os
import signal
import time

from torchtitan.authoring.verify.check import Check, CheckFailedError, NotApplicableError


def passes(subject):
    return f"{subject.name} is fine"


def fails(subject):
    raise CheckFailedError("3 is not 4", "arithmetic.py")


def does_not_apply(subject):
    raise NotApplicableError("there are no experts")


def raises(subject):
    raise ValueError("unexpected")


def is_killed(subject):
    os.kill(os.getpid(), signal.SIGKILL)


def crashes(subject):
    os.kill(os.getpid(), signal.SIGSEGV)


def never_ends(subject):
    time.sleep(1000)


def rests(subject):
    begin = time.monotonic()
    time.sleep(0.4)
    return f"{begin} {time.monotonic()}"


def leaves(subject):
    (subject.folder / "left").write_text("numbers")


def reads(subject):
    return (subject.folder / "left").read_text()


def check(run, **options):
    return Check(f"test.{run.__name__}", "it holds", run, **options)
