"""Observe each collective of a block of code, whoever calls it: FSDP, DTensor, a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan.config import JobConfig
from torchtitan.distributed.ring_attention import sees_rings

_NAMESPACES = ("c10d", "_c10d_functional", "c10d_functional")
_NO_COMMUNICATION = ("wait_tensor", "_wrap_tensor_autograd")
# Index of the input argument of collectives that take several tensors; it is 0 for all others.
_INPUT_ARGUMENT = {
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allgather_": 1,
    "allgather_coalesced_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "alltoall_": 1,
    "alltoall_base_": 1,
    "gather_": 1,
    "reduce_scatter_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "scatter_": 1,
}
_NO_INPUT = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


@sees_rings
class CollectiveObserver(TorchDispatchMode):
    """While entered, calls `observe(name, inputs, call)` for each collective of this thread.

    Backward passes are observed too, since autograd's threads inherit the mode. All operations go
    through Python, which is slow, so enter it for single steps only.

    Args:
        observe: must return `call()`, which starts the communication. `inputs` are the tensors
            that this rank sends; none for a receive.
    """

    supports_higher_order_operators = True

    def __init__(
        self, observe: Callable[[str, list[torch.Tensor], Callable[[], Any]], Any]
    ) -> None:
        super().__init__()
        self._observe = observe

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(t, (DTensor, AsyncCollectiveTensor)) for t in types):
            return NotImplemented  # their operations on local tensors arrive here next
        kwargs = kwargs or {}
        namespace = getattr(func, "namespace", "")
        if namespace not in _NAMESPACES:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if name in _NO_COMMUNICATION:
            return func(*args, **kwargs)
        inputs: list[torch.Tensor] = []
        if name not in _NO_INPUT:
            at = _INPUT_ARGUMENT.get(name, 0) if namespace == "c10d" else 0
            inputs = [t for t in tree_leaves(args[at : at + 1]) if isinstance(t, torch.Tensor)]
        return self._observe(name, inputs, lambda: func(*args, **kwargs))


def can_be_observed(
    model_parts: list[nn.Module], job_config: JobConfig, device: torch.device
) -> bool:
    """Return whether `CollectiveObserver` may be entered: compiled code refuses to run under it.

    Flex attention is compiled too; CUDA uses it for masks that are not plain causal.
    """
    from torchtitan.models.common.attention import CausalMask

    seq_len, documents = job_config.training.seq_len, job_config.training.document_mask
    masks = [m for part in model_parts for m in part.modules() if isinstance(m, CausalMask)]
    flex = any(
        mask.uses_flex(not documents and mask.is_plain(seq_len, None), device) for mask in masks
    )
    return not (job_config.compile.enable or flex)
