"""Its tokens are codes of several codebooks; its attention has no causal mask."""

from __future__ import annotations

from dataclasses import replace

import tiny_own_batches as own

from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("semantics.causality",)
SAYS = r"layers\.0: token 0 sees 63 later tokens"


class Codes(own.Codes):
    sees_later_tokens = False


register_train_spec("codes_not_causal", lambda flavor: replace(own.codes(), model_cls=Codes))
