"""A torchrun for preemptible hosts: `python -m torchtitan.runtime.torchrun ...`.

It takes torchrun's options, and differs from it as follows:

* SIGTERM, SIGUSR1, SIGINT and SIGHUP (not under nohup) go to the ranks, which save a checkpoint and
  exit in their own time. torchrun would kill them after 30 s (torch 2.11), and does not handle
  SIGUSR1.
* Ranks that exit with code 75 (preempted) or 2 (a mistake of the user) are not restarted on this
  allocation, whatever `--max-restarts` says.
* Ranks that an outage has ended (of a storage, say) are restarted after a pause, which grows as
  long as they do not get far. So the restarts outlast the outage.
* A replaced host joins the hosts that are left, also with `--nnodes N`; torchrun gives it no
  address to meet at (torch 2.11 to 2.13). The host at `--rdzv-endpoint` has to stay.
* Hosts wait for the one at `--rdzv-endpoint` for `join_timeout` seconds; with torchrun they give up
  after a minute.
* With `--nnodes MIN:MAX`, a host that receives a stop signal leaves the job, and the others go on;
  when a host joins, all ranks save before they restart. Neither counts as a restart.
* The exit code is that of the ranks, for the scheduler's script to act on; torchrun's is 1. With
  `--preempted-code N` as the first option, it is N instead of 75.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousConnectionError
from torch.distributed.run import main as torchrun

from torchtitan.runtime.error_report import ONE_MESSAGE
from torchtitan.runtime.open_files import allow_open_files
from torchtitan.runtime.process_group import JOB_STORE
from torchtitan.runtime.rendezvous import (
    own_address_option,
    spare_the_store,
    wait_for_first_host,
)
from torchtitan.runtime.stop_request import PREEMPTED, stop_signals
from torchtitan.runtime.terminal import leave_closed_terminal

_MISTAKE = 2
_SAVE_SECONDS = 2 * 3600.0
"""Longest time that a save may take: `SAVE_TIMEOUT` of the checkpoints."""
_PAUSES = (10.0, 60.0, 300.0)
"""Seconds before ranks that an outage has ended are restarted: the first time, the second, and each
further one. Other hosts wait meanwhile, for 600 s at least (`join_timeout`)."""
_FAR_SECONDS = 300.0
"""Ranks that ran for this long had survived the last outage, and met a new one."""
_TEARDOWN_SECONDS = 30.0
"""How long ranks may go on after the first host has left."""


class _Signals:
    """Passes signals on to the ranks."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.ranks: Callable[[], list[int]] = list
        """Returns the process ids of the ranks that run."""
        self.starting = False
        """Whether ranks are being started, and signals are passed on once they are."""
        for number in stop_signals():
            signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received.add(number)
        if number == signal.SIGHUP:
            leave_closed_terminal()
        if self.starting:
            return
        ranks = self.ranks()
        if not ranks:  # no work has begun that could be lost; the other hosts may go on
            raise _left(number)
        _tell(ranks, number)

    @contextmanager
    def after_the_start(self) -> Iterator[None]:
        """Pass signals on to the ranks once the `with` block has started them all."""
        before = set(self.received)
        self.starting = True
        try:
            yield
        finally:
            self.starting = False
        for number in self.received - before:
            _tell(self.ranks(), number)

    def code_of(self, failures: dict[int, Any]) -> int:
        """Return one exit code for ranks that did not end with 0."""
        codes = {failure.exitcode for failure in failures.values()}
        # A signal kills ranks that are still starting.
        if PREEMPTED in codes or any(-code in self.received for code in codes):
            return PREEMPTED
        return _MISTAKE if _MISTAKE in codes else 1


class _Agent(LocalElasticAgent):
    """Restarts ranks that crashed, but not those that exited on purpose."""

    def __init__(self, signals: _Signals, **options: Any) -> None:
        super().__init__(**options)
        self._signals = signals
        signals.ranks = self._ranks
        self._round = 0
        self._started_at = 0.0
        self._outages = 0
        """Number of consecutive outages that ended the ranks; 0 if it was something else."""
        self._lost_at: float | None = None
        """When the connection to the first host, whose agent holds the store, was lost."""
        handler: Any = self._worker_group.spec.rdzv_handler
        spare_the_store(handler)
        self._ask_for_waiting = handler.num_nodes_waiting
        handler.num_nodes_waiting = self._hosts_waiting

    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if not result.failures:
            return result
        code = self._signals.code_of(result.failures)
        outage = code == 1 and any(map(_is_outage, result.failures.values()))
        if not outage or time.monotonic() > self._started_at + _FAR_SECONDS:
            self._outages = 0
        self._outages += outage
        if code == PREEMPTED and self._is_elastic():
            self._leave_if_told()
            self._remaining_restarts += 1
        elif code != 1:
            self._remaining_restarts = 0
        return result

    def _leave_if_told(self) -> None:
        if self._signals.received:
            # An error would close the rendezvous, also for the hosts that go on.
            raise _left(min(self._signals.received))

    def _restart_workers(self, worker_group: Any) -> None:
        if self._outages and worker_group.state != WorkerState.HEALTHY:
            self._wait_for_the_end_of_an_outage()
        super()._restart_workers(worker_group)

    def _wait_for_the_end_of_an_outage(self) -> None:
        """Wait, unless the other hosts have ended the job; a signal ends the wait."""
        seconds = _PAUSES[min(self._outages, len(_PAUSES)) - 1]
        sys.stderr.write(f"an outage ended the ranks: restarting them in {seconds:.0f} s\n")
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._job_has_ended():
            time.sleep(0.5)

    def _job_has_ended(self) -> bool:
        try:
            return bool(self._worker_group.spec.rdzv_handler.is_closed())
        except RendezvousConnectionError:  # the first host has left
            return True

    def _hosts_waiting(self) -> int:
        """Return how many hosts want to join.

        This is unknown once the first host has left. Then this host's ranks are told to stop,
        too, and their exit code decides, unless they still run after `_TEARDOWN_SECONDS`.
        """
        try:
            waiting: int = self._ask_for_waiting()
        except RendezvousConnectionError:
            self._lost_at = self._lost_at or time.monotonic()
            if time.monotonic() > self._lost_at + _TEARDOWN_SECONDS:
                raise
            return 0
        self._lost_at = None
        return waiting

    def _stop_workers(self, worker_group: Any) -> None:
        if worker_group.state == WorkerState.HEALTHY:  # a host wants to join
            self._let_ranks_save()
        super()._stop_workers(worker_group)  # kills them after 30 s

    def _let_ranks_save(self) -> None:
        """Ask the ranks to leave, and wait for them, unless they wait for a missing host."""
        _tell(self._ranks(), signal.SIGTERM)
        end = time.monotonic() + _SAVE_SECONDS
        while self._ranks() and time.monotonic() < end and not self._host_is_missing():
            time.sleep(0.2)
        if not self._ranks():
            self._leave_if_told()

    def _ranks(self) -> list[int]:
        """Return the process ids of the ranks that run.

        Other children are orphans: a container's first process becomes the parent of processes that
        outlive the rank that started them, such as W&B's.
        """
        started = set(self._pcontext.pids().values()) if self._pcontext else set()
        return [pid for pid in _children() if pid in started]

    def _host_is_missing(self) -> bool:
        """Return whether a host of this round has left or died, for example after a crash."""
        group: Any = self._worker_group
        self._hosts_waiting()  # updates the state
        holder = getattr(group.spec.rdzv_handler, "_state_holder", None)
        if holder is None:  # another kind of rendezvous, which does not report it
            return False
        return len(holder.state.participants) < group.group_world_size

    def _is_elastic(self) -> bool:
        """Return whether the job goes on with fewer hosts, or with more."""
        settings = self._rendezvous_settings()
        return settings is not None and settings.min_nodes < settings.max_nodes

    def _rendezvous_settings(self) -> Any:
        """Return settings of the c10d rendezvous; None if static, where hosts meet only once."""
        return getattr(self._worker_group.spec.rdzv_handler, "settings", None)

    def _rendezvous(self, worker_group: Any) -> None:
        meets_again = self._rendezvous_settings() is not None
        if meets_again:
            # Give each rendezvous its own store for the ranks, which the first agent creates once
            # all have come. torch keeps the store of the first rendezvous, for whose address a
            # later host waits in vain (2.11 to 2.13).
            handler = worker_group.spec.rdzv_handler
            handler._bootstrap_store_info = None
            # Data that one start leaves to the next is in the agents' store, which stays.
            kept = getattr(handler, "_store", None)
            if isinstance(kept, TCPStore):
                os.environ[JOB_STORE] = f"{kept.host}:{kept.port}"
        super()._rendezvous(worker_group)
        self._round += 1
        if meets_again:  # the agents' store has keys of this rendezvous only
            if worker_group.group_rank == 0:
                worker_group.store.set("torchtitan/round", str(self._round))
            self._round = int(worker_group.store.get("torchtitan/round"))

    def _start_workers(self, worker_group: Any) -> Any:
        """Start ranks that find each other.

        They use TORCHELASTIC_RESTART_COUNT as a key. torchrun sets it to the number of crashes of
        this host's ranks, which differs between hosts, and does not change when a host joins or
        leaves. Here it is the number of the rendezvous.
        """
        left = self._remaining_restarts
        self._remaining_restarts = worker_group.spec.max_restarts - self._round + 1
        try:
            with self._signals.after_the_start():
                return super()._start_workers(worker_group)
        finally:
            self._remaining_restarts = left
            self._started_at = time.monotonic()


def main(argv: list[str] | None = None) -> int:
    """Run torchrun with `argv`, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    allow_open_files()  # one agent holds the store that all ranks connect to
    preempted_code = PREEMPTED
    if argv[:1] == ["--preempted-code"]:
        preempted_code, argv = int(argv[1]), argv[2:]
    signals = _Signals()
    # torchrun sets handlers too: limit them to this signal.
    words = ["--signals-to-handle", "SIGQUIT"]
    with patch("torch.distributed.launcher.api.LocalElasticAgent", partial(_Agent, signals)):
        try:
            wait_for_first_host(argv)
            torchrun([*words, *own_address_option(argv), *argv])
        except ChildFailedError as error:
            code = signals.code_of(error.failures)
            if code == PREEMPTED:
                return preempted_code
            sys.stderr.write(f"{error}\n")
            return code
        except SignalException as error:
            # From a host that has no ranks, or leaves an elastic job; or from torchrun itself,
            # after which nothing is saved.
            return preempted_code if error.sigval in signals.received else 1
        except (RendezvousClosedError, RendezvousConnectionError):
            sys.stderr.write(
                "this host cannot start its ranks: the job has ended on another host, or the one "
                "at --rdzv-endpoint is gone. See their logs\n"
            )
            return 1
    return 0


def _left(number: int) -> SignalException:
    name = signal.Signals(number)
    return SignalException(f"{name.name}: no ranks are left", name)


def _is_outage(failure: Any) -> bool:
    """Return whether a rank ended with code 1 and a message, as by `OutageError`, not a crash."""
    return failure.exitcode == 1 and ONE_MESSAGE in failure.error_file_data


def _tell(processes: list[int], number: int) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)


def _children() -> list[int]:
    """Return the process ids of the children that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z" and int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
