"""Checks that the options of a layout have an effect: an ignored one passes every comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn as nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.models.common.state_dict import pattern_of
from torchtitan.tools.text import few
from torchtitan.train import Trainer

from .check import CheckFailedError
from .verdict import Comparison

_WHOLE = 0.5
"""Share of the layers' matrices that tensor parallelism may leave whole on each rank without a
note: routers, and low-rank matrices such as those of multi-head latent attention."""


@contextmanager
def compiled_graphs(model_parts: list[nn.Module]) -> Iterator[Counter[str]]:
    """Yield a counter of the `graphs` compiled in forward passes of the model, in the context."""
    count: Counter[str] = Counter()

    def begin(*call: Any) -> None:
        count["graphs"] -= counters["stats"]["unique_graphs"]

    def end(*call: Any) -> None:
        count["graphs"] += counters["stats"]["unique_graphs"]

    with ExitStack() as stack:
        for part in model_parts:
            stack.callback(part.register_forward_pre_hook(begin).remove)
            stack.callback(part.register_forward_hook(end).remove)
        yield count


def require_effect(trainer: Trainer, comparison: Comparison, graphs: int) -> str:
    """Return notes for the author on options that have less effect than they could.

    Args:
        graphs: number of graphs compiled in forward passes.

    Raises:
        CheckFailedError: an option has no effect.
    """
    config, dims = trainer.job_config, trainer.parallel_dims
    ignored = effect = ""
    if dims.tp_enabled and not _is_sharded(trainer, "tp"):
        ignored, effect = "tensor_parallel_degree = 2", _NOT_DIVIDED
    elif dims.ep_enabled and not _is_sharded(trainer, "ep"):
        ignored, effect = "expert_parallel_degree = 2", _NOT_DIVIDED
    elif config.compile.enable and not graphs:
        ignored, effect = "compile.enable", "no forward pass of the model is compiled"
    elif (
        config.activation_checkpoint.mode == "full"
        and not config.compile.enable
        and not comparison.recomputes
    ):
        ignored = "activation_checkpoint.mode = full"
        effect = "nothing is recomputed in the backward pass"
    if ignored:
        raise CheckFailedError(
            f"{ignored} has no effect: {effect}",
            "parallelize.py must apply it, or raise ConfigError if the model does not support it.",
        )
    notes = [
        _left_whole(trainer) if dims.tp_enabled else "",
        _gathered_at_once(trainer),
        _compiled_one_by_one(trainer, graphs),
    ]
    return "".join(f". Note: {note}" for note in notes if note)


_NOT_DIVIDED = "no parameter is divided over these ranks"


def _is_sharded(trainer: Trainer, mesh_dim: str) -> bool:
    return any(
        is_sharded(param, mesh_dim) for part in trainer.model_parts for param in part.parameters()
    )


def is_sharded(param: nn.Parameter, mesh_dim: str) -> bool:
    if not isinstance(param, DTensor):
        return False
    names = param.device_mesh.mesh_dim_names or ()
    return mesh_dim in names and not isinstance(param.placements[names.index(mesh_dim)], Replicate)


def _left_whole(trainer: Trainer) -> str:
    """Name the layers' matrices that are whole on every tensor rank, if they are most of them."""
    matrices: dict[str, tuple[nn.Parameter, bool]] = {}
    for part in trainer.model_parts:
        for block, layer in blocks_of(part).items():
            of_experts = {p for moe in moe_layers(layer) for p in moe.parameters()}
            for name, param in layer.named_parameters():
                if param.ndim == 2 and param not in of_experts:  # experts have layouts of their own
                    matrices[f"{block}.{name}"] = param, is_sharded(param, "tp")
    numbers = sum(param.numel() for param, _ in matrices.values())
    whole = {name: param for name, (param, sharded) in matrices.items() if not sharded}
    share = sum(param.numel() for param in whole.values()) / max(numbers, 1)
    if share <= _WHOLE:
        return ""
    names = sorted({pattern_of(name).replace("{}", "N") for name in whole})
    return (
        f"{share:.0%} of the layers' matrices are whole on every tensor-parallel rank, which "
        f"computes all of them: {few(names, 5)}"
    )


def _gathered_at_once(trainer: Trainer) -> str:
    """Return a note if FSDP has the whole model as one group."""
    parts = trainer.model_parts
    modules = [module for part in parts for module in part.modules()]
    sharded = any(isinstance(module, FSDPModule) for module in modules)
    blocks = [m for part in parts for block in blocks_of(part).values() for m in block.modules()]
    if not sharded or any(isinstance(module, FSDPModule) for module in blocks):
        return ""
    return "FSDP gathers all layers at once: call fully_shard for each, as apply_fsdp does"


def _compiled_one_by_one(trainer: Trainer, graphs: int) -> str:
    blocks = [block for part in trainer.model_parts for block in blocks_of(part).values()]
    alike = len({type(block) for block in blocks}) == 1
    if not alike or not 2 < len(blocks) <= graphs or any(moe_layers(block) for block in blocks):
        return ""
    return (
        f"{len(blocks)} layers are {graphs} graphs, compiled one by one: a Python number that "
        "differs by layer causes this, unless it is a buffer"
    )
