"""The pipeline gives the last stage the embedding too, so two stages have it."""

from __future__ import annotations

import copy

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("stages.numbers",)
SAYS = r"no stage alone has tok_embeddings\.weight"


def pipeline(model, *args):
    embedding = copy.deepcopy(model.tok_embeddings)
    built = base.build_pipeline(model, *args)
    for part in built.model_parts:
        if part.output is not None:
            part.tok_embeddings = embedding
    return built


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, pipeline_fn=pipeline)


register_train_spec("layer_in_two_stages", get_train_spec)
