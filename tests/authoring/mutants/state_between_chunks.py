"""A state crosses the documents at the border of two chunks, where row 0 has no border."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in row 2 of a batch, the last document sees \d+ tokens.*A recurrence must begin"


class Block(base.Block):
    def forward(self, x, positions, mask):
        out = super().forward(x, positions, mask)
        carried = out.new_zeros(out.shape)
        carried[:, 32:33] = x[:, 31:32]
        return out + carried


base.register(__name__, model_cls=base.with_layers(block=Block))
