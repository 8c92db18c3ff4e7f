"""A layer in two places of `layers` is examined like any other."""

from __future__ import annotations

import torch
import torch.nn as nn

from torchtitan.authoring.verify.probe import cut_layers


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleDict({"0": nn.Linear(4, 4), "1": nn.Linear(4, 4)})
        self.layers["2"] = self.layers["0"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embedding(tokens)
        for layer in self.layers.values():
            h = layer(h)
        return h


def test_a_shared_layer_is_cut_once_a_call() -> None:
    torch.manual_seed(0)
    model = Model()
    cuts = cut_layers(model, torch.arange(8)[None])
    assert [cut.name for cut in cuts] == ["layers.0", "layers.1", "layers.0"]
    for cut in cuts:
        assert torch.equal(cut.output, cut.module(cut.input))
