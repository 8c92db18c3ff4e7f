"""Apply `torch.compile` to each block or to the whole model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn

from torchtitan.config import JobConfig, fail
from torchtitan.distributed.activation_checkpoint import is_checkpointed, recomputes_all
from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.compiled_checkpoint import compile_inside
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.runtime.device import device_type

M = TypeVar("M", bound=nn.Module)

_GRAPHS_OF_A_FUNCTION = 8
"""The compiler's default limit: for training, evaluation and other shapes."""


def apply_compile(model: M, job_config: JobConfig) -> M:
    """Compile the model by `compile.scope`, if `compile.components` names it.

    With scope `block` (the default; see `blocks_of`), equal blocks share one graph, which is
    compiled once, and parameter names stay as they are. Blocks that read different Python numbers,
    such as their own index, are compiled one by one, which only takes longer. With scope `model`,
    the result is `torch.compile`'s wrapper.

    A layer must be one graph, unless it has experts. If these are dispatched to other ranks,
    sharded apart from their block, or in float32, the graph is split into one before and one after
    them. If such a block is checkpointed, the recomputed function is compiled, with either scope.
    Blocks of other stacks may be several graphs, and so may layers with a
    `torch.compiler.disable`d module.
    """
    config = job_config.compile
    if not config.compiles("model"):
        return model
    if job_config.training.mixed_precision_param == "float32":
        for moe in moe_layers(model):  # the compiler supports grouped_mm only in bfloat16
            moe.experts.forward = torch.compiler.disable(moe.experts.forward)
    # Backends other than inductor take no mode, not even the default.
    mode = None if config.mode == "default" else config.mode
    options: dict[str, Any] = {"backend": config.backend, "mode": mode}
    blocks = blocks_of(model)
    if config.scope == "block":
        options |= _as_many_graphs_as(len(blocks))
    for name, layer in blocks.items():
        if is_checkpointed(layer) and _checkpoint_outside(layer, job_config):
            _compile_checkpointed(layer, options)
        elif config.scope == "block":
            whole = name.startswith("layers.") and not moe_layers(layer)
            fullgraph = whole and not _leaves_out(layer)
            layer.forward = torch.compile(layer.forward, fullgraph=fullgraph, **options)
    return cast(M, torch.compile(model, **options)) if config.scope == "model" else model


def _leaves_out(layer: nn.Module) -> bool:
    """Return whether a module of `layer` has a forward with `torch.compiler.disable`."""
    return any(getattr(part.forward, "_torchdynamo_disable", False) for part in layer.modules())


def _as_many_graphs_as(blocks: int) -> dict[str, int]:
    """Return `torch.compile` options that allow each block as many graphs as one function.

    To the compiler, all blocks are one function. A Python number that differs between them, such as
    a scale by layer index, gives each block its own graph: more graphs than one function may have.
    """
    limit = _GRAPHS_OF_A_FUNCTION * blocks
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": limit}
    config = torch._dynamo.config  # torch 2.11 only has a limit for all functions together
    config.recompile_limit = max(config.recompile_limit, limit)
    return {}


def _checkpoint_outside(layer: nn.Module, job_config: JobConfig) -> bool:
    """Return whether a checkpointed block is compiled inside of its checkpoint.

    One with experts must be where they are outside of its graph. On a CPU, a graph that recomputes
    attention also keeps a random state, and the compiler then mistakes what else it keeps
    (torch 2.13). So it must not be a graph with tensor parallelism, which keeps a mesh, nor one of
    a pipeline with experts, whose tally the micro-batches in flight change.
    """
    config = job_config.parallelism
    on_cpu, with_tp = device_type() == "cpu", config.tensor_parallel_degree > 1
    if not moe_layers(layer):
        return on_cpu and with_tp and recomputes_all(layer)
    dispatched_or_apart = with_tp or config.expert_parallel_degree > 1
    in_float32 = job_config.training.mixed_precision_param == "float32"
    return dispatched_or_apart or in_float32 or (on_cpu and config.pipeline_parallel_degree > 1)


def _compile_checkpointed(layer: nn.Module, options: dict[str, Any]) -> None:
    # Imported here because torchtitan.models imports this module.
    from torchtitan.models.common.attention import ScaledDotProductAttention

    # Costly parts that have their own kernels, and gain little from compilation.
    eager: list[nn.Module] = [moe.experts for moe in moe_layers(layer)]
    eager += [m for m in layer.modules() if isinstance(m, ScaledDotProductAttention)]
    compile_inside(layer, partial(torch.compile, **options), eager)


@contextmanager
def compiled_pass(job_config: JobConfig) -> Iterator[None]:
    """Enclose a forward pass of a model that may be compiled.

    Raises:
        ConfigError: the compiler rejects the model's code, or cannot work at all.
    """
    config = job_config.compile
    if config.enable and config.mode in ("reduce-overhead", "max-autotune"):
        # CUDA graphs may overwrite the results of the pass before. Untold, they would count each
        # compiled block of a pass without gradients as a pass of its own.
        torch.compiler.cudagraph_mark_step_begin()
    try:
        yield
    except Exception as error:
        if not config.enable:
            raise
        if lack := _lack_of_cpp(error):
            fail(job_config, "compile.enable", f"on a CPU, PyTorch's compiler {lack}")
        rejected = torch._dynamo.exc
        kinds = rejected.Unsupported, rejected.UserError, rejected.FailOnRecompileLimitHit
        if not isinstance(error, kinds):
            raise
        problem = (
            "a layer must be one graph, and not another one in each step. Decorate the forward of "
            "a module whose work depends on values with @torch.compiler.disable, which leaves it "
            "out; change buffers only by methods such as add_; keep numbers that change in buffers "
            f"(TORCH_LOGS=recompiles shows them). The compiler: {error}"
        )
        fail(job_config, "compile.enable", problem)


def _lack_of_cpp(error: Exception) -> str:
    """Return what the compiler lacks to compile the C++ code that it makes for a CPU, else ""."""
    from torch._inductor import exc  # takes a second, unless the compiler has imported it

    cause = getattr(error, "inner_exception", None)
    if isinstance(cause, exc.InvalidCxxCompiler):
        return "needs a C++ compiler: install g++ or clang"
    if isinstance(cause, exc.CppCompileError):
        if "Python.h" in str(cause):
            return "needs the header files of Python: install python3-dev, or what has them"
        if " " in (folder := os.path.dirname(torch.__file__)):
            return f"does not work from a folder with a space in its path: {folder}"
    return ""
