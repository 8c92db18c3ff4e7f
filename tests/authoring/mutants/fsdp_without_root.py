"""Blocks are sharded, but not what is around them, whose gradients are then not added up."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with
from torch.distributed.fsdp import fully_shard

CAUGHT_BY = (
    "layouts.fsdp2",
    "layouts.cp2",
)
SAYS = r"gradient differs is output\.weight.*fully_shard must be called for the whole model"


def apply_fsdp(model, dp_mesh, job_config):
    for layer in model.layers.values():
        fully_shard(layer, mesh=dp_mesh._get_root_mesh()["dp_shard_cp"])


base.register(__name__, parallelize_fn=parallelize_with(apply_fsdp=apply_fsdp))
