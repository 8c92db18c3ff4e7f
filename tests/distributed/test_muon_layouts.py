"""Muon moves sharded parameters exactly as it moves whole ones.

Inputs and weights of the loss are small integers, so that the gradients are exact in float32
whatever the order of the sums, and the orthogonalization of a whole matrix is the same work on any
rank. So the matrices have to be equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from harness import on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from torchtitan.components.muon import Muon
from torchtitan.components.optimizer import build_optimizer
from torchtitan.config import JobConfig
from torchtitan.config.optimizer import ParamRule
from torchtitan.distributed.collective_observer import CollectiveObserver
from torchtitan.distributed.fsdp import use_summed_gradients
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.planning.collectives import Collective, CollectiveRecorder
from torchtitan.planning.matrix_exchanges import leaving_out_exchanges
from torchtitan.runtime.fake_world import fake_world

# name -> dp_replicate, dp_shard, tp
LAYOUTS = {
    "one": (1, 1, 1),
    "fsdp2": (1, 2, 1),
    "tp2": (1, 1, 2),
    "ddp2": (2, 1, 1),
    "fsdp4": (1, 4, 1),
    "fsdp2xtp2": (1, 2, 2),
    "hsdp2x2": (2, 2, 1),
    "hsdp2xtp2": (2, 1, 2),
}
# Five matrices: more than ranks, and never a multiple of them. Six rows do not divide by 4, nor
# three rows, a half of them, by 2.
SHAPES = {"0": (6, 10), "1": (10, 6), "2": (6, 6), "3": (2, 12), "4": (24, 4)}
COLWISE = ("0", "2", "3")  # the others are sharded row-wise under TP
BATCH = 8


STACKS = {"rows": (4, 8, 6), "whole": (4, 6, 3), "columns": (3, 2, 8)}
CUT = {"whole": 0, "rows": 1, "columns": 2}
"""The dimension that FSDP cuts."""


class Experts(nn.Module):
    """Stacks of matrices, of which `other` is not Muon's."""

    stacks_of_matrices = tuple(STACKS)

    def __init__(self) -> None:
        super().__init__()
        for name, shape in STACKS.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.other = nn.Parameter(torch.randn(4, 6, 3))
        self.dims = {getattr(self, name): dim for name, dim in CUT.items()}

    def shard(self, mesh: DeviceMesh) -> None:
        dims = self.dims
        fully_shard(self, mesh=mesh, shard_placement_fn=lambda param: Shard(dims.get(param, 0)))

    def forward(self, step: int, share: slice) -> torch.Tensor:
        loss = self.other.sum() * (share.stop - share.start)
        for name, shape in STACKS.items():
            for row in range(share.start, share.stop):
                loss = loss + (getattr(self, name) * integers(shape, 1000 * row + step)).sum()
        return loss


class Net(nn.Module):
    other_blocks = ("experts",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {name: nn.Linear(columns, rows) for name, (rows, columns) in SHAPES.items()}
        )
        self.experts = Experts()

    def forward(self, step: int, share: slice, skip: str | None) -> torch.Tensor:
        """A loss whose gradients are integers and depend on no weight."""
        loss = self.experts(step, share)
        for name, layer in self.layers.items():
            rows, columns = SHAPES[name]
            if name != skip:
                out = layer(integers((BATCH, columns), step)[share])
                loss = loss + (out * integers((BATCH, rows), step + 100)[share]).sum()
        return loss


def integers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


class Run:
    def __init__(self, layout: str, rules: Sequence[ParamRule] = ()) -> None:
        replicate, shard, tp = LAYOUTS[layout]
        dims = ParallelDims(
            dp_replicate=replicate, dp_shard=shard, tp=tp, world_size=replicate * shard * tp
        )
        self.model, self.share = Net(), slice(0, BATCH)
        if layout != "one":
            mesh = dims.world_mesh
            size = BATCH // mesh["dp"].size()
            self.share = slice(start := mesh["dp"].get_local_rank() * size, start + size)
            if tp > 1:
                plan = {
                    f"layers.{name}": ColwiseParallel(output_layouts=Replicate())
                    if name in COLWISE
                    else RowwiseParallel(input_layouts=Replicate())
                    for name in SHAPES
                }
                parallelize_module(self.model, mesh["tp"], plan)
            sharding = mesh["dp_replicate", "dp_shard"] if replicate > 1 else mesh["dp_shard"]
            for layer in self.model.layers.values():
                fully_shard(layer, mesh=sharding)
            self.model.experts.shard(sharding)
            fully_shard(self.model, mesh=sharding)
            use_summed_gradients(self.model)
        self.dims, self.config = dims, JobConfig()
        self.config.optimizer.name = "Muon"
        self.config.optimizer.rules = list(rules)
        self.build_optimizers()

    def build_optimizers(self) -> None:
        self.optimizers = build_optimizer([self.model], self.config, self.dims)

    def step(self, number: int, skip: str | None = None) -> None:
        self.optimizers.zero_grad()
        self.model(number, self.share, skip).backward()
        for param in self.model.parameters():
            if param.grad is None:  # as the trainer does, and FSDP
                param.grad = torch.zeros_like(param)
        self.optimizers.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": self.optimizers.state_dict(),
        }

    def compared(self) -> dict[str, torch.Tensor]:
        """The whole matrices that Muon moves, and their momentum."""
        tensors = dict(self.model.named_parameters()) | self.optimizers.state_dict()
        names = {f"layers.{name}.weight" for name in SHAPES}
        names |= {f"experts.{name}" for name in STACKS}
        names |= {f"state.{name}.momentum_buffer" for name in names}
        return {name: full(tensors[name]).detach().clone() for name in names}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), (name, actual[name] - tensor)


def train_side_by_side(kind: type[Run], layouts: list[str]) -> list[Run]:
    """Runs that have made some steps, each equal to that of one process."""
    one = kind("one")
    runs = [kind(layout) for layout in layouts]
    for number, skip in enumerate([None, "2", None]):
        one.step(number, skip)
        for run in runs:
            run.step(number, skip)
            assert_equal(run.compared(), one.compared())
    return runs


def layouts_of(ranks: int) -> list[str]:
    return [name for name, degrees in LAYOUTS.items() if math.prod(degrees) == ranks]


def compare_with_one_process(folder: Path, layouts: list[str]) -> None:
    sent = []
    for run in train_side_by_side(Run, layouts):
        with CollectiveRecorder(run.dims.groups()) as recorder:
            run.optimizers.step()
        sent.append(recorder.collectives)
    torch.save(sent, folder / f"sent-{dist.get_rank()}")


def planned(layout: str) -> list[Collective]:
    """What this rank of a fake world would send, as a plan traces it."""
    run = Run(layout)
    with FakeTensorMode(allow_non_fake_inputs=True):
        run.model.to_empty(device="cpu")
        run.build_optimizers()
        for param in run.model.parameters():
            param.grad = torch.zeros_like(param)
        with leaving_out_exchanges():
            run.optimizers.step()
        with CollectiveRecorder(run.dims.groups()) as recorder:
            run.optimizers.step()
    return recorder.collectives


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 4])
def test_every_layout_moves_matrices_as_one_process_does(tmp_path: Path, ranks: int) -> None:
    layouts = layouts_of(ranks)
    on_ranks(ranks, compare_with_one_process, tmp_path, layouts)
    for rank in 0, ranks - 1:
        sent = torch.load(tmp_path / f"sent-{rank}", weights_only=False)
        for layout, of_run in zip(layouts, sent, strict=True):
            with fake_world(ranks, rank):
                assert planned(layout) == of_run, layout


# A learning rate, and so a group of parameters, for each layer.
RULES = [ParamRule(rf"layers\.{name}\.", lr_scale=1 / (1 + int(name))) for name in SHAPES]


def groups_share_rounds(folder: Path) -> None:
    one, run = Run("one", RULES), Run("fsdp2", RULES)
    exchanges: list[int] = []

    def observe(name: str, inputs: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        if "alltoall" in name:
            exchanges.append(sum(t.numel() for t in inputs))
        return call()

    for number in range(2):
        one.step(number)
        with CollectiveObserver(observe):
            run.step(number)
        assert_equal(run.compared(), one.compared())
    # A stack that is cut between its matrices needs no exchange.
    stacks = [matrices for name, (matrices, *_) in STACKS.items() if CUT[name] != 0]
    rounds = sum(math.ceil(matrices / 2) for matrices in (len(SHAPES), *stacks))
    assert len(exchanges) == 2 * 2 * rounds  # there and back, in each of two steps


def test_matrices_of_all_groups_are_worked_on_side_by_side(tmp_path: Path) -> None:
    on_ranks(2, groups_share_rounds, tmp_path)


def save(folder: Path, kind: type[Run], layout: str) -> None:
    run = kind(layout)
    for number in range(2):
        run.step(number)
    dcp.save(run.state(), checkpoint_id=folder / "checkpoint")


def resume(folder: Path, kind: type[Run], layout: str) -> None:
    run = kind(layout)
    state = run.state()
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    run.optimizers.load_state_dict(state["optimizer"])
    one = kind("one")
    for number in range(4):
        one.step(number)
        if number >= 2:
            run.step(number)
    assert_equal(run.compared(), one.compared())


def check_resume(folder: Path, kind: type[Run], saved_on: str, resumed_on: str) -> None:
    """A run that is saved on a layout goes on, on another one, as a run of one process does."""
    on_ranks(math.prod(LAYOUTS[saved_on]), save, folder, kind, saved_on)
    on_ranks(math.prod(LAYOUTS[resumed_on]), resume, folder, kind, resumed_on)


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        ("fsdp2xtp2", "fsdp2"),
        pytest.param("hsdp2x2", "tp2", marks=pytest.mark.long),
        pytest.param("tp2", "fsdp4", marks=pytest.mark.long),
    ],
)
def test_its_state_goes_to_another_layout(tmp_path: Path, saved_on: str, resumed_on: str) -> None:
    check_resume(tmp_path, Run, saved_on, resumed_on)


def gradient_missing_on_one_rank(folder: Path) -> None:
    run = Run("fsdp2")
    weight = run.model.layers["3"].weight
    run.step(0)
    before = run.compared()
    run.model(1, run.share, None).backward()
    if dist.get_rank() == 0:
        weight.grad = None
    run.optimizers.step()
    after = run.compared()
    # Row 0 of the two is on rank 0, which leaves its part as it is.
    moved = (after["layers.3.weight"] != before["layers.3.weight"]).any(1)
    assert moved.tolist() == [False, True]


def test_a_gradient_missing_on_one_rank_does_not_block_the_others(tmp_path: Path) -> None:
    on_ranks(2, gradient_missing_on_one_rank, tmp_path)


def matrices_on_some_ranks(folder: Path) -> None:
    """Two stages of a pipeline with two replicas each, and matrices in the first stage only."""
    dims = ParallelDims(pp=2, dp_replicate=2, dp_shard=1, world_size=4)
    mesh = dims.world_mesh
    matrix = nn.Parameter(
        distribute_tensor(integers((6, 4), 0), mesh["dp_replicate", "dp_shard"], [Replicate()] * 2)
    )
    expected = nn.Parameter(integers((6, 4), 0))
    params = [matrix, expected]
    for param in params:
        param.grad = torch.ones_like(param)
    if mesh["pp"].get_local_rank() == 0:
        for param in params:
            Muon([param]).step()
    else:
        Muon([nn.Parameter(torch.ones(3, 3))]).step()
    assert torch.equal(matrix.full_tensor(), expected)


def test_ranks_without_matrices_are_not_waited_for(tmp_path: Path) -> None:
    on_ranks(4, matrices_on_some_ranks, tmp_path)


def placements_of_an_author(folder: Path) -> None:
    """Dimensions that cut the same rows or columns, and parts that are uneven or empty."""
    mesh = init_device_mesh("cpu", (2, 2))
    for number, placements in enumerate(product([Replicate(), Shard(0), Shard(1)], repeat=2)):
        for shape in (7, 5), (2, 3), (5, 9):
            whole = integers(shape, number)
            matrices = [
                nn.Parameter(distribute_tensor(whole.clone(), mesh, placements)) for _ in range(3)
            ]
            params = [*matrices, expected := nn.Parameter(whole.clone())]
            for param in params:
                param.grad = param.detach().clone()
            Muon(params).step()
            assert not torch.equal(expected, whole)
            for matrix in matrices:
                assert torch.equal(matrix.full_tensor(), expected), (placements, shape)


def test_placements_of_an_author(tmp_path: Path) -> None:
    on_ranks(4, placements_of_an_author, tmp_path)
