"""Tensor parallelism, by default with sequence parallelism (arXiv:1909.08053 and 2205.05198).

A model gives its plan for one block (module name -> style); the embedding, the final norm and the
output layer are the same for all models and are planned here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.config import JobConfig
from torchtitan.distributed.blocks import other_blocks_of
from torchtitan.distributed.parallel_styles import (
    DeferredOutputParallel,
    EmbeddingParallel,
    OwnTokens,
)
from torchtitan.distributed.tying import preserve_tying
from torchtitan.errors import ConfigError
from torchtitan.protocols.model import layers_of

Plan = dict[str, ParallelStyle]


def apply_tensor_parallel(
    model: nn.Module,
    tp_mesh: DeviceMesh,
    job_config: JobConfig,
    block_plan: Plan | Callable[[Any], Plan],
    other_plan: Plan | None = None,
) -> None:
    """Split the matrices of `model` over `tp_mesh`, in place.

    Between the split matrices, the hidden states `[batch, seq, dim]` are sharded over the sequence,
    so that the ranks share norms and residuals, too. Plans are written for this layout, and
    `Shard(1)` in them is the sequence; `parallelism.disable_sequence_parallel` keeps it whole.

    The embedding, the norm and the output layer are `tok_embeddings`, `norm` and `output`; a model
    may lack any of them. Modules with other names are left to the model's author.

    Args:
        block_plan: plan of each block, a layer or one of the model's `other_blocks`; if blocks
            differ, a function from a block to its plan.
        other_plan: plan of modules of the model beside these; also `"vision.merger"`, `"gains.*"`.

    Raises:
        ConfigError: `tok_embeddings` is no `nn.Embedding`, `output` no `nn.Linear`, or another
            module that the plan divides neither.
    """
    model_plan: Plan = {
        "tok_embeddings": EmbeddingParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": _output_style(job_config),
        **(other_plan or {}),
    }
    model_plan = {name: s for name, s in model_plan.items() if _has(model, name)}
    plan_of = block_plan if callable(block_plan) else lambda block: block_plan
    whole_sequence = job_config.parallelism.disable_sequence_parallel
    adapt = _plan_for_whole_sequence if whole_sequence else lambda plan: plan
    if job_config.parallelism.enable_async_tensor_parallel:
        _overlap_with_matmuls(tp_mesh)
    done: set[Any] = set()  # blocks may share modules
    with preserve_tying(model):
        parallelize_module(model, tp_mesh, adapt(model_plan))
        for block in (*layers_of(model).values(), *other_blocks_of(model).values()):
            parts = dict(block.named_modules(remove_duplicate=False))
            plan = adapt(plan_of(block))
            new = {name: style for name, style in plan.items() if parts.get(name) not in done}
            if new:
                for name, style in new.items():
                    _refuse_other_layers(block, name, parts.get(name), style)
                parallelize_module(block, tp_mesh, new)
            done.update(block.modules())


def _has(model: nn.Module, name: str) -> bool:
    """Return whether the model has a module of this name, or the outermost one of a dotted name.

    Refuse one that cannot be split.
    """
    module = getattr(model, name.partition(".")[0], None)
    kind = {"tok_embeddings": nn.Embedding, "output": nn.Linear}.get(name, nn.Module)
    if module is not None and not isinstance(module, kind):
        raise ConfigError(
            f"parallelism.tensor_parallel_degree: {type(model).__name__}.{name} is "
            f"{type(module).__name__}, but apply_tensor_parallel expects nn.{kind.__name__} "
            "there. Give it another name, and parallelize it in the model's parallelize_fn"
        )
    return module is not None


def _refuse_other_layers(block: nn.Module, name: str, part: Any, style: ParallelStyle) -> None:
    of_matrices = type(style) in (ColwiseParallel, RowwiseParallel)
    splits = isinstance(part, nn.Linear | nn.Embedding | None) and not hasattr(
        part, "parametrizations"
    )
    if of_matrices and not splits:
        raise ConfigError(
            f"parallelism.tensor_parallel_degree: {type(block).__name__}.{name} is "
            f"{type(part).__name__}, which {type(style).__name__} cannot split. Derive it from "
            "nn.Linear, or give its own layers styles in the model's parallelize_fn"
        )


def attention_plan(name: str = "attention") -> Plan:
    """Return the part of a block's plan that splits the heads of its attention.

    Args:
        name: of a module with the layers `wq`, `wk`, `wv` and `wo`, which the block calls with
            hidden states, rotation and mask.
    """
    return {
        name: PrepareModuleInput(
            input_layouts=(Shard(1), None, None),
            desired_input_layouts=(Replicate(), None, None),
        ),
        f"{name}.wq": ColwiseParallel(),
        f"{name}.wk": ColwiseParallel(),
        f"{name}.wv": ColwiseParallel(),
        f"{name}.wo": RowwiseParallel(output_layouts=Shard(1)),
    }


def feed_forward_plan(name: str = "feed_forward", gated: bool = True) -> Plan:
    """Return the part of a block's plan that splits the hidden features of its feed-forward layer.

    Args:
        name: of a module like `FeedForward`.
        gated: whether it has a `w3` besides `w1` and `w2`.
    """
    gate: Plan = {f"{name}.w3": ColwiseParallel()} if gated else {}
    return gate | {
        name: PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        f"{name}.w1": ColwiseParallel(),
        f"{name}.w2": RowwiseParallel(output_layouts=Shard(1)),
    }


def _plan_for_whole_sequence(plan: Plan) -> Plan:
    """Return the plan without sequence parallelism, except inside modules of `OwnTokens`."""
    own = tuple(f"{name}." for name, style in plan.items() if isinstance(style, OwnTokens))
    return {
        name: style if name.startswith(own) else _with_whole_sequence(style)
        for name, style in plan.items()
    }


def _with_whole_sequence(value: Any) -> Any:
    """Return a copy of a part of a plan, with `Replicate()` in place of each `Shard(1)`."""
    if value == Shard(1):
        return Replicate()
    if isinstance(value, dict):
        return {key: _with_whole_sequence(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_whole_sequence(item) for item in value)
    if isinstance(value, ParallelStyle):
        value = copy.copy(value)
        vars(value).update(_with_whole_sequence(vars(value)))
    return value


def _overlap_with_matmuls(tp_mesh: DeviceMesh) -> None:
    """Make the compiler cut matrix products, and send each part while the next is computed.

    Async tensor parallelism (Wang et al., ASPLOS 2023, doi:10.1145/3567955.3567959); ranks read
    each other's memory.
    """
    import torch._inductor.config
    from torch.distributed import _functional_collectives
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    # The compiler recognizes a gather by its split and concatenation, which it then removes. If a
    # micro-batch is one sequence, PyTorch uses a view, so none was fused (torch 2.11 to 2.13).
    if hasattr(_functional_collectives, "_maybe_view_chunk_cat"):
        _functional_collectives._maybe_view_chunk_cat = _split_and_concatenate
    with warnings.catch_warnings():
        # Needed by torch 2.11; 2.13 does it itself, and warns.
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(tp_mesh.get_group().group_name)


def _split_and_concatenate(res: torch.Tensor, group_size: int, gather_dim: int) -> torch.Tensor:
    """Return the ranks' parts, `[group_size * n, ...]`, joined along `gather_dim`."""
    return res if gather_dim == 0 else torch.cat(res.chunk(group_size), gather_dim)


def _output_style(job_config: JobConfig) -> ParallelStyle:
    if job_config.loss.name == "chunked_cross_entropy":
        return DeferredOutputParallel()
    if job_config.parallelism.disable_loss_parallel:
        return ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    # The logits stay sharded over the vocabulary, and the loss is computed on the shards.
    return ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False)
