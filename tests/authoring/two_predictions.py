"""A right model that in training predicts two tokens, by a loss of its own, and in evaluation one.

As with multi-token prediction. `two_predictions` returns a tuple in training; pipelines and what
else sends one tensor get the same stacked, of `two_predictions_stacked`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from mutants import base

from torchtitan.components import build_loss
from torchtitan.components.loss import IGNORE_INDEX


@dataclass
class Args(base.Args):
    n_layers: int = 2

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        nparams, flops = super().get_nparams_and_flops(seq_len)
        more = self.vocab_size * self.dim
        return nparams + more, flops + 6 * more


class Model(base.Model):
    stacks = False

    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.second = nn.Linear(args.dim, args.vocab_size, bias=False)

    def forward(self, tokens, positions=None, document_ids=None):
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        mask = self.mask(positions.shape[1], document_ids, positions.device)
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h, positions, mask)
        h = self.norm(h)
        if not self.training:
            return self.output(h)
        logits = self.output(h), self.second(h)
        return torch.stack(logits, dim=2) if self.stacks else logits

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.second.weight, std=0.02)


class Stacked(Model):
    stacks = True


def build_loss_of_two(job_config):
    one = build_loss(job_config)

    def loss(pred, labels):
        if isinstance(pred, torch.Tensor) and pred.ndim == 3:
            return one(pred, labels)
        first, second = pred.unbind(2) if isinstance(pred, torch.Tensor) else pred
        after = labels.roll(-1, dims=1)
        after[:, -1] = IGNORE_INDEX
        also = 0.3 * one(second, after)
        return one(first, labels) + also - also.detach()  # what is reported is comparable

    return loss


for name, model_cls in {"two_predictions": Model, "two_predictions_stacked": Stacked}.items():
    base.register(
        name,
        model_cls=model_cls,
        model_args=Args(),
        build_loss_fn=build_loss_of_two,
        pipeline_fn=None,
        state_dict_adapter=None,
    )
