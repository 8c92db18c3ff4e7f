from __future__ import annotations

import tracemalloc

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchtitan.components import muon
from torchtitan.components.muon import Muon, orthogonalize
from torchtitan.runtime.fake_world import fake_world

SHAPES = [(8, 8), (24, 8), (8, 24), (1, 5), (5, 1)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for number, param in enumerate(params):  # from large to small
        param.grad = torch.randn(param.shape, generator=generator) * 0.1**number


def test_it_is_the_muon_of_torch() -> None:
    options = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.2}
    other = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.1}
    ours, theirs = matrices(), matrices()
    optimizer, reference = (
        muon([{"params": params[:3]}, {"params": params[3:], **other}], **options)
        for muon, params in ((Muon, ours), (torch.optim.Muon, theirs))
    )
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for ours_now, theirs_now in zip(ours, theirs, strict=True):
        assert torch.equal(ours_now, theirs_now)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_the_matrices_of_a_stack_move_one_by_one(shape: tuple[int, int]) -> None:
    """Their gradients differ in size, which must not matter to the others."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(3, *shape, generator=generator))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizer, reference = Muon([stack]), torch.optim.Muon(alone, lr=0.02, weight_decay=0.1)
    for _ in range(3):
        sizes = torch.tensor([1.0, 1e-3, 1e3]).view(3, 1, 1)
        stack.grad = torch.randn(stack.shape, generator=generator) * sizes
        for param, grad in zip(alone, stack.grad, strict=True):
            param.grad = grad
        optimizer.step()
        reference.step()
    assert optimizer.state[stack]["momentum_buffer"].shape == stack.shape
    torch.testing.assert_close(stack, torch.stack(list(alone)), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(16, 16), (40, 16), (16, 40)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix).float()
    values = (u.T @ result @ v.T).diagonal()
    assert values.min() > 0.5 and values.max() < 1.5, values
    assert s.max() / s.min() > 2  # they were not about equal before


def test_a_zero_gradient_gives_a_zero_update() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6)), torch.zeros(4, 6, dtype=torch.bfloat16))


def test_a_matrix_without_gradient_stays() -> None:
    params = matrices()
    before = [param.detach().clone() for param in params]
    optimizer = Muon(params)
    set_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    stayed = [torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert stayed == [False, True, False, False, False]
    assert len(optimizer.state) == len(params)  # so that a checkpoint has the same keys each time
    mean = optimizer.state[params[2]]["momentum_buffer"]
    mean_before, params[2].grad = mean.clone(), None
    optimizer.step()
    assert torch.equal(mean, mean_before)


def test_a_closure_computes_the_gradients_and_the_loss() -> None:
    params = matrices()
    optimizer, moved = Muon(params), params[0].detach().clone()

    def closure() -> torch.Tensor:
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and not torch.equal(params[0], moved)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 5)])
def test_only_matrices_are_accepted(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(shape))])


def test_a_step_compares_no_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP and tensor parallelism make an equal mesh for each parameter: a millisecond each."""
    with fake_world(4, 1):
        # DTensors of the same shape share what describes them, and so a mesh.
        params = [
            nn.Parameter(
                DTensor.from_local(
                    torch.ones(1, columns), init_device_mesh("cpu", (4,)), [Shard(0)]
                )
            )
            for columns in (2, 3)
        ]
        optimizer = Muon(params)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        compared: list[object] = []
        monkeypatch.setattr(DeviceMesh, "__eq__", lambda *meshes: compared.append(meshes))
        optimizer.step()
    assert not compared


class Sent:
    """Records the groups, and the numbers of ranks that this one sends to, of all exchanges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[list[int]] = []
        self.receivers: list[int] = []
        monkeypatch.setattr(dist, "all_to_all_single", self._send)

    def _send(
        self,
        output: torch.Tensor,
        values: torch.Tensor,
        received: list[int],
        sent: list[int],
        group: dist.ProcessGroup,
    ) -> None:
        assert (sum(received), sum(sent)) == (len(output), len(values))
        self.groups.append(dist.get_process_group_ranks(group))
        self.receivers.append(sum(size > 0 for size in sent))
        output.zero_()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def step_of(*params: DTensor) -> None:
    made = [nn.Parameter(param) for param in params]
    for param in made:
        param.grad = torch.ones_like(param)
    Muon(made).step()


def test_a_rank_talks_to_those_of_its_row_and_its_column(sent: Sent) -> None:
    """Of 1,024 ranks to 7 and to 127, and where ranks have copies, one gathers the parts."""
    with fake_world(1024, 0):
        mesh = init_device_mesh("cpu", (128, 8))
        placements = [_StridedShard(0, split_factor=8), Shard(0)]
        shape = {"shape": torch.Size((1024, 4)), "stride": (4, 1)}
        step_of(
            *(
                DTensor.from_local(torch.ones(1, 4), mesh, placements, run_check=False, **shape)
                for _ in range(256)
            )
        )
    over_hosts, within_host = list(range(0, 1024, 8)), list(range(8))
    assert sent.groups == [over_hosts, within_host, within_host, over_hosts]
    assert sent.receivers == [128, 2, 8, 128]  # two matrices for each of the 128


def test_of_copies_each_gathers_the_parts_of_other_matrices(sent: Sent) -> None:
    with fake_world(1024, 0):
        mesh = init_device_mesh("cpu", (8, 128))
        shape = {"shape": torch.Size((128, 4)), "stride": (4, 1)}
        placements = [Replicate(), Shard(0)]
        step_of(
            *(
                DTensor.from_local(torch.ones(1, 4), mesh, placements, run_check=False, **shape)
                for _ in range(256)
            )
        )
    assert sent.groups == [list(range(128))] * 2
    assert sent.receivers == [32, 128]


def test_replicas_share_the_matrices_of_all_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks of a single matrix, as of experts on many ranks, are not all for the same replica."""
    moved = []
    monkeypatch.setattr(muon, "orthogonalize", lambda stack: moved.append(stack.shape) or stack)
    with fake_world(4, 0):
        mesh = init_device_mesh("cpu", (4,))
        step_of(
            *(
                DTensor.from_local(torch.ones(1, 3, 5), mesh, [Replicate()], run_check=False)
                for _ in range(8)
            )
        )
    assert moved == [(1, 3, 5)] * 2


def test_many_matrices_on_thousands_of_ranks_take_little_memory(sent: Sent) -> None:
    with fake_world(4096, 5):
        mesh = init_device_mesh("cpu", (4096,))
        made = [DTensor.from_local(torch.zeros(1, 8), mesh, [Shard(0)]) for _ in range(50)]
        tracemalloc.start()
        try:
            step_of(*made)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert sent.receivers == [50, 4096]
    assert peak < 5e6  # of Python objects: one for each part would be 20 MB
