"""What failed, of the ranks that save or load together."""

from __future__ import annotations

from torch.distributed.checkpoint.api import CheckpointException


def first_failure(failure: CheckpointException) -> BaseException:
    """The error of the first rank among those that failed to save or load.

    torch.distributed.checkpoint collects errors from all ranks and raises them on all.
    """
    error, _ = failure.failures[min(failure.failures)]
    return error
