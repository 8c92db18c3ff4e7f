"""Where a rank's own shards are, found once for all tensors that are sharded alike."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@contextmanager
def finding_once() -> Iterator[None]:
    """Within it, torch.distributed.checkpoint remembers by shape, mesh and placements.

    Where tensor and data parallelism share a dimension, PyTorch looks at the shards of all ranks of
    the mesh for that of one: 17 ms a tensor with 1,024 x 8 ranks. A model has thousands of tensors,
    of a few shapes.
    """
    with patch(
        "torch.distributed.checkpoint.planner_helpers.compute_local_shape_and_global_offset",
        functools.cache(compute_local_shape_and_global_offset),
    ):
        yield
