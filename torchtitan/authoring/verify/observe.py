"""Records the output of each module of a model, on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from torchtitan.config import JobConfig
from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.names import canonical_name

Outputs = dict[str, list[torch.Tensor]]
"""Module -> its output in each call: one per micro-batch, if called once in a forward pass."""


@contextmanager
def module_outputs(
    model_parts: list[nn.Module], job_config: JobConfig
) -> Iterator[tuple[Outputs, Outputs]]:
    """Yield the outputs of all modules in training mode, filled within the context, and others.

    The others are outputs in the backward pass, where activation checkpointing reruns modules. Both
    are in order of completion. Modules inside of compiled ones are left out: the compiler would
    have to trace the recording.
    """
    outputs: Outputs = {}
    recomputed: Outputs = {}

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        # Pipelines run a forward pass in evaluation mode to infer shapes.
        if not module.training:
            return
        # Selective checkpointing watches operations, and must not see these.
        with torch.no_grad(), _disable_current_modes():
            tensor = _first_tensor(output)
            if tensor is None or not tensor.is_floating_point():
                return
            in_backward = torch._C._current_graph_task_id() != -1
            found = recomputed if in_backward else outputs
            found.setdefault(name, []).append(_copy(tensor))

    with ExitStack() as stack:
        for part in model_parts:
            traced = _inside_compiled(part, job_config)
            for name, module in part.named_modules():
                if module not in traced:
                    hook = partial(record, canonical_name(name))
                    stack.callback(module.register_forward_hook(hook).remove)
        yield outputs, recomputed


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, DTensor):
        local = _copy(tensor._local_tensor)
        return DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    if isinstance(tensor, AsyncCollectiveTensor):
        # Still in flight. Waiting counts as a mutation, which selective checkpointing refuses; the
        # tensor has arrived when the step has ended.
        return tensor.elem
    return tensor.detach().clone()


def _inside_compiled(part: nn.Module, job_config: JobConfig) -> set[nn.Module]:
    config = job_config.compile
    if not config.compiles("model"):
        return set()
    compiled = [part] if config.scope == "model" else list(blocks_of(part).values())
    return {inner for module in compiled for inner in module.modules() if inner is not module}


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        return next((t for t in map(_first_tensor, output) if t is not None), None)
    return None
