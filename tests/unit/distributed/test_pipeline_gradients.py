"""Gradients that a schedule computed apart are laid out as their weights, as optimizers expect."""

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchtitan.distributed.pipeline_parallel import _lay_out_gradients_like_weights
from torchtitan.runtime.fake_world import fake_world


def test_a_fused_optimizer_sees_the_same_numbers():
    """As expert biases of gpt-oss under ZBVZeroBubble, whose gradient is a column of a tensor."""
    columns = torch.arange(24.0).view(3, 8)
    for fused in (False, True):
        weight = nn.Parameter(torch.zeros(3))
        weight.grad = columns[:, 0]
        module = nn.Module()
        module.weight = weight
        _lay_out_gradients_like_weights(module)
        assert weight.grad.tolist() == [0.0, 8.0, 16.0] and weight.grad.is_contiguous()
        torch.optim.SGD([weight], lr=1.0, fused=fused).step()
        assert weight.tolist() == [0.0, -8.0, -16.0]


def test_gradients_that_fit_are_left_alone():
    module = nn.Linear(2, 3)
    module.weight.grad = torch.ones(3, 2)
    before = module.weight.grad
    _lay_out_gradients_like_weights(module)
    assert module.weight.grad is before and module.bias.grad is None


def test_a_split_gradient_of_a_whole_weight_becomes_whole():
    """As of LoRA's first factor beside a row-wise matrix, whose input is split by features."""
    module = nn.Linear(4, 3, bias=False)
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (2,))
        whole = DTensor.from_local(torch.zeros(3, 4), mesh, [Replicate()], run_check=False)
        module.weight = nn.Parameter(whole)
        module.weight.grad = DTensor.from_local(torch.ones(3, 2), mesh, [Shard(1)], run_check=False)
        _lay_out_gradients_like_weights(module)
        grad = module.weight.grad
    assert grad.placements == (Replicate(),)
    assert grad.to_local().shape == (3, 4) and grad.to_local().is_contiguous()
