"""The pipeline gives the last stage the embedding too, so two stages have it."""

from __future__ import annotations

import copy

from mutants import base

CAUGHT_BY = ("stages.numbers",)
SAYS = r"no stage alone has tok_embeddings\.weight"


def pipeline(model, *args):
    embedding = copy.deepcopy(model.tok_embeddings)
    built = base.build_pipeline(model, *args)
    for part in built.model_parts:
        if part.output is not None:
            part.tok_embeddings = embedding
    return built


base.register(__name__, pipeline_fn=pipeline)
