"""Hidden states are detached before the output layer, and that does not learn either."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("learning.one_batch", "learning.gradients")
SAYS = r"the loss fell only from \d\.\d+ to \d\.\d+"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        logits = super().forward(tokens, positions, document_ids)
        return logits.detach() + 0 * logits


base.register(__name__, model_cls=Model)
