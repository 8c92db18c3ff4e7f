"""Gradients that a schedule computed apart are laid out as their weights, as optimizers expect."""

import torch
import torch.nn as nn

from torchtitan.distributed.pipeline_parallel import _lay_out_gradients_like_weights


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
