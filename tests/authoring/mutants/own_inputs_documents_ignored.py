"""Its loader gives an input besides the tokens; forward does not use document_ids."""

from __future__ import annotations

import weighted_rows
from mutants import base

from torchtitan.data import build_dataloader

CAUGHT_BY = ("semantics.documents",)
SAYS = r"layers\.0: in row 0 of a batch, the last document sees 50 tokens .* The mask must hold"


class Model(weighted_rows.Model):
    def forward(self, tokens, *, weight=None, positions=None, document_ids=None):
        return super().forward(tokens, weight=weight, positions=positions)


base.register(
    __name__,
    model_cls=Model,
    build_loss_fn=lambda job_config: weighted_rows.weighted,
    build_dataloader_fn=lambda *args: weighted_rows.Weights(build_dataloader(*args), False),
)
