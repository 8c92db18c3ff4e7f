"""Checks the backward pass against the forward pass: a gradient is the slope of the loss.

The loss is measured slightly before and after the weights, along the gradient and some noise, in
float64 even where the model asks for less: differences are then known to many digits. A model whose
kernels have no float64 is measured in float32, which finds errors of a percent. Harmless
deviations from a derivative are detected or declared: rounding by its operations, jumps (such as
tokens that change their expert) by estimates that disagree, a loss added in the backward pass by
its gradient, and everything else by `ModelProtocol.estimates_gradients`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.components.data_loader import has_own_loader
from torchtitan.tools.text import first_line

from .batches import Example, random_example
from .check import CheckFailedError, Checks, NotApplicableError
from .float64 import default_float64, grouped_mm
from .probe import recorded_outputs
from .subject import Subject

CHECKS = Checks("contract.forward", "learning.gradients")


@dataclass(frozen=True)
class _Precision:
    """The dtype in which the loss is computed decides how exactly its slope can be measured."""

    steps: tuple[float, ...]
    """Distances from the weights at which the loss is measured, as a share of their norm."""
    tolerance: float
    """For the slope along one parameter's change, relative to that by its gradient."""
    noise: float = 0.0
    """Changes of the loss below this share of it are not used."""
    apart: float = 0.0
    """How much two steps' differences may differ by rounding."""


_DOUBLE = _Precision((1e-6, 1e-5, 1e-4, 1e-3), tolerance=1e-4)
"""Correct slopes are within 1e-6."""
_SINGLE = _Precision((1e-3, 3e-3, 1e-2, 3e-2), tolerance=1e-2, noise=1e-4, apart=2e-3)
"""Correct slopes are within 4e-3."""
_AGREE = 0.02
"""Relative tolerance within which two steps' differences from the gradient agree."""
_OF_SEVERAL = 1e-5
"""Tolerance for several parameters' changes together, one of which may have a wrong gradient."""
_LEAST = 1e-3
"""Share of a group's largest influence on the loss below which a parameter counts less."""

_WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}
_FLOATS = {*_WIDER, *_WIDER.values()}
_ROUNDS = {"round", "floor", "ceil", "trunc", "sign", "sgn", "bucketize", "heaviside"}


@CHECKS.of("learning.slope", "gradients are the derivatives of the loss")
def gradients_are_slopes(subject: Subject) -> str:
    if subject.spec.model_cls.estimates_gradients:
        raise NotApplicableError(f"{subject.spec.model_cls.__name__}.estimates_gradients is True")
    model, example = subject.build_varied().train(), subject.example(2, 24)
    of_texts = subject.reads_text or not has_own_loader(subject.spec.build_dataloader_fn)
    if of_texts and subject.own_loss is not None:
        # Its value may lack a part that its gradient has, as in main + (aux - aux.detach()).
        model, example = model.eval(), random_example(subject.random_tokens(2, 24))
    try:
        with _InFloat64() as mode, default_float64():
            return _compared(_Loss(model.double(), example.in_float64(), mode, _DOUBLE))
    except (NotApplicableError, CheckFailedError):
        raise
    except Exception as error:  # the model requires a dtype, or has kernels that do
        reason = first_line(error)
    with _InFloat64(widens=False) as mode:
        compared = _compared(_Loss(model.float(), example, mode, _SINGLE))
    return f"{compared}, in float32, since it does not run in float64: {reason}"


def _compared(loss: _Loss) -> str:
    """Return how exact the gradients are. Raise `CheckFailedError` if some are wrong."""
    names, tolerance = list(loss.gradients), loss.precision.tolerance
    if loss.precision is _DOUBLE:
        difference = loss.difference(names)
        if difference <= _OF_SEVERAL:
            return f"along {len(names)} parameters' gradients, to {difference:.0e}"
        groups = [group for group in loss.groups() if loss.difference(group) > _OF_SEVERAL]
        names = [name for group in groups for name in group]
    found = {name: loss.differs([name], tolerance) for name in names}
    found = {name: difference for name, difference in found.items() if difference}
    if not found:
        left = f", {len(loss.unmeasured)} others could not be measured" if loss.unmeasured else ""
        measured = len(loss.gradients) - len(loss.unmeasured)
        return f"{measured} parameters, each within {tolerance:.0e}{left}"
    last = max(found, key=lambda name: loss.order.get(name.rpartition(".")[0], -1))
    largest = max(found, key=lambda name: found[name])
    raise CheckFailedError(
        f"{len(found)} of {len(loss.gradients)} parameters have gradients that are not the slope "
        f"of the loss: the last in the order of forward() is {last}, whose slope is other by "
        f"{found[last]:.2%}; the largest difference is {found[largest]:.2%}, of {largest}",
        f"The backward pass of what follows {last.rpartition('.')[0]} is wrong: a "
        "torch.autograd.Function whose backward() is not the derivative of its forward(), or a "
        "detach() or no_grad() on the way, as in a norm's scale. If gradients are meant to be "
        "others (a straight-through estimator), say so in the model's class: "
        "estimates_gradients = True.",
    )


class _Loss:
    """The loss of a model as a function of its weights, with its gradients.

    Raises:
        NotApplicableError: the loss has no slope.
    """

    def __init__(
        self, model: nn.Module, example: Example, mode: _InFloat64, precision: _Precision
    ) -> None:
        self._model, self._example, self._mode = model, example, mode
        self.precision = precision
        with recorded_outputs(model) as outputs:
            loss = self._measured()
        self.order = {name: number for number, name in enumerate(outputs)}
        """Modules by order of completion."""
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        whole, added = self._gradients(loss, 1.0), self._gradients(loss, 0.0)
        self.gradients = {name: grad - added[name] for name, grad in whole.items()}
        again = self._measured()
        if not torch.equal(again, loss):
            raise NotApplicableError("the same tokens give another loss the second time in train()")
        self._rounded = list(mode.rounded)
        self._noise = precision.noise * abs(loss.item())
        self.unmeasured: set[str] = set()
        """Parameters that change the loss too little, or not smoothly."""

    def _gradients(self, loss: torch.Tensor, weight: float) -> dict[str, torch.Tensor]:
        """Return the gradients of `weight` times the loss, plus those the backward pass adds."""
        grads = torch.autograd.grad(
            *(loss, list(self._parameters.values()), torch.full_like(loss, weight)),
            materialize_grads=True,
            retain_graph=True,
        )
        return dict(zip(self._parameters, grads, strict=True))

    def _measured(self) -> torch.Tensor:
        self._mode.rounded.clear()
        torch.manual_seed(0)  # for dropout
        return self._example.loss(self._example.run(self._model))

    def groups(self) -> list[list[str]]:
        """Return the names of the parameters of each layer, and of those outside of layers."""
        groups: dict[str, list[str]] = {}
        for name in self.gradients:
            parts = name.split(".")
            groups.setdefault(parts[1] if parts[0] == "layers" else "", []).append(name)
        return list(groups.values())

    def difference(self, names: list[str]) -> float:
        """Return the relative difference of the slope from the gradients, at the best step."""
        return min(map(abs, self._differences(names, _OF_SEVERAL)), default=0.0)

    def differs(self, names: list[str], tolerance: float) -> float:
        """Return the same, by steps that agree; 0 if none do, or if it is within the tolerance."""
        found = self._differences(names, tolerance)
        if min(map(abs, found), default=0.0) <= tolerance:
            return 0.0
        agree = [
            abs(a - b) <= _AGREE * min(abs(a), abs(b)) + self.precision.apart
            for a, b in pairwise(found)
        ]
        # Without any two that agree, the loss is not smooth; long steps may agree by chance.
        smooth = any(agree) if self.precision is _DOUBLE else bool(agree) and all(agree)
        if not smooth:
            self.unmeasured.update(names)
            return 0.0
        return abs(found[agree.index(True)])

    def _differences(self, names: list[str], enough: float) -> list[float]:
        """Return the difference for each step, until one is small enough.

        Raises:
            NotApplicableError: forward() rounds values that depend on the weights.
        """
        directions, expected = self._directions(names)
        found: list[float] = []
        for step in self.precision.steps if expected else ():
            if 2 * step * expected < self._noise:
                continue
            up, down = self._at(directions, step), self._at(directions, -step)
            found.append((up - down) / (2 * step) / expected - 1)
            if abs(found[-1]) <= enough:
                break
        if not found:
            self.unmeasured.update(names)
        return found

    def _directions(self, names: list[str]) -> tuple[dict[str, torch.Tensor], float]:
        """Return a change of each parameter, mostly along its gradient, with similar effects.

        Returns:
            changes: at most as large as the parameter.
            slope: of the loss along all changes, according to the gradients.
        """
        influence = {
            name: (self._parameters[name].norm() * self.gradients[name].norm()).item()
            for name in names
        }
        most = max(influence.values())
        influence = {n: value for n, value in influence.items() if value > _LEAST**2 * most}
        if not influence:
            return {}, 0.0
        each = max(min(influence.values()), _LEAST * most)
        changes, slope = {}, 0.0
        generator = torch.Generator().manual_seed(0)
        for name, value in influence.items():
            gradient, size = self.gradients[name], self._parameters[name].detach().norm()
            noise = torch.randn(gradient.shape, generator=generator)
            # A part that the gradient lacks is orthogonal to the gradient, but not to the noise.
            direction = (2 * gradient / gradient.norm() + noise / noise.norm()) / 3
            changes[name] = min(each / value, 1.0) * size * direction
            slope += (gradient * changes[name]).sum().item()
        return changes, slope

    def _at(self, changes: dict[str, torch.Tensor], step: float) -> float:
        kept = {name: self._parameters[name].detach().clone() for name in changes}
        with torch.no_grad():
            for name, change in changes.items():
                self._parameters[name].add_(change, alpha=step)
        try:
            loss = self._measured().item()
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    self._parameters[name].copy_(value)
        if self._mode.rounded != self._rounded:
            raise NotApplicableError("forward() rounds what depends on weights")
        return loss


class _InFloat64(TorchDispatchMode):
    """Makes operations return float64 where they are asked for less, if it `widens`."""

    def __init__(self, widens: bool = True) -> None:
        super().__init__()
        self._widens = widens
        self.rounded: list[float] = []
        """Sums of the tensors that were rounded."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__.removesuffix("_")  # also in place
        rounds = name in _ROUNDS or (  # to integers, or to 8 bits
            name == "_to_copy" and kwargs.get("dtype", torch.float64) not in _FLOATS
        )
        if rounds and args[0].is_floating_point():
            self.rounded.append(args[0].sum().item())
        if self._widens and kwargs.get("dtype") in _WIDER:
            kwargs["dtype"] = _WIDER[kwargs["dtype"]]
        if name == "_grouped_mm" and args[0].dtype == torch.float64:
            return grouped_mm(*args, **kwargs)
        return func(*args, **kwargs)
