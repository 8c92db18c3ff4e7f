"""Notice that training hangs, write down where, and name the rank that the others wait for."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

logger = logging.getLogger("torchtitan")

Phase = Literal[
    "start",
    "data",
    "token count",
    "forward_backward",
    "optimizer",
    "meeting of replica groups",
    "after the step",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Phases of a step, in their order."""
_MOST_NAMED = 8
_STORE_SECONDS = 20.0


@dataclass(frozen=True)
class Heartbeat:
    """The status that a rank sends to the others."""

    rank: int
    host: str
    step: int
    phase: Phase
    seconds: float
    """Time spent in this phase."""
    where: str
    """The main thread's innermost line of Python; "" unless the rank hangs."""
    waits: bool
    """Whether that line may wait for other ranks: see `waits`."""
    time: float
    """When it was sent, in seconds since the rank's watch began, as all do at about the same time.
    The clocks of hosts may differ, and change during a run."""

    @property
    def place(self) -> tuple[int, int]:
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        at = f", at {self.where}" if self.where else ""
        return (
            f"rank {self.rank} ({self.host}) has been in step {self.step}, phase '{self.phase}', "
            f"for {self.seconds:.0f} s{at}"
        )


class HangWatch:
    """A thread that expects `enter` to be called at least every `comm.hang_seconds`.

    If it is not, rank 0 reads all heartbeats, and reports who is late. Each rank writes the Python
    stacks of its threads to `hang/rank-N.txt` in the dump folder, and PyTorch's record of its
    collectives to `hang/flight_recorder_N`. The run goes on; `comm.timeout_seconds` ends it.

    Each rank sends a few heartbeats per `hang_seconds` to the store of the process group, over a
    connection of its own. Only rank 0 reads them, and only when it hangs itself.
    """

    def __init__(self, job_config: JobConfig) -> None:
        comm = job_config.comm
        self._limit = comm.timeout_seconds / 2 if comm.hang_seconds == -1 else comm.hang_seconds
        self._folder = Path(job_config.job.dump_folder, "hang")
        self._now: tuple[int, Phase, float] = (0, PHASES[0], time.monotonic())
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._main_thread = threading.get_ident()

    def start(self) -> None:
        """Begin to watch this thread. All ranks call this, once they have a process group."""
        if not self._limit:
            return
        self._main_thread = threading.get_ident()
        self._began = time.monotonic()
        self._store = dist.distributed_c10d._get_default_store()
        if dist.get_world_size() > 1:
            # While the main thread waits in the store, it occupies its connection.
            self._store = cast(Any, self._store).clone()  # torch's stubs lack it
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def enter(self, phase: Phase, step: int) -> None:
        """Record that the main thread enters `phase` of `step`."""
        self._now = (step, phase, time.monotonic())

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=_STORE_SECONDS)
            self._thread = None

    def _watch(self) -> None:
        try:
            tick, sent = min(self._limit / 8, 5.0), -float("inf")
            reported = None
            while not self._closing.wait(tick):
                now = self._now
                stands = time.monotonic() - now[2] >= self._limit
                if reported is not None and now is not reported:
                    _log(
                        f"rank {dist.get_rank()} makes progress again: step {now[0]}, phase "
                        f"'{now[1]}'"
                    )
                    reported = None
                if time.monotonic() - sent >= self._limit / 4 or (stands and reported is None):
                    self._send(now, stands)
                    sent = time.monotonic()
                if stands and reported is None:
                    reported = now
                    if dist.get_rank() == 0:
                        # The others notice within their next tick.
                        self._closing.wait(2 * tick)
                        self._report()
                    # Last, since what hangs may be the storage of the dump folder.
                    self._write_stacks()
        except Exception as error:  # no reason to end the run
            if not self._closing.is_set():
                logger.warning("hangs are no longer detected: %s", error)

    def _send(self, now: tuple[int, Phase, float], stands: bool) -> None:
        step, phase, since = now
        where, waits = self._where() if stands else ("", False)
        beat = Heartbeat(
            rank=dist.get_rank(),
            host=socket.gethostname(),
            step=step,
            phase=phase,
            seconds=time.monotonic() - since,
            where=where,
            waits=waits,
            time=time.monotonic() - self._began,
        )
        self._store.set(_key(beat.rank), json.dumps(asdict(beat)))

    def _where(self) -> tuple[str, bool]:
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return "", False
        code = frame.f_code
        return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}", waits(frame)

    def _write_stacks(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            rank = dist.get_rank()
            step, phase, since = self._now
            with open(self._folder / f"rank-{rank}.txt", "w") as file:
                file.write(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank} ({socket.gethostname()}): "
                    f"step {step}, phase '{phase}' for {time.monotonic() - since:.0f} s\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            record = _flight_record()
            if record:
                (self._folder / f"flight_recorder_{rank}").write_bytes(record)
        except OSError as error:
            logger.warning("the stacks of a hang cannot be written: %s", error)

    def _report(self) -> None:
        beats, silent = self._read_all()
        text = report(beats, silent, self._limit, torch.cuda.is_available())
        _log(f"{text}. Stacks of the ranks: {self._folder}")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / "report.txt", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        except OSError as error:
            logger.warning("the report of a hang cannot be written: %s", error)

    def _read_all(self) -> tuple[list[Heartbeat], list[int]]:
        """Return the last heartbeat of each rank, and the ranks that never sent one."""
        keys = [_key(rank) for rank in range(dist.get_world_size())]
        present = keys
        if not self._store.check(keys):
            present = [key for key in keys if self._store.check([key])]
        beats = [Heartbeat(**json.loads(value)) for value in self._store.multi_get(present)]
        silent = sorted(set(range(len(keys))) - {beat.rank for beat in beats})
        return beats, silent


def waits(frame: FrameType) -> bool:
    """Return whether a thread may wait for other ranks, judging by its innermost frame.

    It may in PyTorch's communication, or in a backward pass, whose collectives have no frame.
    """
    code = frame.f_code
    if os.path.join("torch", "distributed", "") in code.co_filename:
        return True
    return code.co_name == "_engine_run_backward"


def report(beats: list[Heartbeat], silent: list[int], limit: float, on_cuda: bool = False) -> str:
    """Return which ranks are late, or where all ranks are if none stands out.

    Ranks are late if not heard from, else if in the earliest place, else if not waiting. The last
    is unknown on CUDA, where the host may wait for the device at any line of ours.

    Args:
        beats: the last heartbeat of each rank that ever sent one.
        silent: the other ranks.
        limit: `comm.hang_seconds`.
        on_cuda: whether the hosts run ahead of devices.
    """
    now = max(beat.time for beat in beats)
    head = f"no progress for {limit:g} s"
    if silent:
        return f"{head}. Not heard from: {_enumerate([f'rank {rank}' for rank in silent])}"
    # A live rank sends a heartbeat every quarter of the limit.
    mute = [beat for beat in beats if now - beat.time > limit]
    if mute:
        told = [f"{beat} when last heard from, {now - beat.time:.0f} s ago" for beat in mute]
        return f"{head}. Late: {_enumerate(told)}. {_others(beats, mute)}"
    earliest = min(beat.place for beat in beats)
    late = [beat for beat in beats if beat.place == earliest]
    if len(late) == len(beats) and not on_cuda:
        late = [beat for beat in beats if beat.where and not beat.waits]
    if not late or len(late) == len(beats):
        return f"{head}. {_places(beats)}" + (_ON_DEVICE if on_cuda else "")
    return f"{head}. Late: {_enumerate([str(beat) for beat in late])}. {_others(beats, late)}"


_ON_DEVICE = ". flight_recorder_N of each rank shows the collectives that the devices wait for"


def _places(beats: list[Heartbeat]) -> str:
    """Return where ranks of the same phase stand; lines with the fewest ranks come first."""
    places: dict[str, list[Heartbeat]] = {}
    for beat in beats:
        places.setdefault(beat.where, []).append(beat)
    if len(places) == 1:
        return f"All ranks are at the same place: {beats[0]}"
    told = [
        f"{len(there)} at {where or 'no known line'}, as rank {there[0].rank} ({there[0].host})"
        for where, there in sorted(places.items(), key=lambda item: len(item[1]))
    ]
    step, phase = beats[0].step, beats[0].phase
    return f"All ranks are in step {step}, phase '{phase}'. Their places: {_enumerate(told)}"


def _others(beats: list[Heartbeat], late: list[Heartbeat]) -> str:
    named = {beat.rank for beat in late}
    places = Counter((beat.step, beat.phase) for beat in beats if beat.rank not in named)
    return "Of the other ranks, " + ", ".join(
        f"{number} wait in step {step}, phase '{phase}'"
        for (step, phase), number in sorted(places.items())
    )


def _enumerate(items: list[str]) -> str:
    more = len(items) - _MOST_NAMED
    return "; ".join(items[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _flight_record() -> bytes | None:
    """Return PyTorch's record of the last collectives, a pickle; None if it keeps none."""
    name = "_dump_nccl_trace" if torch.cuda.is_available() else "_dump_fr_trace"
    dump = getattr(torch._C._distributed_c10d, name, None)
    return None if dump is None else dump()


def _log(message: str) -> None:
    if dist.get_rank() == 0:
        logger.error("%s", message)


def _key(rank: int) -> str:
    return f"torchtitan/heartbeat/{rank}"
