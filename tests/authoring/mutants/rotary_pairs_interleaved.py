"""The model turns the features 2i and 2i + 1, and the adapter does not permute queries and keys."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is the first layer .*the input of layers\.0\.attention\.wo.*2i and 2i \+ 1"
HF_CONFIG = base.hf_config()


class Attention(base.Attention):
    def rotate(self, x, positions):
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = super().rotate(halves, positions)
        return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


base.register(__name__, model_cls=base.with_layers(attention=Attention))
