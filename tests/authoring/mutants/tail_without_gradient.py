"""A norm of its own whose backward pass leaves out the last features, as a kernel's last block."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("learning.slope",)
SAYS = r"parameters have gradients that are not the slope .* layers\.3\.\w+_norm\.weight"


def of_weight(grad, normed):
    gradient = (grad * normed).flatten(0, -2).sum(0)
    gradient[-16:] = 0
    return gradient


base.register(__name__, model_cls=base.with_layers(norm=base.norm_with_gradient(of_weight)))
