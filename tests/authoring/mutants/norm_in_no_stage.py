"""The pipeline does not know of a norm between the embedding and the layers."""

from __future__ import annotations

import torch.nn as nn
from mutants import base

CAUGHT_BY = ("stages.numbers",)
SAYS = r"no pipeline is possible: .*'embed_norm\.weight', which is in no layer and not named"


class Model(base.Model):
    def __init__(self, args: base.Args) -> None:
        super().__init__(args)
        self.embed_norm = nn.RMSNorm(args.dim)

    def init_weights(self) -> None:
        super().init_weights()
        if self.embed_norm is not None:
            self.embed_norm.reset_parameters()


base.register(__name__, model_cls=Model)
