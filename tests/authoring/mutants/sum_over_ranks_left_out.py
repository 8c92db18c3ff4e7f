"""A rank takes its part of what attention puts out without adding the other ranks' results."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with, with_plan
from torch.distributed.tensor.parallel import RowwiseParallel

CAUGHT_BY = ("layouts.tp2",)
SAYS = r"first module whose output differs is layers\.0\.attention\.wo.*RowwiseParallel"


class NotSummed(RowwiseParallel):
    @staticmethod
    def _prepare_output_fn(output_layouts, use_local_output, module, outputs, mesh):
        return outputs.to_local().chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


apply_tp = with_plan(attention__wo=NotSummed())

base.register(__name__, parallelize_fn=parallelize_with(apply_tp=apply_tp))
