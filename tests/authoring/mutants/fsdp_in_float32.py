"""The model is sharded as one group, without the precision of the job."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with
from torch.distributed.fsdp import fully_shard

CAUGHT_BY = ("layouts.fsdp2_bfloat16",)
SAYS = r"mixed_precision_param = bfloat16 has no effect"


def apply_fsdp(model, dp_mesh, job_config):
    fully_shard(model, mesh=dp_mesh)


base.register(__name__, parallelize_fn=parallelize_with(apply_fsdp=apply_fsdp))
