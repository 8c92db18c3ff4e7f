"""Says in words why ranks failed that no check stopped: an exception, a crash, a hang."""

from __future__ import annotations

import re

from torchtitan.distributed.ranks import RankFailure

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)')
# Functions of these files that users call by name; what they call in turn tells less.
_COLLECTIVE_FILES = ("distributed_c10d.py", "_functional_collectives.py")


def explain(failures: list[RankFailure]) -> tuple[str, str]:
    """What happened, and where to look."""
    first = failures[0]
    if first.exit_code is None:  # it had to be stopped
        return _explain_hang(failures)
    if "SIGKILL" in first.reason:
        return (
            f"rank {first.rank} was {first.reason}, most likely for want of memory",
            "Use a smaller flavor; its weights, gradients and optimizer state are held at once.",
        )
    return f"rank {first.rank}: {first.reason}", _where(first.traceback)


def _explain_hang(failures: list[RankFailure]) -> tuple[str, str]:
    waiting = []
    for failure in failures:
        collective, place = _collective(failure.traceback)
        waiting.append(f"rank {failure.rank} in {collective or 'no collective'} ({place})")
    return (
        f"{failures[0].reason}: {'; '.join(waiting)}",
        "Every rank must call the same collectives in the same order: look for a branch that "
        "depends on the rank, or on data that differs between ranks.",
    )


def _collective(stacks: str) -> tuple[str, str]:
    """The collective that a rank is in ("" if none), and the innermost place outside of torch.

    `stacks` lists the most recent call first, as faulthandler writes them.
    """
    collective, place = "", "unknown place"
    main = stacks.partition("Current thread")[2] or stacks
    for frame in _FRAME.finditer(main):
        name = frame["file"].rpartition("/")[2]
        if name in _COLLECTIVE_FILES and not frame["function"].startswith("_"):
            if frame["function"] not in ("wrapper", "wait_tensor") or not collective:
                collective = frame["function"]
        elif "/torch/" not in frame["file"]:
            place = f"{frame['file']}:{frame['line']} in {frame['function']}"
            break
    return collective, place


def _where(traceback: str) -> str:
    """The innermost frame of an exception's traceback or a crash's stacks that is not PyTorch's."""
    current = traceback.partition("Current thread")[2]  # faulthandler's, the most recent call first
    frames = [f for f in _FRAME.finditer(current or traceback) if "/torch/" not in f["file"]]
    if not frames:
        return ""
    innermost = frames[0] if current else frames[-1]
    return f"{innermost['file']}:{innermost['line']} in {innermost['function']}"
