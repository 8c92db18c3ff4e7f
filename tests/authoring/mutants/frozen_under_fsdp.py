"""Where the model is sharded, the final norm's weight is used as a constant."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from mutants import base
from mutants.parallel import parallelize_with

CAUGHT_BY = ("layouts.fsdp2",)
SAYS = r"gradient differs is norm\.weight: it is 0 "


def apply_fsdp(model, dp_mesh, job_config):
    base.apply_fsdp(model, dp_mesh, job_config)
    if model.norm is not None:
        model.norm.forward = partial(constant_norm, model.norm)


def constant_norm(norm, x):
    return F.rms_norm(x, norm.normalized_shape, norm.weight.detach(), norm.eps)


base.register(__name__, parallelize_fn=parallelize_with(apply_fsdp=apply_fsdp))
