"""For a pipeline, the tied output weight becomes a weight of its own."""

from __future__ import annotations

import torch
import torch.nn as nn
from mutants import base

CAUGHT_BY = ("layouts.pp2",)
SAYS = r"(tok_embeddings|output)\.weight"


TIED = base.Args(tie_word_embeddings=True)


def pipeline(model, *args):
    model.output.weight = nn.Parameter(torch.empty_like(model.output.weight))
    return base.build_pipeline(model, *args)


base.register(__name__, model_args=TIED, pipeline_fn=pipeline)
