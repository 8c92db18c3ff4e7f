"""A masked model whose hidden states also predict those of a teacher that follows it (EMA)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import tiny_own_batches as own
import torch
import torch.nn as nn

from torchtitan.components import OptimizersContainer
from torchtitan.components import build_optimizer as build_usual_optimizer
from torchtitan.protocols import TrainSpec, register_train_spec


class Following(own.Codes):
    estimates_gradients = True  # the teacher's input has none

    def __init__(self, args: own.CodesArgs) -> None:
        super().__init__(args)
        self.teacher_layers = copy.deepcopy(self.layers).requires_grad_(False)

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """Yield the teacher's parameters, each with the student's."""
        for name, layer in self.layers.items():
            teacher = self.teacher_layers[name].parameters()
            yield from zip(teacher, layer.parameters(), strict=True)

    def forward(self, tokens):
        hidden = taught = self.embeddings(tokens)
        for layer in self.layers.values():
            hidden = layer(hidden)
        if not self.training:
            return self.heads(hidden)
        with torch.no_grad():
            for layer in self.teacher_layers.values():
                taught = layer(taught)
        return self.heads(hidden), hidden, taught

    @torch.no_grad()
    def init_weights(self) -> None:
        super().init_weights()
        for teacher, student in self.pairs():
            teacher.copy_(student)


def build_optimizer(model_parts, job_config, parallel_dims) -> OptimizersContainer:
    optimizers = build_usual_optimizer(model_parts, job_config, parallel_dims)

    @torch.no_grad()
    def follow(*_: object) -> None:
        for teacher, student in model_parts[0].pairs():
            teacher.lerp_(student, 0.1)

    list(optimizers)[-1].register_step_post_hook(follow)
    return optimizers


def loss(pred, labels):
    if not isinstance(pred, tuple):
        return own.cross_entropy(pred, labels)
    logits, hidden, taught = pred
    return own.cross_entropy(logits, labels) + own.squared_error(hidden, taught)


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(
        own.codes(),
        model_cls=Following,
        pipeline_fn=None,
        build_optimizer_fn=build_optimizer,
        build_loss_fn=lambda job_config: loss,
    )


register_train_spec("following", get_train_spec)
