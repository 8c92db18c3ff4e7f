"""A norm of its own whose backward pass leaves out every other token, but in bfloat16 alone."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("numerics.bf16_gradients",)
SAYS = r"parameters and arguments.*the gradient of layers\.\d\.\w+_norm\.weight differs"


def of_weight(grad, normed):
    step = 2 if grad.dtype == torch.bfloat16 else 1
    return (grad * normed).flatten(0, -2)[::step].sum(0)


base.register(__name__, model_cls=base.with_layers(norm=base.norm_with_gradient(of_weight)))
