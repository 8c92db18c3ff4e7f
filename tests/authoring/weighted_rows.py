"""Right models whose loader gives an input besides the tokens, by which their loss weighs:
`weighted_rows`, each row by one number; `weighted_tokens`, each token by its own, which
`divided_weights` also says to context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mutants import base

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.data import build_dataloader
from torchtitan.distributed.pipeline_parallel import build_pipeline


class Model(base.Model):
    def forward(self, tokens, *, weight=None, positions=None, document_ids=None):
        h = super().forward(tokens, positions, document_ids)
        return (h, weight) if self.training and self.output is not None else h


class Dividing(Model):
    sequence_inputs = ("weight",)


def weighted(pred: Any, labels: torch.Tensor) -> torch.Tensor:
    logits, weight = pred if isinstance(pred, tuple) else (pred, labels.new_ones(len(labels)))
    logits = getattr(logits, "full_tensor", lambda: logits)()
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return (losses.view_as(labels) * weight.view(len(labels), -1)).sum()


class Weights:
    def __init__(self, loader: Any, each_token: bool) -> None:
        self.loader, self.each_token = loader, each_token

    def __next__(self) -> dict[str, torch.Tensor]:
        batch = next(self.loader)
        weight = batch["tokens"] % 3 if self.each_token else batch["tokens"].sum(1) % 3
        return {"tokens": batch["tokens"], "labels": batch["labels"], "weight": weight + 1}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def register(name: str, each_token: bool, model_cls: type[Model] = Model) -> None:
    base.register(
        name,
        model_cls=model_cls,
        pipeline_fn=build_pipeline,
        state_dict_adapter=None,
        build_loss_fn=lambda job_config: weighted,
        build_dataloader_fn=lambda *args: Weights(build_dataloader(*args), each_token),
    )


register("weighted_rows", each_token=False)
register("weighted_tokens", each_token=True)
register("divided_weights", each_token=True, model_cls=Dividing)
