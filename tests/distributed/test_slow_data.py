"""Data that takes one rank long to open, as a first look for the lines of a large file does."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import on_ranks
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import register_dataset
from torchtitan.data.build import build_dataloader


def be_late() -> None:
    time.sleep(2.5 * dist.get_rank())


def open_late(path: str | None, text_key: str) -> list[str]:
    be_late()
    return ["text"] * 8


class Tokens(list[str]):
    """As nanoGPT's files, whose documents end where the tokenizer's eos is."""

    def use_tokenizer(self, tokenizer: Any) -> None:
        be_late()


register_dataset("late", open_late)
register_dataset("late_tokens", lambda path, text_key: Tokens(["text"] * 8))


def build(dataset: str) -> None:
    config = JobConfig()
    config.training.dataset, config.training.local_batch_size = dataset, 1
    dist.barrier()  # also connects the ranks
    _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    loader = build_dataloader(config, BytesTokenizer(), dist.get_rank(), 2)
    dist.all_reduce(torch.zeros(1))  # the next thing that the ranks do together
    loader.close()


@pytest.mark.parametrize("dataset", ["late", "late_tokens"])
def test_the_others_wait_longer_than_for_a_step(dataset: str) -> None:
    on_ranks(2, build, dataset)
