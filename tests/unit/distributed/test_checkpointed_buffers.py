"""A block that changes its buffers does so once, also where its forward pass is recomputed."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac


class Block(nn.Module):
    """Its output depends on the buffers, which it then updates; the last operation is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean).sin()
        x = x * (1 + self.steps)
        if self.training:
            self.steps = self.steps + 1
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return self.linear(self.norm(x).exp())


def trained(mode: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Run two micro-batches forward, then both backward, as pipelines do."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": Block()})
    config = JobConfig()
    config.activation_checkpoint.mode = mode
    apply_ac(model, config)
    layer = model.layers["0"]
    losses = [layer(torch.randn(8, 4, requires_grad=True)).square().sum() for _ in range(2)]
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        layer.eval()(torch.randn(8, 4))
    return dict(layer.named_buffers()), [param.grad for param in layer.parameters()]


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_buffers_and_begins_with_those_of_the_forward_pass(mode):
    torch.testing.assert_close(trained(mode), trained("none"), rtol=0, atol=0)
