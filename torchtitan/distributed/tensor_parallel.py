"""Tensor parallelism, by default with sequence parallelism (arXiv:1909.08053 and 2205.05198).

A model gives its plan for one block (module name -> style); the embedding, the final norm and the
output layer are the same for all models and are planned here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchtitan.distributed.blocks import other_blocks_of
from torchtitan.distributed.dtensor import local_tensor, offsets_of_all
from torchtitan.distributed.tying import preserve_tying
from torchtitan.errors import ConfigError
from torchtitan.protocols.model import layers_of
from torchtitan.tools.text import few

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

Plan = dict[str, ParallelStyle]

LOSS_NOT_ATTACHED = (
    "loss.name = 'chunked_cross_entropy' applies the model's output layer, but its "
    "attach(model_parts) was not called. A build_loss_fn that wraps torchtitan's loss must "
    "forward it: loss.attach = main.attach. Or use loss.name = 'cross_entropy'"
)
"""An author's mistake, found at the first call of the output layer or of the loss."""


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


class SharedInput(ParallelStyle):
    """For a module without parameters whose input all ranks use, each for its own heads.

    The input, `[batch, seq / tp, ...]` or the part that the DTensor is, becomes the whole
    `[batch, seq, ...]` as a plain tensor. Each rank uses it differently, so its gradient is a
    partial sum. Other arguments stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_layouts: tuple[Placement, ...] = (Shard(1),)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, input_fn=self._gather)

    def _gather(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        part, *others = inputs
        if not isinstance(part, DTensor):
            part = DTensor.from_local(part, mesh, self.input_layouts, run_check=False)
        whole = part.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()]), *others


class OwnTokens(ParallelStyle):
    """For a module that treats tokens independently, such as a mixture of experts.

    Each rank passes it a part `[batch, seq / tp, dim]` of the sequence, as a plain tensor, even if
    the sequence is whole between the modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outer_layouts: tuple[Placement, ...] = (Shard(1),)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward = module.forward

        # Not by distribute_module, which would replicate the parameters too.
        @wraps(forward)
        def forward_own(x: torch.Tensor, *args: Any) -> torch.Tensor:
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, device_mesh, self.outer_layouts, run_check=False)
            seq_len = x.size(1)
            missing = -seq_len % device_mesh.size()
            if missing:  # a whole sequence of odd length, when generating
                x = F.pad(x.to_local(), (0, 0, 0, missing))
                x = DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            out = forward(x.redistribute(placements=[Shard(1)]).to_local(), *args)
            out = DTensor.from_local(out, device_mesh, [Shard(1)], run_check=False)
            out = out.redistribute(placements=self.outer_layouts).to_local()
            return out[:, :seq_len] if missing else out

        module.forward = forward_own
        return module


class SequenceParallelLinear(SequenceParallel):
    """`SequenceParallel` for a linear layer, which each rank applies to its part of the sequence.

    The layer gets the rank's tokens as one dimension. Otherwise `F.linear` joins batch and sequence
    of a DTensor, which fails if it is compiled and the number of samples varies, as in a validation
    (torch 2.13).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module = distribute_module(module, device_mesh, self._replicate_module_fn)
        forward, layouts = module.forward, self.sequence_sharding
        rows_layouts = [Shard(0) if isinstance(p, Shard) else p for p in layouts]

        @wraps(forward)
        def forward_rows(x: torch.Tensor) -> torch.Tensor:
            x = local_tensor(x)
            rows = DTensor.from_local(x.flatten(0, 1), device_mesh, rows_layouts, run_check=False)
            out = forward(rows).to_local().unflatten(0, x.shape[:2])
            if self.use_local_output:
                return out
            return DTensor.from_local(out, device_mesh, layouts, run_check=False)

        module.forward = forward_rows
        return module


class HeadwiseParallel(ParallelStyle):
    """For a module with parameters `[heads, ...]` and an input `[batch, seq, heads, _]`.

    Shards both over the heads. Input and output are plain tensors, each rank's heads. Other
    arguments stay as they are.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # distribute_module() is annotated as if these functions returned nothing.
        def from_heads(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False), *inputs[1:]

        def to_heads(module: nn.Module, output: torch.Tensor, mesh: DeviceMesh) -> Any:
            return local_tensor(output)

        return distribute_module(module, device_mesh, _shard_rows, from_heads, to_heads)


class EmbeddingParallel(ParallelStyle):
    """Shards an `nn.Embedding` over the vocabulary: a rank looks up its own tokens.

    The gradient of the weight has the weight's placement. With `RowwiseParallel`, it covers the
    whole vocabulary on each rank (seen with torch 2.13): 4.2 GB for Llama 3 70B.
    """

    def __init__(self, *, output_layouts: Placement) -> None:
        super().__init__()
        self.output_layouts: tuple[Placement, ...] = (output_layouts,)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Embedding):
            raise NotImplementedError(f"{module} is not an nn.Embedding")
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise ConfigError(
                "parallelism.tensor_parallel_degree: an nn.Embedding with max_norm or "
                f"scale_grad_by_freq cannot be split: {module}"
            )
        if type(module).forward is not nn.Embedding.forward:  # a look-up alone would replace it
            if others := [name for name, _ in module.named_parameters() if name != "weight"]:
                raise ConfigError(
                    f"parallelism.tensor_parallel_degree: {type(module).__name__} has "
                    f"{few(others)} beside its weight, which EmbeddingParallel cannot split. Put "
                    "it in a module with another name, which the model's parallelize_fn splits"
                )
            by_rows = RowwiseParallel(
                input_layouts=Replicate(), output_layouts=self.output_layouts[0]
            )
            return by_rows._apply(module, device_mesh)
        _shard_rows("", module, device_mesh)
        [(start, _)] = offsets_of_all([module.weight])
        module.forward = partial(self._look_up, module, device_mesh, start)
        return module

    def _look_up(
        self, module: nn.Embedding, mesh: DeviceMesh, start: int, tokens: torch.Tensor
    ) -> Any:
        weight = cast(DTensor, module.weight)
        own_rows = weight.to_local(grad_placements=weight.placements)
        own = embed_own(tokens, own_rows, start, module.padding_idx)
        hidden = DTensor.from_local(own, mesh, [Partial()], run_check=False)
        output = hidden.redistribute(placements=self.output_layouts).to_local()
        # A compiled block that receives a pending tensor returns a gradient of the wrong type (seen
        # with torch 2.13). Any operation waits for the tensor; a copy of `[batch, seq / tp, dim]`
        # is the cheapest.
        return output.clone() if isinstance(output, AsyncCollectiveTensor) else output


def embed_own(
    tokens: torch.Tensor, weight: torch.Tensor, start: int, padding_idx: int | None = None
) -> torch.Tensor:
    """Embed the tokens whose rows `weight` has, as `[batch, seq, dim]`; zeros for other tokens.

    Args:
        tokens: `[batch, seq]`.
        weight: `[rows, dim]`, the rows of the whole weight from `start` on. May have no rows.
        padding_idx: the token whose row gets no gradient.
    """
    others = (tokens < start) | (tokens >= start + weight.shape[0])
    if not weight.shape[0]:
        return weight.sum() + weight.new_zeros(*tokens.shape, weight.shape[1])
    rows = (tokens - start).masked_fill(others, 0)
    if padding_idx is not None:
        padding_idx = padding_idx - start if start <= padding_idx < start + len(weight) else None
    return F.embedding(rows, weight, padding_idx).masked_fill(others.unsqueeze(-1), 0.0)


class DeferredOutputParallel(SharedInput):
    """For an output layer that the chunked loss applies: shards its weight over the vocabulary.

    The layer passes on the whole `[batch, seq, dim]`, to which each rank's vocabulary contributes
    gradients. Called without that loss, it raises `ConfigError`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, _shard_rows, self._gather)

    def _gather(self, module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        if "forward" not in vars(module):  # `attach` of the loss replaces it
            raise ConfigError(LOSS_NOT_ATTACHED)
        return super()._gather(module, inputs, mesh)


def _shard_rows(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of one module by rows: the `partition_fn` of `distribute_module`."""
    for key, param in list(module.named_parameters(recurse=False)):
        sharded = nn.Parameter(distribute_tensor(param, mesh, [Shard(0)]))
        module.register_parameter(key, sharded)
