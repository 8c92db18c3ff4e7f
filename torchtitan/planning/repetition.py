"""Layers that repeat: a few of them are traced, and the rest follow."""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from torchtitan.components.data_loader import Batch
from torchtitan.components.model_inputs import own_inputs
from torchtitan.protocols.model import layers_of

from .inputs import TOKEN_IDS, Inputs

_EDGE = 2
"""Layers at each end that are not like those between, as FSDP holds a layer and the next."""


@dataclass(frozen=True)
class Repetition:
    """The layers of a model: `first` that are unlike, then `repeats` times the same `period`."""

    first: int
    period: int
    repeats: int

    @classmethod
    def of(
        cls, model: nn.Module, seq_len: int, multiple: int = 1, inputs: Inputs = TOKEN_IDS
    ) -> Repetition:
        """The one with the fewest different layers.

        Args:
            inputs: what a batch is.
            multiple: the period is a multiple of this, as every n-th layer is treated differently.
        """
        signatures = layer_signatures(model, seq_len, inputs)
        layers = len(signatures)
        best = cls(layers, multiple, 0)
        for period in range(multiple, layers // 2 + 1, multiple):
            same = 0
            while (
                same < layers - period and signatures[-1 - same] == signatures[-1 - same - period]
            ):
                same += 1
            repeats = (same + period) // period
            found = cls(layers - repeats * period, period, repeats)
            if found.first + period < best.first + best.period:
                best = found
        return best

    def depth(self, repeats: int) -> int:
        """Layers with only so many repetitions."""
        return self.first + repeats * self.period

    @property
    def edge(self) -> int:
        """Repetitions at each end that are not like those between."""
        return math.ceil(_EDGE / self.period)

    @property
    def traced(self) -> tuple[int, int]:
        """Repetitions in the two traces from which the whole is extrapolated."""
        return 2 * self.edge, 2 * self.edge + 1

    @property
    def worth_extrapolating(self) -> bool:
        """Whether the two traces have fewer layers than the model."""
        return sum(map(self.depth, self.traced)) < self.depth(self.repeats)


def keep_layers(model: nn.Module, count: int) -> None:
    """Remove all but the first `count` of `model.layers`."""
    layers = layers_of(model)
    for name in list(layers)[count:]:
        del layers[name]


def layer_signatures(model: nn.Module, seq_len: int, inputs: Inputs) -> list[str]:
    """For each of `model.layers` a text, equal where modules, shapes and settings are, and
    where the model calls them alike.

    Args:
        model: on the meta device, or a stage of it.
        inputs: what a batch is.
    """
    settings = [_settings(layer) for layer in layers_of(model).values()]
    numbers = [int(name) if name.isdecimal() else -1 for name in layers_of(model)]
    # A layer that knows its number is not different for it.
    shared = set.intersection(*(set(s) for s in settings)) if settings else set()
    own_number = {
        key
        for key in shared
        if all(s[key] == n for s, n in zip(settings, numbers, strict=True)) and len(settings) > 1
    }
    calls = _calls(model, inputs.batch(1, seq_len, "meta"))
    return [
        repr([call, *((key, value) for key, value in s.items() if key not in own_number)])
        for s, call in zip(settings, calls, strict=True)
    ]


def _calls(model: nn.Module, batch: Batch) -> list[object]:
    """What each layer gets besides hidden states: masks, rotations. Equal for the same objects.

    A model may treat layers of the same kind differently, with a window for some of them.
    """
    layers = list(layers_of(model).values())
    calls: dict[nn.Module, object] = {}
    numbers: dict[int, int] = {}
    alive: list[object] = []  # so that no address is used twice

    def stub(layer: nn.Module, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        leaves = tree_leaves((args, kwargs))
        alive.extend(leaves)
        calls[layer] = [
            leaf
            if isinstance(leaf, bool | int | float | str | None)
            else f"object {numbers.setdefault(id(leaf), len(numbers))}"
            for leaf in leaves
        ]
        return hidden.float()  # tokens, where a stage begins with layers

    with torch.device("meta"), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patch.object(layer, "forward", partial(stub, layer)))
        # What follows the layers may fail, where they got tokens for hidden states. A model of the
        # user's may need other inputs still, and its layers are taken as all different.
        with suppress(Exception):
            model(batch["tokens"], **own_inputs(batch))
    if len(calls) < len(layers):
        return list(range(len(layers)))
    return [calls[layer] for layer in layers]


def _settings(layer: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, module in layer.named_modules():
        found[f"{name}:class"] = type(module).__qualname__
        for key, value in vars(module).items():
            if isinstance(value, bool | int | float | str | tuple | None) and key != "training":
                found[f"{name}.{key}"] = value
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        found[f"{name}:shape"] = (*tensor.shape, str(tensor.dtype), tensor.requires_grad)
    return found
