"""A plan of code that needs more than fake tensors have is refused, and says whose code it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from torchtitan.components.optimizer import OPTIMIZERS, NamedParameter
from torchtitan.config import load_config
from torchtitan.errors import ConfigError
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.planning.trace import trace_step
from torchtitan.protocols.train_spec import MODEL_REGISTRY
from torchtitan.runtime.fake_world import fake_world

LIBRARY = torch.library.Library("without_shapes", "DEF")
LIBRARY.define("of_a_library(Tensor x) -> Tensor")
LIBRARY.impl("of_a_library", lambda x: 2 * x, "CPU")


@torch.library.custom_op("without_shapes::custom", mutates_args=())
def custom(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def by_value(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum().item() > 0 else x


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (by_value, "depends on the values of tensors"),
        (custom, "has an operator without register_fake.* <CustomOpDef.without_shapes::custom.>"),
        (
            torch.ops.without_shapes.of_a_library,
            "has an operator without register_fake.*of_a_library",
        ),
    ],
)
def test_code_of_a_model_is_refused_as_the_model_s(
    function: Callable[[torch.Tensor], torch.Tensor],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own(Llama3Model):
        def embed(self, tokens: torch.Tensor) -> torch.Tensor:
            return function(super().embed(tokens))

    spec = MODEL_REGISTRY["llama3"]("debugmodel")
    monkeypatch.setitem(MODEL_REGISTRY, "own", lambda flavor: replace(spec, model_cls=Own))
    config = load_config(["--model.name=own", "--training.seq_len=16"])
    message = rf'^model.name = "own": cannot be planned, since a step {problem}'
    with fake_world(1, rank=0), pytest.raises(ConfigError, match=message):
        trace_step(config)


def test_an_optimizer_that_looks_at_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class LooksAtValues(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            for param in self.param_groups[0]["params"]:
                by_value(param.grad)

    def build(params: list[NamedParameter], config: object) -> list[torch.optim.Optimizer]:
        return [LooksAtValues([p.param for p in params])]

    monkeypatch.setitem(OPTIMIZERS, "own", build)
    config = load_config(["--optimizer.name=own", "--training.seq_len=16"])
    message = '^optimizer.name = "own": cannot be planned, .* values of tensors .* with .AdamW.'
    with fake_world(4, rank=0), pytest.raises(ConfigError, match=message):
        trace_step(config)
