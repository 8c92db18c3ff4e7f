"""`w2` reads the features that `w1` splits, but the ranks' parts of its sum are not added up."""

from __future__ import annotations

from dataclasses import replace

import tiny_own_batches as own
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("layouts.tp2",)
SAYS = r"the first module whose output differs is layers\.0\.w2.*tensor-parallel plan"


class Unsummed(RowwiseParallel):
    @staticmethod
    def _prepare_output_fn(output_layouts, use_local_output, mod, outputs, device_mesh):
        return outputs.to_local() * device_mesh.size()


def parallelize(model, world_mesh, parallel_dims, job_config):
    plan = {"w1": ColwiseParallel(), "w2": Unsummed()}
    for layer in model.layers.values() if parallel_dims.tp_enabled else ():
        parallelize_module(layer, world_mesh["tp"], plan)
    return model


register_train_spec(
    "codes_sum_left_out", lambda flavor: replace(own.codes(), parallelize_fn=parallelize)
)
