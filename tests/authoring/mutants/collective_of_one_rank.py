"""One rank waits for another that does not know of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from mutants import base

CAUGHT_BY = ("layouts.fsdp2",)
SAYS = r"rank 0 in recv \(.*collective_of_one_rank\.py:\d+ in forward\); rank 1 in "
CRASHES = True


class Model(base.Model):
    def forward(self, tokens, positions=None, document_ids=None):
        if dist.get_world_size() > 1 and dist.get_rank() == 0:
            dist.recv(torch.zeros(1), src=1)
        return super().forward(tokens, positions, document_ids)


base.register(__name__, model_cls=Model)
