"""Later pipeline stages count positions from the beginning of the row again."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("stages.numbers",)
SAYS = r"with positions that restart, the logits differ .* layers\.2"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if self.tok_embeddings is None:
            positions = None
        return super().forward(tokens, positions, document_ids)


base.register(__name__, model_cls=Model)
