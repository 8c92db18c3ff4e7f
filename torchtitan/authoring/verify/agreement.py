"""Compares two runs of a model that must agree on some tokens, though they differ on others.

The comparison uses tensors with known dimensions: the logits, and the hidden states between layers,
`[batch, seq, dim]`. Tensors inside of a layer may have any order, such as `[batch, channels, seq]`
before a convolution, and may hold more than the layer passes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn

from .probe import States, named_layers, recorded_outputs, recorded_states, relative_difference

TOLERANCE = 1e-4
"""For logits in float32, relative to the largest: allows for the order of sums. A dependence on
another token is orders of magnitude larger."""
_ROUNDING = 1e-6
"""For hidden states, relative to the largest: a layer's change of them has at least this error."""


@dataclass
class Run:
    """The recording of a forward pass."""

    logits: torch.Tensor
    """`[batch, seq, vocab]`."""
    modules: dict[str, torch.Tensor]
    """Name of each module -> its last output, in the order in which they finish."""
    layers: States


@torch.no_grad()
def run_of(model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> Run:
    return run_with_gradients(model, tokens, **inputs)


def run_with_gradients(model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> Run:
    torch.manual_seed(0)
    with recorded_outputs(model) as modules, recorded_states(named_layers(model)) as layers:
        return Run(model(tokens, **inputs), modules, layers)


def disagreement(
    actual: Run, expected: Run, places: slice = slice(None), rows: slice = slice(None)
) -> tuple[float, str]:
    """Return the largest relative difference of logits, and the first module that differs.

    The name is "" if the runs agree. Layers are compared more strictly than logits, since their
    change of an untrained model's hidden states is small.

    Args:
        places: tokens to compare.
        rows: sequences of `expected` that `actual` has.
    """
    difference = relative_difference(actual.logits[:, places], expected.logits[rows, places])
    layer = ""
    for name, states in expected.layers.items():
        if name in actual.layers and _layer_differs(
            *(state[:, places] for state in actual.layers[name]),
            *(state[rows, places] for state in states),
        ):
            layer = name
            break
    if difference <= TOLERANCE and not layer:
        return difference, ""
    return difference, _first_module(actual, expected, places, rows) or layer or "unknown"


def _layer_differs(
    actual_input: torch.Tensor,
    actual: torch.Tensor,
    expected_input: torch.Tensor,
    expected: torch.Tensor,
) -> bool:
    """Whether a layer's outputs differ, by their own scale or by that of the layer's change."""
    if relative_difference(actual, expected) > TOLERANCE:
        return True
    if expected_input.shape != expected.shape:
        return False
    added = expected.float() - expected_input.float()
    change = (actual.float() - actual_input.float() - added).abs().max()
    known = TOLERANCE * added.abs().max() + _ROUNDING * expected.abs().max()
    return bool(change > known)


def _first_module(actual: Run, expected: Run, places: slice, rows: slice) -> str:
    """Return the first module that differs and whose output looks like `[batch, seq, features]`.

    The output of a convolution does not show whether it is `[batch, features, seq]`.
    """
    for name, tensor in expected.modules.items():
        other = actual.modules.get(name)
        if other is None or not tensor.is_floating_point():
            continue
        if tensor.ndim != 3 or tensor.shape[:2] != expected.logits.shape[:2]:
            continue
        if other.ndim != 3 or other.shape[:2] != actual.logits.shape[:2]:
            continue
        a, b = other[:, places], tensor[rows, places]
        if a.shape == b.shape and relative_difference(a, b) > TOLERANCE:
            return name
    return ""
