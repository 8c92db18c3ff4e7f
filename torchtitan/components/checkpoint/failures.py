"""Find the error behind a failed collective save or load."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException


def first_failure(failure: CheckpointException) -> BaseException:
    """Return the error of the lowest rank that failed to save or load.

    torch.distributed.checkpoint collects errors from all ranks and raises them on all.
    """
    error, _ = failure.failures[min(failure.failures)]
    return error
