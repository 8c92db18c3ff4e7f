"""init_weights wants all layers to be there, which a pipeline stage does not have."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("contract.recursive",)
SAYS = r"fails for the model with layers\.0 alone: KeyError"


class Model(base.Model):
    def init_weights(self) -> None:
        for number in range(self.args.n_layers):
            self.layers[str(number)].attention.wq.reset_parameters()
        super().init_weights()


base.register(__name__, model_cls=Model)
