"""Records the communication of all ranks of a run, and finds what NCCL would wait for in vain.

NCCL wants equal calls in equal order on all ranks of a group. Its kernels occupy the device while
they wait, so two groups must not be used in opposite orders either. It buffers nothing that is
sent, and connects all ranks of a group at its first call. Gloo, by which the ranks of tests
communicate, forgives much of that.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from harness import run_ranks
from torch.distributed import distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan import cli
from torchtitan.distributed.ring_attention import sees_rings
from torchtitan.planning.collectives import _group_of
from torchtitan.runtime.stop_request import PREEMPTED

_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")
_FILES_OF_INTEREST = ("/torchtitan/", "/pipelining/", "/fsdp/", "/tensor/")


class Message(NamedTuple):
    sent: bool
    """Else received."""
    other: int
    size: str


@dataclass(frozen=True)
class Call:
    """A collective, or messages that start together."""

    group: str
    ranks: tuple[int, ...]
    what: str = ""
    """What must be equal on all ranks: operation, sizes, types, root."""
    shares: tuple[tuple[int, ...], ...] = ()
    """Of an uneven all-to-all: rows from each rank, and rows to each."""
    messages: tuple[Message, ...] = ()
    batched: bool = False
    """Whether the messages go by the communicator of the group, not by one of the two ranks."""
    thread: str = ""
    where: str = ""
    """The callers, innermost first."""

    def __str__(self) -> str:
        what = self.what or " and ".join(
            f"{'send to' if m.sent else 'receive from'} {m.other}: {m.size}" for m in self.messages
        )
        return f"{what} in group {self.group} of {self.ranks} ({self.thread}, {self.where})"


Run = list[list[Call]]
"""The calls of each rank, in their order."""


@sees_rings
class _Recorder(TorchDispatchMode):
    """Adds the calls of the thread that enters it to `calls`."""

    def __init__(self, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls
        self._batch: list[Call] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # their operations on local tensors arrive here next
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in _LOCAL:
            call = _call_of(func._opname.strip("_"), args)
            in_batch = call.messages and self._batch is not None
            (self._batch if in_batch else self._calls).append(call)
        return func(*args, **(kwargs or {}))

    def batch(self, send_and_receive: Callable[[], Any]) -> Any:
        """Call a function whose messages start together."""
        self._batch = calls = []
        result = send_and_receive()
        self._batch = None
        messages = tuple(message for call in calls for message in call.messages)
        self._calls.append(replace(calls[0], messages=messages, batched=True))
        return result


def _call_of(name: str, args: Any) -> Call:
    group = _group_of(args)
    ranks = tuple(dist.get_process_group_ranks(group))
    tensors = [t for t in tree_leaves(args[:2]) if isinstance(t, torch.Tensor)]
    sizes = [f"{t.dtype} {t.numel()}" for t in tensors]
    call = {"group": group.group_name, "ranks": ranks, "where": _callers()}
    call["thread"] = threading.current_thread().name
    if name in ("send", "recv"):
        return Call(**call, messages=(Message(name == "send", ranks[args[2]], sizes[0]),))
    splits = [tuple(a) for a in args if isinstance(a, list) and a and isinstance(a[0], int)]
    if splits:
        rows = tensors[0].shape[1:]
        return Call(**call, what=f"{name} of {tensors[0].dtype} {list(rows)}", shares=tuple(splits))
    if name in ("gather", "scatter"):  # only the root has all tensors
        sizes = sizes[-1:] if name == "gather" else sizes[:1]
    options = [str(arg) for arg in args[1:] if type(arg) in (int, str)]  # reduction, root
    return Call(**call, what=" ".join([name, *sizes, *options]))


def _callers() -> str:
    found, frame = [], sys._getframe(3)
    while frame and len(found) < 3:
        path = frame.f_code.co_filename
        if any(part in path for part in _FILES_OF_INTEREST):
            found.append(f"{Path(path).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Yield a list to which the calls of all threads of this process are added."""
    calls: list[Call] = []
    local = threading.local()
    batch_isend_irecv, run = dist.batch_isend_irecv, threading.Thread.run

    @contextmanager
    def entered() -> Iterator[None]:
        local.recorder = _Recorder(calls)
        with local.recorder:
            yield

    def batch(operations: Any) -> Any:
        return local.recorder.batch(lambda: batch_isend_irecv(operations))

    def run_recorded(thread: threading.Thread) -> None:
        with entered():
            run(thread)

    with (
        patch.object(dist, "batch_isend_irecv", batch),
        patch.object(distributed_c10d, "batch_isend_irecv", batch),
        patch.object(threading.Thread, "run", run_recorded),
        entered(),
    ):
        yield calls


def train_recorded(folder: Path, ranks: int, *options: str) -> Run:
    """`torchtitan train` with `options`, into `folder`."""
    return run_ranks(_train, ranks, ["train", *options, "--job.dump_folder", str(folder)])


def _train(arguments: list[str]) -> list[Call]:
    sys.argv[1:] = arguments
    with recording() as calls:
        code = cli.main(arguments)
    assert code in (0, PREEMPTED), f"exit code {code}"
    return calls


@dataclass
class _Queue:
    """What a thread of a rank has still to do, with the number of each call among its rank's."""

    rank: int
    calls: list[tuple[int, Call]]
    met: set[int] = field(default_factory=set)
    """The messages of the first call that have met their counterparts."""

    @property
    def number(self) -> int:
        return self.calls[0][0]

    @property
    def first(self) -> Call:
        return self.calls[0][1]

    def advance(self) -> None:
        del self.calls[0]
        self.met.clear()


def problems(run: Run) -> list[str]:
    """Return which calls would differ or never end, if each one ended before its thread's next.

    Kernels and the host can wait for no more than that. So what ends here ends whether a device
    runs the kernels of different groups at once, or one after the other as they were called.
    """
    queues = []
    for rank, calls in enumerate(run):
        of_thread: dict[str, list[tuple[int, Call]]] = defaultdict(list)
        for number, call in enumerate(calls):
            of_thread[call.thread].append((number, call))
        queues += [_Queue(rank, of) for of in of_thread.values()]
    connected: set[str] = set()
    while queues := [queue for queue in queues if queue.calls]:
        # A group's calls have one order on a rank, whatever the thread.
        waiting: dict[str, dict[int, _Queue]] = defaultdict(dict)
        for queue in sorted(queues, key=lambda queue: (queue.rank, queue.number)):
            waiting[queue.first.group].setdefault(queue.rank, queue)
        moved = False
        for group, of_rank in waiting.items():
            calls = [queue.first for queue in of_rank.values()]
            complete = list(of_rank) == sorted(calls[0].ranks)
            if complete and all(call.batched or not call.messages for call in calls):
                connected.add(group)
            if complete and not any(call.messages for call in calls):
                if differences := _differences(calls):
                    return differences
                for queue in of_rank.values():
                    queue.advance()
                moved = True
            else:
                moved |= _exchange(of_rank, group in connected)
        if not moved:
            return [f"rank {queue.rank} waits for ever in {queue.first}" for queue in queues]
    return []


def _differences(calls: list[Call]) -> list[str]:
    """Return how the calls of the ranks of a group differ."""
    if len({(call.what, call.ranks, call.thread, bool(call.shares)) for call in calls}) > 1:
        return [f"rank {rank}: {call}" for rank, call in zip(calls[0].ranks, calls, strict=False)]
    pairs = [(a, b) for a in range(len(calls)) for b in range(len(calls)) if calls[a].shares]
    return [
        f"{calls[b]} expects {calls[b].shares[0][a]} rows, but gets {calls[a].shares[1][b]}"
        for a, b in pairs
        if calls[a].shares[1][b] != calls[b].shares[0][a]
    ]


def _exchange(queues: dict[int, _Queue], connected: bool) -> bool:
    """Let messages meet, in their order between two ranks. Return whether any does."""
    moved = False
    for rank, queue in queues.items():
        batched = queue.first.batched
        for i, message in enumerate(queue.first.messages if connected or not batched else ()):
            other = queues.get(message.other)
            if i in queue.met or other is None or other.first.batched != batched:
                continue
            for j, counterpart in enumerate(other.first.messages):
                opposite = counterpart.other == rank and counterpart.sent != message.sent
                if opposite and j not in other.met:
                    if counterpart.size == message.size:
                        queue.met.add(i)
                        other.met.add(j)
                        moved = True
                    break
    for queue in queues.values():
        if queue.first.messages and len(queue.met) == len(queue.first.messages):
            queue.advance()
    return moved
