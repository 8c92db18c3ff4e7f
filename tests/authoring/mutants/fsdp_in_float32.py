"""The model is sharded as one group, without the precision of the job."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with
from torch.distributed.fsdp import fully_shard

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("layouts.fsdp2_bfloat16",)
SAYS = r"mixed_precision_param = bfloat16 has no effect"


def get_train_spec(flavor: str) -> TrainSpec:
    def apply_fsdp(model, dp_mesh, job_config):
        fully_shard(model, mesh=dp_mesh)

    return base.get_train_spec(flavor, parallelize_fn=parallelize_with(apply_fsdp=apply_fsdp))


register_train_spec("fsdp_in_float32", get_train_spec)
