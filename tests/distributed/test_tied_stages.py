"""Stages that share a weight talk to each other, past the stages between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from harness import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from torchtitan.components.checkpoint.load import load_weights_of_parts
from torchtitan.distributed.stage_copies import StageCopies, record_sharing, shared_weights

NAMES = ["tok_embeddings", "layers", "output"]
"""Modules of `TinyModel`, of which each is a stage."""


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


def _load_without_embedding(_: Path, checkpoint: Path) -> None:
    rank, part = dist.get_rank(), TinyModel(TinyArgs(tied=True))
    for name in set(NAMES) - {NAMES[rank]}:
        setattr(part, name, None)
    with torch.device("meta"):
        model = TinyModel(TinyArgs(tied=True))
    record_sharing(part, rank, shared_weights(model, [[name] for name in NAMES]), model)
    before = [param.clone() for param in part.parameters()]
    load_weights_of_parts([part], checkpoint, dist.group.WORLD, exclude="tok_embeddings")
    same = all(map(torch.equal, before, part.parameters()))
    assert same == (rank != 1)


@pytest.mark.usefixtures("world_of_one")
def test_a_stage_without_a_tied_weight_knows_that_it_is_not_loaded(tmp_path: Path) -> None:
    """A pattern of its first name excludes it under its second name, too: on all ranks."""
    Run(tmp_path, model=TinyModel(TinyArgs(tied=True))).train(2)
    on_ranks(3, _load_without_embedding, tmp_path, tmp_path / "checkpoint" / "step-2")
