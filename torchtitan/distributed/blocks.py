"""The blocks of a model: the modules that are gathered, recomputed and compiled one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch.nn as nn

from torchtitan.protocols.model import layers_of

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are gathered, recomputed and compiled one by one: name -> module.

    These are the layers, then the members of other stacks, such as an encoder's or a vision
    tower's, then the modules that the model's `other_blocks` names. A stack is a list, dict or
    sequence of modules that all have a `forward` and submodules with parameters, at least two of
    the same type. Except for layers, modules that share a parameter with another part of the model
    are left out. Pipelines cut between layers only.
    """
    blocks: dict[str, nn.Module] = {f"layers.{n}": layer for n, layer in layers_of(model).items()}
    uses = _uses(model)
    others = other_blocks_of(model)
    known = {*blocks.values(), *others.values()}  # `layers` may be a property, such as h's blocks
    for name, block in (*_blocks_in(model, "", known), *others.items()):
        if all(uses[parameter] == count for parameter, count in _uses(block).items()):
            blocks[name] = block
    return blocks


def other_blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks that the model's `other_blocks` names and that this stage has."""
    blocks: dict[str, nn.Module] = {}
    for name in getattr(model, "other_blocks", ()):
        module: Any = model
        for part in name.split("."):
            module = getattr(module, part) if module is not None else None
        if isinstance(module, _LISTS):
            blocks |= {f"{name}.{n}": block for n, block in module.named_children()}
        elif module is not None:
            blocks[name] = module
    return blocks


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Count the places in which each parameter is used."""
    return Counter(param for _, param in module.named_parameters(remove_duplicate=False))


def _blocks_in(
    module: nn.Module, prefix: str, known: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of stacks, except layers and modules that are known already."""
    for name, child in module.named_children():
        if prefix + name == "layers" or child in known:
            continue
        if _is_stack(child):
            for number, block in child.named_children():
                if block not in known:
                    yield f"{prefix}{name}.{number}", block
        else:
            yield from _blocks_in(child, f"{prefix}{name}.", known)


def _is_stack(module: nn.Module) -> bool:
    members = list(module.children())
    return (
        isinstance(module, _LISTS)
        and len({type(member) for member in members}) < len(members)
        and all(_is_block(member) for member in members)
    )


def _is_block(module: nn.Module) -> bool:
    """Return whether a member of a list has a forward, on which FSDP gathers, and inner layers."""
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and any(True for part in module.children() for _ in part.parameters())
