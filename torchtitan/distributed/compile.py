"""`torch.compile`, per block or whole."""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn as nn

from torchtitan.distributed.activation_checkpoint import is_checkpointed
from torchtitan.distributed.compiled_checkpoint import compile_inside
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.distributed.pipeline_split import splits_backward
from torchtitan.protocols.model import blocks_of

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

M = TypeVar("M", bound=nn.Module)

_GRAPHS_OF_A_FUNCTION = 8
"""As many as the compiler allows by default: for training and evaluation, and other shapes."""


def apply_compile(model: M, job_config: JobConfig) -> M:
    """Compile the model by `compile.scope`, when `compile.components` names it.

    Per block (the default; see `blocks_of`), those that are alike share one graph, which is
    compiled once, and parameter names stay as they are. Blocks that read other Python numbers, such
    as their own, are compiled one by one, which only takes longer. Over the whole model the result
    is `torch.compile`'s wrapper.

    A layer must be one graph, unless it has experts: where these are dispatched to other ranks,
    sharded apart from their block, or in float32, the graph is in two, before and after them. So it
    is around the router where the backward pass is in two. If such a block is checkpointed, what it
    recomputes is compiled, with either scope. Blocks of other stacks may be several graphs.
    """
    config = job_config.compile
    if not config.compiles("model"):
        return model
    if splits_backward(job_config):
        # The backward pass runs twice over one graph, so it may not overwrite what it reads.
        torch._functorch.config.donated_buffer = False
        for moe in moe_layers(model):  # that of a router counts tokens, and must do so once
            moe.router.forward = torch.compiler.disable(moe.router.forward)
    if job_config.training.mixed_precision_param == "float32":
        for moe in moe_layers(model):  # the compiler knows grouped_mm in bfloat16 alone
            moe.experts.forward = torch.compiler.disable(moe.experts.forward)
    # Other backends than inductor take no mode, not even the default.
    mode = None if config.mode == "default" else config.mode
    options: dict[str, Any] = {"backend": config.backend, "mode": mode}
    split, blocks = _splits_blocks(job_config), blocks_of(model)
    if config.scope == "block":
        options |= _as_many_graphs_as(len(blocks))
    for name, layer in blocks.items():
        experts = moe_layers(layer)
        if experts and split and is_checkpointed(layer):
            _compile_checkpointed(layer, job_config, options)
        elif config.scope == "block":
            fullgraph = name.startswith("layers.") and not experts
            layer.forward = torch.compile(layer.forward, fullgraph=fullgraph, **options)
    return cast(M, torch.compile(model, **options)) if config.scope == "model" else model


def _as_many_graphs_as(blocks: int) -> dict[str, int]:
    """Options of `torch.compile` by which each block may have as many graphs as one function may.

    All blocks are one function for the compiler. A Python number that differs between them, such as
    a scale by the layer's number, makes each a graph of its own: more than it allows one function.
    """
    limit = _GRAPHS_OF_A_FUNCTION * blocks
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": limit}
    config = torch._dynamo.config  # torch 2.11 has a limit for all functions alone
    config.recompile_limit = max(config.recompile_limit, limit)
    return {}


def _splits_blocks(job_config: JobConfig) -> bool:
    """Whether experts or their router are no part of their block's graph."""
    config = job_config.parallelism
    dispatched_or_apart = max(config.expert_parallel_degree, config.tensor_parallel_degree) > 1
    in_float32 = job_config.training.mixed_precision_param == "float32"
    return dispatched_or_apart or in_float32 or splits_backward(job_config)


def _compile_checkpointed(layer: nn.Module, job_config: JobConfig, options: dict[str, Any]) -> None:
    # Imported here because the package of models imports this one.
    from torchtitan.models.common.attention import ScaledDotProductAttention

    # What is dear to compute, and has kernels of its own, which gain little by being compiled.
    eager: list[nn.Module] = [moe.experts for moe in moe_layers(layer)]
    eager += [m for m in layer.modules() if isinstance(m, ScaledDotProductAttention)]
    # What the policy keeps serves one backward pass.
    compile_inside(
        layer, partial(torch.compile, **options), eager, keeps=not splits_backward(job_config)
    )


def begin_forward_pass(job_config: JobConfig) -> None:
    """Before each forward pass: what the one before has left may be overwritten by CUDA graphs.

    Without it, each compiled block of a pass without gradients would count as a pass of its own.
    """
    config = job_config.compile
    if config.enable and config.mode in ("reduce-overhead", "max-autotune"):
        torch.compiler.cudagraph_mark_step_begin()
