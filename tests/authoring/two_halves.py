"""A right model that predicts the second half of its tokens alone, as encoder-decoders do."""

from __future__ import annotations

from typing import Any

import bidirectional
import torch
from mutants import base

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.data import build_dataloader


class Model(bidirectional.Model):
    def forward(self, tokens, positions=None):
        out = super().forward(tokens, positions)
        if self.output is None:
            return out
        half = out.shape[1] // 2
        return torch.cat([torch.zeros_like(out[:, :half]), out[:, half:]], dim=1)


class SecondHalves:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self.loader)
        labels = batch["labels"].clone()
        labels[:, : labels.shape[1] // 2] = IGNORE_INDEX
        return {"tokens": batch["tokens"], "labels": labels}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


base.register(
    __name__,
    model_cls=Model,
    state_dict_adapter=None,
    build_dataloader_fn=lambda *args: SecondHalves(build_dataloader(*args)),
)
