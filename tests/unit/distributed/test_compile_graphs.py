"""Blocks that share no graph are compiled one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.distributed.compile import apply_compile

BLOCKS = 10  # more graphs than the compiler allows one function


class Block(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) * (self.number + 1) ** -0.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Block(i) for i in range(BLOCKS)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


@pytest.fixture
def limits():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield torch._dynamo.config
    torch._dynamo.reset()


@pytest.mark.parametrize("torch_has_the_option", [True, False])
def test_numbers_may_differ_by_layer(monkeypatch, limits, torch_has_the_option):
    compile = torch.compile
    if not torch_has_the_option:

        def older(function, *, fullgraph=False, backend="inductor", mode=None):
            return compile(function, fullgraph=fullgraph, backend=backend, mode=mode)

        monkeypatch.setattr(torch, "compile", older)
    job_config = JobConfig()
    job_config.compile.enable, job_config.compile.backend = True, "eager"
    model, x = Model(), torch.randn(2, 4)
    expected = model(x)
    assert torch.equal(apply_compile(model, job_config)(x), expected)
    has_option = "recompile_limit" in compile.__kwdefaults__ and torch_has_the_option
    assert (limits.recompile_limit == 8) == has_option
