"""The load of experts, summed up and reported."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from checkpoint_run import world_of_one  # noqa: F401

from torchtitan.components.moe_balance import ExpertBalance, force_balance, leave_out_unreached
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.router import TopKRouter


@pytest.fixture
def model() -> nn.Module:
    args = MoEArgs(num_experts=4, top_k=1, use_bias=True, bias_update_rate=0.5)
    return nn.ModuleList([TopKRouter(8, args) for _ in range(3)])


def test_layers_without_a_token_are_left_out_of_the_imbalance(model: nn.Module) -> None:
    """No backward pass comes to frozen layers at the bottom, which is where tokens are counted."""
    balance = ExpertBalance([model], ParallelDims(world_size=1))
    model[1].tally.copy_(torch.tensor([4.0, 0, 0, 0]))
    model[2].tally.copy_(torch.tensor([2.0, 2, 0, 0]))
    balance.add_up(lambda load: load)
    balance.step()
    assert balance.metrics() == {"expert_imbalance": 3, "expert_imbalance_max": 4}


@pytest.mark.parametrize("trained", [0, 1, 2, 3, 5])
def test_frozen_layers_at_the_bottom_of_a_pipeline_count_as_in_one_process(
    model: nn.Module, trained: int
) -> None:
    """A stage sends back gradients from all its layers; `trained`: the first trained one."""
    layers = nn.ModuleList()
    for router in model:
        layers += [nn.Linear(8, 8), router]
    layers.requires_grad_(False)
    layers[trained:].requires_grad_()
    x = torch.randn(5, 8)

    def count(hidden: torch.Tensor) -> list[int]:
        for router in model:
            router.tally.zero_()
        for linear, router in zip(layers[::2], model, strict=True):
            hidden = linear(hidden)
            weights, _, _ = router(hidden)
            hidden = hidden * weights
        hidden.sum().backward()
        return [number for number, router in enumerate(model) if router.tally.any()]

    in_one_process = count(x)
    assert count(x.clone().requires_grad_()) == [0, 1, 2]
    leave_out_unreached(layers)
    assert count(x.clone().requires_grad_()) == count(x) == in_one_process


def test_replica_groups_balance_by_the_load_of_all(model: nn.Module) -> None:
    balance = ExpertBalance([model], ParallelDims(world_size=1))
    model[0].tally.copy_(torch.tensor([4.0, 0, 0, 0]))
    others = torch.tensor([0.0, 8, 4, 0] + [1.0] * 8)
    balance.add_up(lambda load: load + others)
    balance.step()
    assert model[0].load.tolist() == [4, 8, 4, 0] and not model[0].tally.any()
    assert model[0].selection_bias.tolist() == [0, -0.5, 0, 0.5]


def test_the_tokens_of_a_step_that_was_not_taken_are_forgotten(model: nn.Module) -> None:
    balance = ExpertBalance([model], ParallelDims(world_size=1))
    model[0].tally.fill_(3)
    balance.add_up(lambda load: load)
    balance.discard()
    assert not model[0].tally.any() and not model[0].load.any()
    assert balance.metrics() == {}  # 0 would be no ratio of loads


def test_a_pipeline_stage_without_experts_takes_part_in_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the other stages, of which one has experts here, would wait for it."""
    dims = ParallelDims(world_size=1)
    assert dims.world_mesh
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: tensor.add_(2))
    balance = ExpertBalance([nn.Linear(8, 8)], dims)
    losses = {"router_aux_loss": 1, "router_z_loss": 1}
    assert balance.metrics() == {"expert_imbalance": 1, "expert_imbalance_max": 2, **losses}


def test_losses_are_means_over_the_layers_that_have_them_without_their_weights() -> None:
    weights = ({"aux_loss_weight": 0.5}, {"z_loss_weight": 0.1}, {"z_loss_weight": 0.01}, {})
    layers = [TopKRouter(8, MoEArgs(num_experts=4, **changes)) for changes in weights]
    balance = ExpertBalance([nn.ModuleList(layers)], ParallelDims(world_size=1))
    for router in layers:
        router.tally += torch.tensor([4.0, 0, 2, 2])
    shares = torch.tensor([[1.0, 0], [0, 0.2], [0, 0.01]])
    for router, share in zip(layers[:-1], shares, strict=True):
        router.loss_tally += share
    balance.add_up(lambda sums: 2 * sums)  # another replica group like this one
    balance.step()
    assert [router.load.tolist() for router in layers] == [[8, 0, 4, 4]] * 4
    metrics = balance.metrics()
    assert metrics["router_aux_loss"] == 4 and metrics["expert_imbalance_max"] == 2
    assert metrics["router_z_loss"] == pytest.approx((4 + 2) / 2)
    layers[0].loss_tally += 1
    balance.add_up(lambda sums: sums)
    balance.discard()
    assert not layers[0].loss_tally.any() and balance.metrics() == metrics


def test_experts_take_turns_if_the_config_says_so(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    config, dims = JobConfig(), ParallelDims(world_size=1)
    force_balance(model, config, dims)
    force_balance(nn.Linear(8, 8), config, dims)
    assert not any(router.places for router in model)
    config.debug.moe_force_load_balance = True
    force_balance(model, config, dims)
    assert all(router.places(3).tolist() == [0, 1, 2] for router in model)
    assert "moe_force_load_balance = true: tokens do not go to the experts" in caplog.text
    with pytest.raises(ConfigError, match=r"moe_force_load_balance = true: .* has no experts"):
        force_balance(nn.Linear(8, 8), config, dims)
