"""A right model of one number a sample, which is nearly 0 for the first: bfloat16 changes it."""

from __future__ import annotations

from dataclasses import replace

import tiny_diffusion
import torch
import torch.nn as nn

from torchtitan.protocols import BaseModelArgs, ModelProtocol, TrainSpec, register_train_spec


class Sum(ModelProtocol):
    sees_later_tokens = True

    def __init__(self, args: BaseModelArgs) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(2, 1, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers["0"](x)

    def init_weights(self) -> None:
        nn.init.ones_(self.layers["0"].weight)


class Pairs(tiny_diffusion.Rows):
    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        pair = torch.tensor([[1.0, 1.0 if row else -1.0]])
        return {"tokens": pair, "labels": torch.zeros(1, 1)}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(
        tiny_diffusion.get_train_spec("tiny"),
        model_cls=Sum,
        model_args=BaseModelArgs(),
        build_dataloader_fn=lambda config, tokenizer, *ranks: Pairs(config, *ranks),
    )


register_train_spec("cancelling_row", get_train_spec)
