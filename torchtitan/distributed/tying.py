"""Keep tied parameters tied while they are replaced, or get memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Give a model on the meta device memory, with any values in it."""
    with preserve_tying(model):
        model.to_empty(device=device)


@contextmanager
def preserve_tying(model: nn.Module) -> Iterator[None]:
    """Tie parameters again on exit if they are one object on entry.

    `to_empty` and `distribute_module` replace each module's parameters one by one, which unties
    them. The parameter of the first module is kept.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            places[id(param)].append((module, name))
    yield
    for (first, first_name), *others in places.values():
        for module, name in others:
            module.register_parameter(name, first.get_parameter(first_name))
