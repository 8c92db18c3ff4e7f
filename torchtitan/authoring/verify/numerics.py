"""Checks precision: bfloat16 near float32, the dtypes of outputs, no accidental float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map
from torch.utils.module_tracker import ModuleTracker

from torchtitan.components.model_inputs import in_precision
from torchtitan.distributed.blocks import blocks_of

from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .dtypes import WIDE, Dtypes
from .learning import FEW_TOKENS
from .probe import accepts, recorded_outputs
from .subject import Subject

CHECKS = Checks("contract.forward")

BF16_TOLERANCE = 0.05
"""Norm of the error of a token's logits in bfloat16, relative to the logits' norm. The median over
tokens is used, since rounded scores route some tokens to other experts."""

BF16_GRADIENT_TOLERANCE = 0.25
"""Norm of the error of a parameter's gradient in bfloat16, relative to the gradient's norm. Correct
ones are within 0.15, most within 0.03."""
_OF_OUTPUT = 6.0
"""Error of all gradients together, relative to that of the outputs. Correct ones are within 4."""
_LEAST = 1e-4
"""Share of the norm of all gradients below which a parameter's gradient is noise."""


@CHECKS.of("numerics.bf16", "bfloat16 results are close to float32")
def bf16_is_near_float32(subject: Subject) -> str:
    model = subject.build_varied()
    example = subject.example(1 if subject.reads_text else 8, subject.at_most(1024))
    with torch.no_grad(), recorded_outputs(model) as wide:
        expected = example.run(model)
    worst, given = 0.0, example.cast(torch.bfloat16)  # as in the trainer
    for cast, description in _CASTS.items():
        with torch.no_grad(), cast(model), recorded_outputs(model) as narrow:
            actual = given.run(model)
        difference = _median_difference(actual, expected)
        losses = example.loss(actual).item(), example.loss(expected).item()
        worst = max(worst, difference)
        if not difference < BF16_TOLERANCE or abs(losses[0] - losses[1]) > 0.02 * abs(losses[1]):
            raise CheckFailedError(
                f"with {description}, logits differ from float32 by {difference:.1%} (loss "
                f"{losses[0]:.4f}, not {losses[1]:.4f}){_first_coarse(narrow, wide)}",
                _hint(
                    cast,
                    "Use float32 where it is needed: rotary angles and positions (bfloat16 has no "
                    "integers above 256), the mean of squares in norms, softmax and routing "
                    "scores. Buffers with angles stay float32.",
                ),
            )
    return f"logits within {worst:.1%} at {example.labels.shape[1]} tokens"


@CHECKS.of("numerics.bf16_gradients", "bfloat16 gradients are close to float32")
def bf16_gradients_are_near_float32(subject: Subject) -> str:
    """Kernels have code of their own for a dtype, and `learning.slope` runs only float64's."""
    model, example = subject.build_varied(), subject.example(8, 64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run(example: Example) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        output = example.run(model)
        grads = torch.autograd.grad(
            example.loss(output), list(parameters.values()), materialize_grads=True
        )
        named = zip(parameters, (grad.float() for grad in grads), strict=True)
        return output.detach().float(), dict(named)

    output, exact = run(example)
    size = _norm_of_all(exact)
    worst = 0.0
    for cast in (autocast, _cast_as_fsdp):
        with cast(model):
            rounded, grads = run(example.cast(torch.bfloat16))
        errors = {name: grad - exact[name] for name, grad in grads.items()}
        differences = {
            name: (error.norm() / exact[name].norm().clamp(min=_LEAST * size)).item()
            for name, error in errors.items()
            if not FEW_TOKENS.search(name)  # tokens may go to other experts
        }
        of_output = ((rounded - output).norm() / output.norm()).item()
        of_all = (_norm_of_all(errors) / size).item()
        name = max(differences, key=lambda name: differences[name])
        worst = max(worst, differences[name])
        if not differences[name] <= BF16_GRADIENT_TOLERANCE:
            found = f"the gradient of {name} differs from float32 by {differences[name]:.1%}"
        elif not of_all <= max(_OF_OUTPUT * of_output, BF16_TOLERANCE):  # or NaN
            found = f"gradients differ from float32 by {of_all:.1%}, but outputs by {of_output:.1%}"
        else:
            continue
        raise CheckFailedError(
            f"with {_CASTS[cast]}, {found}",
            "The backward pass of a torch.autograd.Function or custom operator is wrong or coarse "
            "in bfloat16: compute scales and sums in float32, and round only the result.",
        )
    return f"each within {worst:.1%}"


def _norm_of_all(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors.values()]).norm()


@CHECKS.of(
    "numerics.bf16_positions",
    "bfloat16 leaves positions exact",
    needs=("contract.layers", "contract.forward"),
)
@torch.no_grad()
def positions_are_exact_in_bf16(subject: Subject) -> str:
    """bfloat16 makes no larger difference at late positions than at early ones.

    An untrained model attends nearly evenly, so wrong angles hardly show. Larger weights make the
    scores matter.
    """
    if not accepts(subject.spec.model_cls, "positions"):
        raise NotApplicableError("forward() takes no positions")
    seq = subject.at_most(256)
    shift = subject.at_most(_LATE + seq) - seq
    if shift < 256:  # all positions are exact in bfloat16
        raise NotApplicableError(
            f"the model takes at most {shift + seq} tokens, so there are no late positions"
        )
    model, tokens = subject.build_varied(), subject.tokens(1, seq)
    for parameter in model.layers.parameters():
        if parameter.ndim > 1:
            parameter.mul_(_SHARPER)
    early = torch.arange(seq)[None]
    late = early + shift
    worst, exact = 0.0, []
    for positions in (early, late):
        with recorded_outputs(model) as wide:
            exact.append((positions, model(tokens, positions=positions), wide))
    for cast, description in _CASTS.items():
        differences, modules = [], []
        for positions, expected, wide in exact:
            with cast(model), recorded_outputs(model) as narrow:
                actual = model(tokens, positions=positions)
            differences.append(_median_difference(actual, expected))
            modules.append(_differences(narrow, wide))
        ratio = differences[1] / max(differences[0], 1e-6)
        worst = max(worst, ratio)
        if ratio > 2:
            names = [n for n, d in modules[1].items() if d > 1e-3 + 2 * modules[0].get(n, d)]
            raise CheckFailedError(
                f"with {description}, logits differ from float32 by {differences[1]:.1%} at "
                f"positions from {shift} on, but by {differences[0]:.1%} from 0 on"
                + (f"; the first module that shows it is {names[0]}" if names else ""),
                _hint(
                    cast,
                    "Positions and rotary angles must stay float32: bfloat16 has no integers "
                    "above 256. Compute them as positions.float() * frequencies, not with einsum "
                    "or @, which autocast casts; and rotate in float32.",
                ),
            )
    return f"{worst:.2f} times the difference at position {shift}"


_LATE = 4000
"""The first late position in `positions_are_exact_in_bf16`."""
_SHARPER = 4.0
"""Factor on the layers' matrices in `positions_are_exact_in_bf16`."""


def _differences(
    narrow: dict[str, torch.Tensor], wide: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Return the difference of the outputs `[batch, seq, features]`, by module."""
    return {
        name: _median_difference(narrow[name], expected)
        for name, expected in wide.items()
        if expected.ndim == 3 and name in narrow and narrow[name].shape == expected.shape
    }


def _first_coarse(narrow: dict[str, torch.Tensor], wide: dict[str, torch.Tensor]) -> str:
    for name, difference in _differences(narrow, wide).items():
        if not difference < BF16_TOLERANCE:
            return f"; the first module that differs so much is {name}"
    return ""


def _median_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference of two `[batch, seq, features]`, the median over tokens."""
    expected = expected.float()
    difference = (actual.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
    return difference.median().item()


@contextmanager
def autocast(model: nn.Module) -> Iterator[None]:
    """Use mixed precision as in training on one process, within the context."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def _cast_parameters(model: nn.Module) -> Iterator[None]:
    """Use mixed precision as FSDP: parameters in bfloat16, buffers unchanged."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]


@contextmanager
def _cast_as_fsdp(model: nn.Module) -> Iterator[None]:
    """Cast as FSDP does in training: parameters, and the arguments of blocks."""

    def narrow(value: Any) -> Any:
        return in_precision(value, torch.bfloat16) if isinstance(value, torch.Tensor) else value

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(narrow, args), tree_map(narrow, kwargs)

    has_layers = isinstance(getattr(model, "layers", None), nn.ModuleDict)  # see contract.layers
    with ExitStack() as stack:
        for block in blocks_of(model).values() if has_layers else ():
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(_cast_parameters(model))
        yield


_CASTS = {
    autocast: "autocast",
    _cast_parameters: "bfloat16 parameters",
    _cast_as_fsdp: "bfloat16 parameters and arguments of layers",
}
"""The ways in which jobs compute in bfloat16 -> their names."""


def _hint(cast: Any, usual: str) -> str:
    """Return the hint for a cast; the casts listed before it have passed."""
    if cast is not _cast_as_fsdp:
        return usual
    return (
        "FSDP casts the floating-point tensors that a layer is called with to bfloat16, which has "
        "8 bits of precision, too few for angles and positions. Pass on their cosine and sine, "
        "complex numbers, or the integer positions, and compute the angles within the layer in "
        "float32."
    )


@CHECKS.of("numerics.dtype", "logits are in the weights' dtype or float32, the loss in float32")
def logits_are_of_the_right_dtype(subject: Subject) -> str:
    model, example = subject.build(), subject.example(1)
    with torch.no_grad():
        found = {torch.float32: example.run(model).dtype}
        with _cast_parameters(model):
            output = example.cast(torch.bfloat16).run(model)
            found[torch.bfloat16], loss = output.dtype, example.loss(output)
    for weights, logits in found.items():
        if logits not in (weights, torch.float32):
            raise CheckFailedError(
                f"with weights in {weights}, the logits are {logits}",
                "Return logits in the dtype of the weights or in float32.",
            )
    if loss.dtype != torch.float32:
        raise CheckFailedError(
            f"with weights in torch.bfloat16, the loss is {loss.dtype}",
            "build_loss_fn: compute the loss in float32, from pred.float(): bfloat16 rounds a sum "
            "over thousands of tokens to 8 bits.",
        )
    return ", ".join(f"{weights} -> {logits}" for weights, logits in found.items()).replace(
        "torch.", ""
    )


@CHECKS.of("numerics.float64", "no tensor is float64")
def nothing_is_float64(subject: Subject) -> str:
    model, example = subject.build().train(), subject.example(1)
    with ModuleTracker() as tracker, Dtypes(tracker, WIDE) as wide:
        output = example.run(model)
        with _disable_current_modes():  # an author's loss may count in float64
            loss = example.loss(output)
        loss.backward()
    if wide.found:
        (module, operation, dtype), count = next(iter(wide.found)), len(wide.found)
        raise CheckFailedError(
            f"{operation} in {module} makes a {dtype} tensor"
            + (f" (and {count - 1} other operations)" if count > 1 else ""),
            "Give the dtype: torch.arange(..., dtype=torch.float32), torch.tensor(x, "
            "dtype=torch.float32), and from numpy tensor.float(). float64 is many times slower on "
            "GPUs, and spreads.",
        )
    return f"{wide.operations} operations"
