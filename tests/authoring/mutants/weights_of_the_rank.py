"""Initial weights depend on the rank."""

from __future__ import annotations

import torch.distributed as dist
from mutants import base

CAUGHT_BY = (
    "layouts.tp2",
    "layouts.fsdp2",
)
SAYS = r"the initial value of output\.weight differs"


class Model(base.Model):
    def init_weights(self):
        super().init_weights()
        if self.output is not None and dist.get_rank() == 1:
            self.output.weight.mul_(1.5)


base.register(__name__, model_cls=Model)
