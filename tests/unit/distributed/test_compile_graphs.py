"""Blocks that share no graph are compiled one by one, and what cannot be a graph is explained."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch._inductor import exc

from torchtitan.config import JobConfig
from torchtitan.distributed.compile import apply_compile, compiled_pass
from torchtitan.errors import ConfigError

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


class Counting(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.number += 1
        return super().forward(x)


class Choosing(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


@pytest.mark.parametrize("block", [Counting, Choosing])
def test_a_layer_that_is_not_one_graph_is_explained(limits, block):
    job_config = JobConfig()
    job_config.compile.enable, job_config.compile.backend = True, "eager"
    model = Model()
    model.layers = nn.ModuleDict({"0": block(0)})
    apply_compile(model, job_config)
    message = r"compile.enable = true: a layer must be one graph.*@torch.compiler.disable"
    with pytest.raises(ConfigError, match=message), compiled_pass(job_config):
        for _ in range(9):
            model(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("output", "folder", "message"),
    [
        (None, "/venv/torch", "needs a C\\+\\+ compiler: install"),
        ("fatal error: Python.h: No such file", "/venv/torch", "needs the header files of Python"),
        ("ld: cannot find -ltorch", "/my venv/torch", "a space in its path: /my venv/torch"),
        ("a bug", "/venv/torch", None),
    ],
)
def test_what_the_compiler_needs_on_a_cpu_is_explained(output, folder, message, monkeypatch):
    monkeypatch.setattr(torch, "__file__", f"{folder}/__init__.py")
    missing = exc.InvalidCxxCompiler.__new__(exc.InvalidCxxCompiler)  # takes an argument since 2.12
    error = exc.InductorError(exc.CppCompileError(["g++"], output) if output else missing, None)
    job_config = JobConfig()
    job_config.compile.enable = True
    expected = ConfigError if message else exc.InductorError
    with pytest.raises(expected, match=message), compiled_pass(job_config):
        raise error


def test_other_errors_stay_as_they_are():
    job_config = JobConfig()
    job_config.compile.enable = True
    with pytest.raises(ZeroDivisionError), compiled_pass(job_config):
        _ = 1 / 0
