"""Run a function on rank 0 or on all ranks; if it fails, every rank raises the same error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from torchtitan.runtime.host_sum import sum_over_ranks

T = TypeVar("T")


def on_rank_zero(function: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Call `function` on rank 0 alone; return its result, or raise its error, on every rank.

    `group` holds all ranks; None: there is only this process.
    """
    result: T | None = None
    error: Exception | None = None
    if group is None or dist.get_rank() == 0:
        try:
            result = function()
        except Exception as caught:
            error = caught
    if group is not None:
        outcome: list[Any] = [result, sendable(error)]
        dist.broadcast_object_list(outcome, src=0, group=group)
        if dist.get_rank() != 0:
            result, error = outcome
    if error is not None:
        raise error
    return cast(T, result)


def on_all_ranks(function: Callable[[int, int], T], group: dist.ProcessGroup | None) -> T:
    """Call `function(rank, ranks)` on every rank; raise the first rank's error on all of them.

    `group` holds all ranks; None: there is only this process.

    Returns:
        The result of this rank's call.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    result: T | None = None
    error: Exception | None = None
    try:
        result = function(rank, ranks)
    except Exception as caught:
        error = caught
    if group is not None:
        failed = torch.tensor(ranks if error is None else rank)
        sum_over_ranks(failed, dist.ReduceOp.MIN, group)
        if (first := int(failed)) < ranks:
            told: list[Any] = [sendable(error)]
            dist.broadcast_object_list(told, src=first, group=group)
            if rank != first:  # its own has the traceback
                error = told[0]
    if error is not None:
        raise error
    return cast(T, result)


def sendable(error: Exception | None) -> Exception | None:
    """Return `error`, or one with its type and text if other ranks could not unpickle it.

    Otherwise a rank would leave the others waiting, or all would raise what pickle says of it.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
