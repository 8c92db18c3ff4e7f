"""Stages that share a weight talk to each other, past the stages between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from harness import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.distributed.stage_copies import StageCopies, record_sharing, shared_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.output = (nn.Linear(4, 4) for _ in range(3))
        self.output.weight = self.embedding.weight


def _spread(_: Path) -> None:
    rank, calls = dist.get_rank(), []

    def recorded(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return call

    with torch.device("meta"):
        model = Tied()
    names = ["embedding", "layer", "output"]
    part = Tied()
    for name in set(names) - {names[rank]}:
        setattr(part, name, None)
    weights = shared_weights(model, [[name] for name in names])
    record_sharing(part, rank, weights, model)
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("pp",))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "batch_isend_irecv"):
            patch.setattr(dist, name, recorded(name))
        StageCopies([part], mesh, []).spread_weights()
    assert calls == ["all_reduce"] + ["batch_isend_irecv"] * (rank != 1)


def test_all_ranks_of_a_pipeline_connect_before_some_talk(tmp_path: Path) -> None:
    """NCCL waits for all of a group at its first call, which a few ranks must not make alone."""
    on_ranks(3, _spread, tmp_path)
