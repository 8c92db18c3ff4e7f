"""Data that takes one rank long to open, as a first look for the lines of a large file does."""

import time
from datetime import timedelta

import torch.distributed as dist
from harness import on_ranks
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import register_dataset
from torchtitan.data.build import build_dataloader


def open_late(path: str | None, text_key: str) -> list[str]:
    time.sleep(2.5 * dist.get_rank())
    return ["text"] * 8


def build(folder) -> None:
    register_dataset("late", open_late)
    config = JobConfig()
    config.training.dataset, config.training.local_batch_size = "late", 1
    dist.barrier()  # also connects the ranks
    _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    loader = build_dataloader(config, BytesTokenizer(), dist.get_rank(), 2)
    loader.close()


def test_the_others_wait_longer_than_for_a_step(tmp_path) -> None:
    on_ranks(2, build, tmp_path)
