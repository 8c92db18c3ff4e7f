"""A norm of its own whose backward pass leaves out the last features, as a kernel's last block."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("learning.slope",)
SAYS = r"parameters have gradients that are not the slope .* layers\.3\.\w+_norm\.weight"


class NormWithWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, normed, weight):
        ctx.save_for_backward(normed, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, grad):
        normed, weight = ctx.saved_tensors
        of_weight = (grad * normed).flatten(0, -2).sum(0)
        of_weight[-16:] = 0
        return grad * weight, of_weight


class Norm(nn.RMSNorm):
    def forward(self, x):
        return NormWithWeight.apply(F.rms_norm(x, self.normalized_shape, eps=self.eps), self.weight)


class Block(base.Block):
    def __init__(self, args):
        super().__init__(args)
        self.attention_norm = Norm(args.dim, eps=args.norm_eps)
        self.ffn_norm = Norm(args.dim, eps=args.norm_eps)


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_cls=base.with_layers(block=Block))


register_train_spec("tail_without_gradient", get_train_spec)
