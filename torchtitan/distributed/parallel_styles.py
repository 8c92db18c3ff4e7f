"""Styles of tensor parallelism, for modules that PyTorch's own styles do not fit.

A style says how one module is split over the ranks of a mesh: its parameters, its inputs, its
outputs. A model's plan names one for each module, see `tensor_parallel.py`.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any, cast

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
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel, SequenceParallel

from torchtitan.distributed.dtensor import local_tensor, offsets_of_all
from torchtitan.errors import ConfigError
from torchtitan.tools.text import few

LOSS_NOT_ATTACHED = (
    "loss.name = 'chunked_cross_entropy' applies the model's output layer, but its "
    "attach(model_parts) was not called. A build_loss_fn that wraps torchtitan's loss must "
    "forward it: loss.attach = main.attach. Or use loss.name = 'cross_entropy'"
)
"""An author's mistake, found at the first call of the output layer or of the loss."""


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
