"""Show an error once, although all ranks raise it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from types import TracebackType

from torchtitan.runtime.world import has_agent_store, rank

ONE_MESSAGE = "torchtitan/one_message"
"""Key in a rank's error file: the error is a single message, not a traceback."""
_PATIENCE = timedelta(seconds=5)


@contextmanager
def claim_report(message: str) -> Iterator[bool]:
    """Yield whether this rank should show `message`; under torchrun, the first rank to ask should.

    The others leave the `with` block after that rank, because torchrun stops all ranks as soon as
    one ends. Ranks communicate through torchrun's store, so this works before (and after) they have
    a process group. Without such a store, every rank is the first.
    """
    if not has_agent_store():
        yield True
        return
    import torch.distributed as dist

    digest = hashlib.blake2b(message.encode(), digest_size=8).hexdigest()
    key = f"torchtitan/report/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{digest}"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(host, port, is_master=False, timeout=_PATIENCE)
        first = store.add(f"{key}/asked", 1) == 1
    except RuntimeError:  # torchrun is gone, or its host cannot be reached
        yield True
        return
    yield first
    try:
        if first:
            store.set(f"{key}/shown", "yes")
        else:
            store.wait([f"{key}/shown"], _PATIENCE)
    except RuntimeError:
        pass


def show_tracebacks_once(in_a_line: Callable[[BaseException], str]) -> None:
    """Of the ranks that an error ends at the same place, have one show the traceback.

    The others show the error `in_a_line`. When a rank dies, thousands fail where they wait for it,
    with some sixty lines of traceback each, in which its own error would not be found.
    """
    if has_agent_store():
        sys.excepthook = partial(_show_once, sys.excepthook, in_a_line)


def _show_once(
    show: Callable[..., object],
    in_a_line: Callable[[BaseException], str],
    kind: type[BaseException],
    error: BaseException,
    stack: TracebackType | None,
) -> None:
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(stack)]
    with claim_report(f"{kind.__name__} at {frames}") as first:
        if first:
            show(kind, error, stack)
        else:
            line = f"[rank {rank()}] {in_a_line(error)} (traceback: see another rank's)\n"
            sys.stderr.write(line)
        sys.stderr.flush()


def write_error_file(message: str) -> None:
    """Make torchrun show the message in its summary, the last thing that a user reads.

    torch.distributed.elastic reads the file; its own `record` would write a traceback into it.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        error = {"message": {"message": message, "extraInfo": extra}, ONE_MESSAGE: True}
        try:
            with open(path, "w") as file:
                json.dump(error, file)
        except OSError:  # the disk is full, as the message may say; torchrun fails on half a file
            with suppress(OSError):
                os.unlink(path)
