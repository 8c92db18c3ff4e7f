"""Finds layers that repeat: only a few of them are traced, and the rest is extrapolated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
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
"""Layers at each end that differ from those between, since FSDP holds a layer and the next."""


@dataclass(frozen=True)
class Repetition:
    """Layers of a model that repeat: after the `first` layers, `repeats` times the same `period`.

    The model is extrapolated from traces with 2 * `edge` of these repetitions, and with one more.
    """

    first: int
    period: int
    repeats: int

    @property
    def edge(self) -> int:
        """Repetitions at each end that differ from those between."""
        return math.ceil(_EDGE / self.period)

    @property
    def left_out(self) -> int:
        """Repetitions that are only extrapolated."""
        return self.repeats - 2 * self.edge


def repetitions(
    model: nn.Module, seq_len: int, multiple: int = 1, inputs: Inputs = TOKEN_IDS
) -> list[Repetition]:
    """Return the repetitions from which a model is extrapolated with the fewest traced layers.

    Args:
        inputs: form of a batch.
        multiple: periods are multiples of this, if every n-th layer is treated differently.
    """
    signatures = layer_signatures(model, seq_len, inputs)
    found = []
    end = len(signatures)
    while last := _last_repetition(signatures[:end], multiple):
        found.append(last)
        end = last.first
    chosen: list[Repetition] = []
    fewest = len(signatures)
    found.sort(key=lambda each: each.left_out * each.period, reverse=True)
    for count in range(1, len(found) + 1):
        some = found[:count]
        shallow = len(signatures) - sum(each.left_out * each.period for each in some)
        traced = (count + 1) * shallow + sum(each.period for each in some)
        if traced < fewest:
            chosen, fewest = some, traced
    return sorted(chosen, key=lambda each: each.first)


def _last_repetition(signatures: list[str], multiple: int) -> Repetition | None:
    """Return the repetition at the end with the fewest different layers from the beginning."""
    layers, best = len(signatures), None
    for period in range(multiple, layers // 2 + 1, multiple):
        same = 0
        while same < layers - period and signatures[-1 - same] == signatures[-1 - same - period]:
            same += 1
        repeats = (same + period) // period
        found = Repetition(layers - repeats * period, period, repeats)
        different = found.first + period
        if repeats > 1 and (best is None or different < best.first + best.period):
            best = found
    return best


def layers_left_out(
    model: nn.Module, found: list[Repetition], longer: Repetition | None = None
) -> list[str]:
    """Return the names of the layers that are only extrapolated, but one repetition of `longer`."""
    names, left_out = list(layers_of(model)), []
    for each in found:
        end = each.first + each.repeats * each.period
        count = each.left_out - (each == longer)
        left_out += names[end - count * each.period : end]
    return left_out


def leave_out_layers(
    model: nn.Module, found: list[Repetition], longer: Repetition | None = None
) -> None:
    """Remove the layers that are only extrapolated, but one repetition of `longer`."""
    layers = layers_of(model)
    for name in layers_left_out(model, found, longer):
        del layers[name]


def layer_signatures(model: nn.Module, seq_len: int, inputs: Inputs) -> list[str]:
    """Return a text for each of `model.layers`, equal for layers with equal modules, shapes and
    settings that the model calls alike.

    Args:
        model: on the meta device, or a stage of it.
        inputs: form of a batch.
    """
    settings = [_settings(layer) for layer in layers_of(model).values()]
    numbers = [int(name) if name.isdecimal() else -1 for name in layers_of(model)]
    # Layers that differ only in knowing their own number are equal.
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
    """Return the arguments of each layer besides hidden states, such as masks or rotations.

    The same object gives the same value. A model may treat layers of the same kind differently,
    such as with a window for some of them. If it cannot do with fewer layers, each gets its own.
    """
    layers = list(layers_of(model).values())
    if not layers:
        return []
    calls: dict[nn.Module, object] = {}
    numbers: dict[int, int] = {}
    alive: list[object] = []  # keeps objects alive, so that no id is reused

    def stub(layer: nn.Module, hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        leaves = tree_leaves((args, kwargs))
        alive.extend(leaves)
        calls[layer] = [
            leaf
            if isinstance(leaf, bool | int | float | str | None)
            else f"object {numbers.setdefault(id(leaf), len(numbers))}"
            for leaf in leaves
        ]
        return hidden.float()  # these are tokens, if a stage begins with layers

    def failure() -> type[Exception] | None:
        # Code after the layers may fail, if it gets tokens instead of hidden states. A user's model
        # may need other inputs as well; then all its layers count as different.
        try:
            model(batch["tokens"], **own_inputs(batch))
        except Exception as error:
            return type(error)
        return None

    with torch.device("meta"), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.enter_context(patch.object(layer, "forward", partial(stub, layer)))
        outcome, found = failure(), dict(calls)
        with _without_last_layer(model):
            alike = failure() is outcome
    if len(found) < len(layers) or not alike:
        return list(range(len(layers)))
    return [found[layer] for layer in layers]


@contextmanager
def _without_last_layer(model: nn.Module) -> Iterator[None]:
    layers = layers_of(model)
    name = list(layers)[-1]
    layer = layers.pop(name)
    try:
        yield
    finally:
        layers[name] = layer


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
