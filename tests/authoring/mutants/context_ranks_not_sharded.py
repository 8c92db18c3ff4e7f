"""FSDP is applied for data ranks only, so context ranks do not add up their gradients."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("layouts.cp2",)
SAYS = r"the last parameter whose gradient differs is output\.weight.*under context parallelism too"


def parallelize(model, world_mesh, parallel_dims, job_config):
    if parallel_dims.cp_enabled:
        base.apply_cp(model, world_mesh["cp"], job_config)
    base.apply_ac(model, job_config)
    if parallel_dims.dp > 1:
        base.apply_fsdp(model, world_mesh["dp"], job_config)
    return model


base.register(__name__, parallelize_fn=parallelize)
