"""Its loader gives an input besides the tokens; its attention has no causal mask."""

from __future__ import annotations

import weighted_rows
from mutants import base, missing_causal_mask

from torchtitan.data import build_dataloader

CAUGHT_BY = ("semantics.causality",)
SAYS = r"layers\.0: token 0 sees 63 later tokens"

base.register(
    __name__,
    model_cls=base.with_layers(missing_causal_mask.Attention, model=weighted_rows.Model),
    build_loss_fn=lambda job_config: weighted_rows.weighted,
    build_dataloader_fn=lambda *args: weighted_rows.Weights(build_dataloader(*args), False),
)
