"""Later pipeline stages count positions from the beginning of the row again."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("stages.numbers",)
SAYS = r"with positions that restart, the logits differ .* layers\.2"


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if self.tok_embeddings is None:
            positions = None
        return super().forward(tokens, positions, document_ids)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=Model)


register_train_spec("positions_in_the_first_stage_only", get_train_spec)
