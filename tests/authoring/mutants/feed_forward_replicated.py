"""Right, but the feed-forward layers are left whole on each tensor rank. A note says so."""

from __future__ import annotations

from mutants import base
from mutants.parallel import parallelize_with, with_plan
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleInputOutput

apply_tp = with_plan(
    feed_forward=PrepareModuleInputOutput(
        input_layouts=(Shard(1),),
        desired_input_layouts=(Replicate(),),
        use_local_input=True,
        output_layouts=(Replicate(),),
        desired_output_layouts=(Shard(1),),
    ),
    feed_forward__w1=None,
    feed_forward__w2=None,
    feed_forward__w3=None,
)

base.register(__name__, parallelize_fn=parallelize_with(apply_tp=apply_tp))
