"""The validation loss does not depend on how many ranks share the sequences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from harness import on_ranks
from torch.distributed.fsdp import fully_shard

from torchtitan.components.loss import cross_entropy
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.components.validate import build_validator
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims


def validate(folder: Path, degrees: dict[str, int]) -> None:
    dims = ParallelDims(**degrees, world_size=math.prod(degrees.values()))
    config = JobConfig()
    config.training.document_mask = True  # so that ranks have different numbers of valid tokens
    config.validation.dataset, config.validation.dataset_path = "text", str(folder / "texts")
    config.validation.steps, config.validation.local_batch_size = 5, 2  # 2 and 4 do not divide 5
    config.validation.seq_len = 32
    torch.manual_seed(0)
    model = nn.Embedding(258, 258)
    mesh = dims.world_mesh
    sharding = mesh["dp_replicate", "dp_shard"] if dims.dp_replicate_enabled else mesh["dp_shard"]
    fully_shard(model, mesh=sharding, reshard_after_forward=False)
    rank = mesh["dp"].get_local_rank()
    validator = build_validator(config, BytesTokenizer(), cross_entropy, dims, rank, dims.dp)
    loss = validator.validate([model], lambda b: cross_entropy(model(b["tokens"]), b["labels"]))
    expected = folder / "one"
    if dims.world_size == 1:
        expected.write_text(str(loss))
    assert loss == pytest.approx(float(expected.read_text()), rel=1e-12)


def test_the_validation_loss_is_the_same_on_every_layout(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(19):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number} " * (number % 5))
    on_ranks(1, validate, tmp_path, {"dp_shard": 1})
    on_ranks(2, validate, tmp_path, {"dp_shard": 2})
    on_ranks(4, validate, tmp_path, {"dp_replicate": 2, "dp_shard": 2})
    on_ranks(4, validate, tmp_path, {"dp_shard": 2, "tp": 2})
