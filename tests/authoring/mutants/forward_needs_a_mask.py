"""forward has a second argument without a default."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("contract.signatures",)
SAYS = r"Model\.forward.* cannot be called .*missing a required argument: 'mask'"


class Model(base.Model):
    def forward(self, tokens, mask):
        return super().forward(tokens)


base.register(__name__, model_cls=Model)
