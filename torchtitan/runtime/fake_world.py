"""Simulate any rank of any world in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """Make this process rank `rank` of `world_size` ranks, with collectives that do nothing.

    Raises:
        RuntimeError: a process group exists already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    with patch.dict(os.environ, environment):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            yield
        finally:
            dist.destroy_process_group()
            # Both caches hold meshes, whose groups are gone.
            _clear_sharding_prop_cache()
            torch._dynamo.reset()
