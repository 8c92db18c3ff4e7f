"""Runs checks in their own processes: a model that crashes or hangs fails one check, not all.

Processes are forked from a warm server (`torchtitan.runtime.ranks`), several checks at a time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from torchtitan.errors import ConfigError
from torchtitan.models.plugins import load_plugins
from torchtitan.runtime.ranks import RankFailure, Ranks, RanksFailedError
from torchtitan.tools.hardware import cores

from .check import Check, CheckFailedError, NotApplicableError, Outcome
from .diagnose import explain
from .float64 import in_float64
from .subject import Subject

Notify = Callable[[Check], None]


def run_checks(
    checks: Sequence[Check], subject: Subject, started: Notify | None = None
) -> Generator[Outcome, None, None]:
    """Run `checks`, each after those that it needs; yield outcomes as they come.

    Closing the iterator, or an exception such as Ctrl-C, stops the running checks.

    Args:
        checks: includes all checks they need, each before the checks that need it.
        started: called from a thread when a check begins.
    """
    runner = _Runner(subject, started)
    futures: dict[str, Future[Outcome]] = {}
    with ThreadPoolExecutor(max_workers=max(len(checks), 1)) as pool:
        try:
            for check in checks:
                needs = [futures[name] for name in check.needs]
                futures[check.name] = pool.submit(runner.run_in_turn, check, needs)
            for future in as_completed(futures.values()):
                yield future.result()
        finally:
            runner.stop()


def skipped_for(check: Check, needs: Sequence[Outcome]) -> Outcome | None:
    """Return the outcome of a check that cannot run because of the outcomes of those it needs."""
    for needed in needs:
        if needed.status == "skip":
            return Outcome(check, "skip", needed.message)
        if needed.status != "pass":
            return Outcome(check, "skip", f"needs {needed.check.name}, which did not pass")
    return None


def run_check(check: Check, subject: Subject) -> Outcome:
    """Run one check on new processes."""
    return _Runner(subject).run(check)


class _Runner:
    """Runs checks, from several threads, and can stop them all."""

    def __init__(self, subject: Subject, started: Notify | None = None) -> None:
        self._subject = subject
        self._started = started
        self._slots = _Slots(cores())
        self._running: set[Ranks] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run_in_turn(self, check: Check, needs: list[Future[Outcome]]) -> Outcome:
        """Call `run` when the needed checks have passed and a processor is free."""
        skipped = skipped_for(check, [future.result() for future in needs])
        if skipped:
            return skipped
        with self._slots.take(check.ranks):
            if self._stopped:
                return Outcome(check, "skip", "stopped")
            if self._started:
                self._started(check)
            return self.run(check)

    def run(self, check: Check) -> Outcome:
        start = time.monotonic()
        try:
            with self._ranks(check) as ranks:
                outcome = Outcome(check, "pass", ranks.wait(check.timeout)[0])
        except RanksFailedError as error:
            outcome = _failed(check, error.failures)
        return replace(outcome, seconds=round(time.monotonic() - start, 3))

    def stop(self) -> None:
        """End the processes of running checks; waiting checks never start."""
        with self._lock:
            self._stopped = True
            for ranks in self._running:
                ranks.kill()

    @contextmanager
    def _ranks(self, check: Check) -> Iterator[Ranks]:
        # More ranks than a machine may have GPUs, and each rank has one thread to compute with.
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        with Ranks(_on_rank, check.ranks, check, self._subject, env=env) as ranks:
            with self._lock:
                self._running.add(ranks)
                if self._stopped:
                    ranks.kill()
            try:
                yield ranks
            finally:
                with self._lock:
                    self._running.discard(ranks)


def _on_rank(check: Check, subject: Subject) -> str:
    """Run a rank of a check."""
    with in_float64() if check.float64 and subject.has_float64 else nullcontext():
        try:
            load_plugins(subject.custom_import)  # so that checks can look up the model by name
        except ConfigError as error:
            raise CheckFailedError(str(error), "the module that --custom-import names") from error
        try:
            message = check.run(subject)
        finally:
            subject.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    return message


def _failed(check: Check, failures: list[RankFailure]) -> Outcome:
    """Return the outcome for failed ranks. Errors of the check itself take precedence, then other
    exceptions and deaths; ranks that hung as a consequence come last.
    """
    for failure in failures:
        if isinstance(failure.exception, CheckFailedError):
            return Outcome(check, "fail", failure.exception.problem, failure.exception.hint)
    for failure in failures:
        if isinstance(failure.exception, NotApplicableError):
            return Outcome(check, "skip", str(failure.exception))
    message, hint = explain(failures)
    return Outcome(check, "fail", message, hint, "\n\n".join(map(str, failures)))


class _Slots:
    """Limits processes to the number of cores; a check that needs more takes all of them."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def take(self, count: int) -> Iterator[Any]:
        count = min(count, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()
