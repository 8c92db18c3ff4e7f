"""Checks on a CPU that a model makes its tensors on the device of its weights.

Weights and inputs stand for tensors on a GPU, and tensors made without `device=...` for those on
the CPU. A result is where its inputs are. Where both kinds meet, a GPU raises an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from torchtitan.distributed.init import SeededInit, set_weights
from torchtitan.distributed.tying import allocate

from .check import CheckFailedError, Checks
from .probe import accepts, calling_line, document_inputs, packed_documents
from .subject import Subject
from .weights import state_of

CHECKS = Checks("contract.forward")


@CHECKS.of("contract.device", "tensors are made on the device of the weights")
def tensors_are_on_the_device(subject: Subject) -> str:
    model, example = subject.spec.meta_model(subject.args), subject.example(2)
    allocate(model, "cpu")
    inputs = [example.inputs]
    if subject.reads_text and accepts(type(model), "document_ids"):
        document_ids = packed_documents(*example.tokens.shape)
        inputs.append(example.inputs | document_inputs(model, document_ids))
    with _TwoDevices() as devices:
        with torch.no_grad(), SeededInit(model, subject.seed):
            set_weights(model)
        for name, tensor in state_of(model):
            if place := _made_by(tensor):
                raise CheckFailedError(
                    f"after init_weights(), {name} is on the CPU, wherever the other weights are: "
                    f"{place} makes it without device=...",
                    "init_weights(): set it in place, such as self.NAME.copy_(...).",
                )
        for training in (False, True):
            for given in inputs:
                model.train(training)
                model(example.tokens, **given)
        example.loss(example.run(model))
    return f"{devices.calls} calls"


class _TwoDevices(TorchFunctionMode):
    """Marks tensors that are made without a device, and refuses operations that mix both kinds.

    Raises:
        CheckFailedError: an operation has inputs of both kinds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        name = getattr(func, "__name__", "")
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        places = [_made_by(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        if not inputs:
            if kwargs.get("device") is None:
                _mark(result, f"{_name_of(func)} ({calling_line(__file__)})")
        elif name in _MOVES and places[0] and _names_a_device(args[1:], kwargs):
            return result.view_as(result)  # without a mark
        elif name in (*_MOVES, *_TAKES_A_SHAPE):
            _mark(result, places[0])
        elif name not in _TAKES_BOTH:
            larger = [p for tensor, p in zip(inputs, places, strict=True) if tensor.ndim]
            if name == "__getitem__":  # indices may be on the CPU
                larger = larger if places[0] else [""]
            if any(larger) and not all(larger):
                host = next(place for place in larger if place)
                raise CheckFailedError(
                    f"{host} makes a tensor on the CPU, wherever the weights are, and "
                    f"{_name_of(func)} ({calling_line(__file__)}) combines it with one of the "
                    "model",
                    "On a GPU, this fails. Give the device: torch.arange(seq, device=x.device), or "
                    "x.new_zeros(...).",
                )
            _mark(result, places[0] if all(places) else "")
        return result


_MOVES = ("to", "type_as")
_TAKES_A_SHAPE = ("view_as", "expand_as", "reshape_as", "tensor_split")
"""Methods that need no values of the second tensor, or need them on the CPU."""
_TAKES_BOTH = ("copy_", "__setitem__", "__set__", "set_", "ctc_loss", "_pack_padded_sequence")
"""Functions that may be given tensors of several devices, the last two lengths on the CPU."""


def _names_a_device(args: Any, kwargs: dict[str, Any]) -> bool:
    return any(isinstance(v, torch.Tensor | torch.device | str) for v in (*args, *kwargs.values()))


def _mark(result: Any, place: str) -> None:
    for tensor in tree_leaves(result):
        if place and isinstance(tensor, torch.Tensor):
            tensor._made_by = place  # type: ignore[attr-defined]


def _made_by(tensor: torch.Tensor) -> str:
    """Return the call that made a tensor on the CPU; "" for those on the device of the weights."""
    return getattr(tensor, "_made_by", "")


def _name_of(func: Callable[..., Any]) -> str:
    return resolve_name(func) or getattr(func, "__name__", str(func))
