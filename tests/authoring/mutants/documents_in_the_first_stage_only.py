"""Later pipeline stages do not know where documents end."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("stages.numbers", "layouts.pp2_documents")
SAYS = r"with packed documents, the logits differ .* layers\.2"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if self.tok_embeddings is None:
            document_ids = None
        return super().forward(tokens, positions, document_ids)


base.register(__name__, model_cls=Model)
