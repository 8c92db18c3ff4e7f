"""Each rank of tensor parallelism adds the bias of a matrix whose results are summed."""

from __future__ import annotations

import torch.nn as nn
from mutants import base
from mutants.parallel import parallelize_with, with_plan
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import RowwiseParallel

CAUGHT_BY = ("layouts.tp2",)
SAYS = r"first module whose output differs is layers\.0\.feed_forward\.w2.*a bias that each"


class FeedForward(base.FeedForward):
    def __init__(self, args):
        super().__init__(args)
        self.w2 = nn.Linear(args.ffn_dim, args.dim)


class Block(base.Block):
    def init_weights(self):
        super().init_weights()
        nn.init.normal_(self.feed_forward.w2.bias, std=0.02)


class BiasOnEachRank(RowwiseParallel):
    @staticmethod
    def _prepare_output_fn(output_layouts, use_local_output, module, outputs, mesh):
        output = RowwiseParallel._prepare_output_fn(
            output_layouts, use_local_output, module, outputs, mesh
        )
        return output + (mesh.size() - 1) * module.bias.to_local()


apply_tp = with_plan(feed_forward__w2=BiasOnEachRank(output_layouts=Shard(1)))

base.register(
    __name__,
    model_cls=base.with_layers(feed_forward=FeedForward, block=Block),
    parallelize_fn=parallelize_with(apply_tp=apply_tp),
)
