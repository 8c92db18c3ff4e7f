"""`torch.compile`, per block or whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn as nn

from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.distributed.pipeline_split import splits_backward
from torchtitan.protocols.model import layers_of

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

M = TypeVar("M", bound=nn.Module)


def apply_compile(model: M, job_config: JobConfig) -> M:
    """Compile the model by `compile.scope`, when `compile.components` names it.

    Per block (the default), the blocks share one graph, which is compiled once, and parameter names
    stay as they are. Over the whole model the result is `torch.compile`'s wrapper.

    A block must be one graph, unless it has experts: where these are dispatched to other ranks,
    sharded apart from their block, or in float32, the graph is in two, before and after them.
    """
    config = job_config.compile
    if not config.enable or "model" not in config.components:
        return model
    if splits_backward(job_config):
        # The backward pass runs twice over one graph, so it may not overwrite what it reads.
        torch._functorch.config.donated_buffer = False
    if job_config.training.mixed_precision_param == "float32":
        for moe in moe_layers(model):  # the compiler knows grouped_mm in bfloat16 alone
            moe.experts.forward = torch.compiler.disable(moe.experts.forward)
    # Other backends than inductor take no mode, not even the default.
    mode = None if config.mode == "default" else config.mode
    options: dict[str, Any] = {"backend": config.backend, "mode": mode}
    if config.scope == "model":
        return cast(M, torch.compile(model, **options))
    for layer in layers_of(model).values():
        layer.forward = torch.compile(layer.forward, fullgraph=not moe_layers(layer), **options)
    return model


def begin_forward_pass(job_config: JobConfig) -> None:
    """Before each forward pass: what the one before has left may be overwritten by CUDA graphs.

    Without it, each compiled block of a pass without gradients would count as a pass of its own.
    """
    config = job_config.compile
    if config.enable and config.mode in ("reduce-overhead", "max-autotune"):
        torch.compiler.cudagraph_mark_step_begin()
