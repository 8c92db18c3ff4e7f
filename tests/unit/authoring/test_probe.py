"""Layers are examined alone, also one in two places, and one whose sums cancel out."""

from __future__ import annotations

import pytest
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


class Decaying(nn.Module):
    """Linear attention with a decay: the sums over both documents differ by that of the second."""

    def __init__(self, leak: float = 0.0) -> None:
        super().__init__()
        self.decay, self.value = nn.Linear(16, 1), nn.Linear(16, 16)
        self.leak = leak

    def forward(self, x: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
        total = -self.decay(x).exp().cumsum(1)  # [batch, seq, 1]
        mask = document_ids[:, :, None] == document_ids[:, None, :]
        weights = (total - total.mT).tril().exp() * (mask + self.leak * ~mask).tril()
        return x + weights @ self.value(x)


class Documents(Model):
    def __init__(self, leak: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 16)
        self.layers = nn.ModuleDict({"0": Decaying(leak)})

    def forward(self, tokens: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
        return self.layers["0"](self.embedding(tokens), document_ids)


@pytest.mark.parametrize("leak", [0.0, 1e-3])
def test_what_rounding_leaves_of_sums_that_cancel_is_no_path(leak: float) -> None:
    torch.manual_seed(0)
    document_ids = (torch.arange(64) >= 21).long()[None]
    (cut,) = cut_layers(Documents(leak), torch.arange(64)[None], document_ids=document_ids)
    seen = cut.gradient((slice(None), slice(21, None)))[0]
    assert bool((seen[:21] > 0).any()) == (leak > 0)
    assert (seen[21:] > 0).all()
