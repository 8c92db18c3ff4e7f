"""Runs a function of a test on several processes that form a process group."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp"])


def on_ranks(world_size: int, function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `function(folder, *args)` on each of `world_size` processes, joined by gloo."""
    meeting_place = str(folder / f"store-{uuid.uuid4().hex}")
    mp.start_processes(
        _join,
        (world_size, meeting_place, function, folder, args),
        world_size,
        start_method="forkserver",
    )


def _join(
    rank: int,
    world_size: int,
    meeting_place: str,
    function: Callable[..., None],
    folder: Path,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(meeting_place, world_size)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, store=store)
    function(folder, *args)
    dist.destroy_process_group()
