"""`torch.compile`, per block or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from torchtitan.distributed.pipeline_split import splits_backward

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


def apply_compile(model: nn.Module, job_config: JobConfig) -> nn.Module:
    """Compile the model by `compile.scope`, when `compile.components` names it.

    Per block (the default), the blocks share one graph, which is compiled once, and parameter names
    stay as they are. Over the whole model the result is `torch.compile`'s wrapper.
    """
    config = job_config.compile
    if not config.enable or "model" not in config.components:
        return model
    if splits_backward(job_config):
        # The backward pass runs twice over one graph, so it may not overwrite what it reads.
        torch._functorch.config.donated_buffer = False
    if config.scope == "model":
        return torch.compile(model, backend=config.backend)
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=config.backend, fullgraph=True)
    return model
