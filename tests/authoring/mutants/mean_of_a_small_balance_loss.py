"""As `mean_of_a_balance_loss`, with a weight that float32 would hide."""

from __future__ import annotations

from mutants import base
from mutants.mean_of_a_balance_loss import AddLoss

CAUGHT_BY = ("layouts.accumulation", "layouts.fsdp2")
SAYS = r"gradient differs is layers\..*must be a sum over tokens, not a mean"


class Block(base.Block):
    def forward(self, x, positions, mask):
        x = super().forward(x, positions, mask)
        return AddLoss.apply(x, 1e-6 * x.float().square().mean())


base.register(__name__, model_cls=base.with_layers(block=Block))
