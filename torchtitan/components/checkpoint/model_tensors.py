"""The tensors of a model, by the names that they have in checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.stage_copies import sharing_of, with_absent_modules


def model_state(model_parts: list[nn.Module]) -> dict[str, Any]:
    """Map canonical names to parameters and persistent buffers (the tensors, not copies)."""
    return {k: v for part in model_parts for k, v in get_model_state_dict(part).items()}


def buffer_names(model_parts: list[nn.Module]) -> set[str]:
    """Return the names of buffers, such as a router's bias; see `dtype_of_copy`."""
    return {canonical_name(name) for part in model_parts for name, _ in part.named_buffers()}


def saved_buffers(model_parts: list[nn.Module]) -> dict[str, Any]:
    """Map names to the buffers that checkpoints hold, in the model's order.

    That of `buffer_names`, a set, differs between processes.
    """
    names = buffer_names(model_parts)
    return {name: t for name, t in model_state(model_parts).items() if name in names}


def dtype_of_copy(own: torch.dtype, dtype: torch.dtype | None, is_buffer: bool) -> torch.dtype:
    """Return the dtype to save a tensor in if weights are saved in `dtype`; None: unchanged.

    Buffers are not rounded: the bias of DeepSeek-V3's router changes by 0.001 per step, which
    bfloat16 does not resolve, and `transformers` keeps it in float32.
    """
    if dtype is None or not own.is_floating_point:
        return own
    return torch.promote_types(own, dtype) if is_buffer else dtype


def tied_embeddings(model_parts: list[nn.Module]) -> set[str]:
    """Return the second names of embeddings, which Hugging Face files hold only once.

    Its models tie only these, and need anything else that is shared under each of its names.
    """
    tied = set()
    for part in model_parts:
        with with_absent_modules(part):
            weights = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
            names = part.named_parameters(remove_duplicate=False)
            tied |= {canonical_name(name) for name, param in names if id(param) in weights}
    return tied & all_first_names(model_parts).keys()


def all_first_names(model_parts: list[nn.Module]) -> dict[str, str]:
    """Return `first_names`, also of tied parameters that only other stages have.

    What a checkpoint must hold is the same on each rank.
    """
    shared = [weight.names for part in model_parts for weight in sharing_of(part).weights]
    first = {name: names[0] for names in shared for name in names[1:]}
    return first | {
        name: other for part in model_parts for name, other in first_names(part).items()
    }


def first_names(model: nn.Module) -> dict[str, str]:
    """Second name of each parameter that has two -> its first name.

    In the whole model: a stage of a pipeline may have only one of them.
    """
    with with_absent_modules(model):
        first = {id(param): canonical_name(name) for name, param in model.named_parameters()}
        names = {
            canonical_name(name): first[id(param)]
            for name, param in model.named_parameters(remove_duplicate=False)
        }
    return {name: other for name, other in names.items() if name != other}
