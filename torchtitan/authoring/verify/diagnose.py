"""Explains why ranks failed outside of a check: an exception, a crash, a hang."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import torchtitan
from torchtitan.errors import TitanError
from torchtitan.runtime.ranks import RankFailure
from torchtitan.tools.text import few

from .probe import is_of_torch

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)')
# Users call functions of these files by name; the functions that these call say less.
_COLLECTIVE_FILES = ("distributed_c10d.py", "_functional_collectives.py")
# The errors of the other ranks when a rank has died.
_LOST_PEER = re.compile(
    r"closed by peer|Read error|Connection refused|Connection reset|Broken pipe", re.I
)
_TORCHTITAN = Path(torchtitan.__file__).parent
_PYTHON = Path(sysconfig.get_path("stdlib"))
_NO_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory|out of memory")


def explain(failures: list[RankFailure]) -> tuple[str, str]:
    """Return what happened, and where to look."""
    ended = [failure for failure in failures if failure.exit_code is not None]
    if not ended:
        return _explain_hang(failures)
    first = min(ended, key=_innocence)
    place = _collective(first.traceback)[1] if _died(first) else _innermost_frame(first.traceback)
    if "SIGKILL" in first.reason:
        return (
            f"rank {first.rank} was {first.reason}, most likely because memory ran out",
            "Use a smaller flavor; its weights, gradients and optimizer state are held at once.",
        )
    if isinstance(first.exception, TitanError):  # a message to the user, whatever raises it
        return str(first.exception), ""
    reason = first.reason.strip().partition("\n")[0]  # the rest is in the details
    if _NO_MEMORY.search(first.reason):
        return (
            f"rank {first.rank} ran out of memory: {reason}",
            f"{place}. Use a smaller flavor; weights, gradients and optimizer state are held at "
            "once.",
        )
    if "mixed torch.Tensor and DTensor" in first.reason:
        place += (
            ". Without tensor parallelism: FSDP gathers a block's weights only while that block "
            "runs, so use them nowhere else. With it, the plan may leave out a matrix or parameter "
            "that is used here. What goes into the residual stream must be a local tensor: a norm "
            "or a replicated matrix that is added to it needs "
            "SequenceParallel(use_local_output=True). Put a parameter of the model itself in a "
            "module, which the plan gives a style"
        )
    elif "IndexError: index" in first.reason:  # a label is a "Target"
        place += (
            ". If the model has a table of positions, say how many tokens it takes: max_seq_len in "
            "its args, or a ConfigError from update_from_config"
        )
    elif notes := getattr(first.exception, "__notes__", []):
        place += f". Then {notes[0]}"
    return f"rank {first.rank}: {reason}", place


def _innocence(failure: RankFailure) -> int:
    """Rank failures: ranks that died first, then errors, then ranks that only lost the others."""
    if _died(failure):
        return 0
    return 2 if _LOST_PEER.search(failure.reason) else 1


def _died(failure: RankFailure) -> bool:
    """Whether a signal ended the rank."""
    return failure.exit_code is not None and failure.exit_code < 0


def _explain_hang(failures: list[RankFailure]) -> tuple[str, str]:
    waiting, collectives = [], set()
    for failure in sorted(failures, key=lambda failure: failure.rank):
        collective, place = _collective(failure.traceback)
        collectives.add(collective)
        waiting.append(f"rank {failure.rank} in {collective or 'no collective'} ({place})")
    hint = (
        "Every rank must call the same collectives in the same order: look for a branch that "
        "depends on the rank, or on data that differs between ranks."
    )
    computed = [f"rank {failure.rank}" for failure in failures if failure.computed]
    if computed or collectives == {""}:
        state = f"{few(computed)} still computed" if computed else "No rank waits for another"
        hint = (
            f"{state}. The machine may be slow or busy: repeat this check with --only. Otherwise "
            "look for a loop that does not end."
        )
    return f"{failures[0].reason}: {'; '.join(waiting)}", hint


def _collective(stacks: str) -> tuple[str, str]:
    """Return a rank's current collective ("" if none), and the innermost place outside of torch.

    `stacks` lists the most recent call first, as written by faulthandler.
    """
    collective, place = "", "unknown place"
    main = stacks.partition("Current thread")[2] or stacks
    for frame in _FRAME.finditer(main):
        name = frame["file"].rpartition("/")[2]
        if name in _COLLECTIVE_FILES and not frame["function"].startswith("_"):
            if frame["function"] not in ("wrapper", "wait_tensor") or not collective:
                collective = frame["function"]
        elif not is_of_torch(frame["file"]):
            place = _place(frame)
            break
    return collective, place


def _place(frame: re.Match[str]) -> str:
    return f"{frame['file']}:{frame['line']} in {frame['function']}"


def _is_authors(file: str) -> bool:
    """Whether the code belongs to a model, neither to the trainer nor to Python."""
    path = Path(file)
    if path.is_relative_to(_TORCHTITAN):
        return path.is_relative_to(_TORCHTITAN / "models")
    return path.is_absolute() and (
        not path.is_relative_to(_PYTHON) or "site-packages" in path.parts
    )


def _innermost_frame(stack: str) -> str:
    """Return the innermost frame, of the author if there is one, as calls below it say less."""
    frames = [f for f in _FRAME.finditer(stack) if not is_of_torch(f["file"])]
    frames = [f for f in frames if _is_authors(f["file"])] or frames
    return _place(frames[-1]) if frames else ""


def problem_and_place(error: Exception) -> str:
    """Return an exception in words, with the author's line that raised it, if one did."""
    problem = f"{type(error).__name__}: {error}"
    stack = traceback.extract_tb(error.__traceback__)
    frames = [f for f in stack if not is_of_torch(f.filename) and _is_authors(f.filename)]
    return f"{problem} ({frames[-1].filename}:{frames[-1].lineno})" if frames else problem
