"""Compute the place of a rank's shard once for all tensors that are sharded alike."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@contextmanager
def finding_once() -> Iterator[None]:
    """Let torch.distributed.checkpoint cache shard places by shape, mesh and placements.

    If tensor and data parallelism shard the same dimension, PyTorch computes the shards of all
    ranks of the mesh to find one: 17 ms per tensor with 1,024 x 8 ranks. A model has thousands of
    tensors, but only a few shapes.
    """
    with patch(
        "torch.distributed.checkpoint.planner_helpers.compute_local_shape_and_global_offset",
        functools.cache(compute_local_shape_and_global_offset),
    ):
        yield
