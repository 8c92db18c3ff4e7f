"""Inspects a model: the data flow between its layers, and differences between two runs."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.distributed.determinism import derive_seed
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.stage_copies import with_absent_modules
from torchtitan.models.common.attention import places_in_documents
from torchtitan.protocols.model import ModelProtocol, layers_of

from .check import NotApplicableError

NOISE = 0.02
"""Standard deviation of the noise that is added to constant weights."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TORCH = os.path.dirname(torch.__file__) + os.sep


@torch.no_grad()
def vary_constants(model: nn.Module, seed: int) -> None:
    """Add noise to the zeros of all parameters, and to parameters whose numbers are all the same.

    An output projection that starts at 0 makes its layer the identity, which hides everything that
    the layer does, right or wrong. Adding noise is fair: invariances must hold for any weights. The
    noise is a function of the seed and the parameter's name, like initial weights.
    """
    own = set(model.parameters())
    with with_absent_modules(model):  # copies of a shared weight get equal noise
        named = [pair for pair in model.named_parameters() if pair[1] in own]
    for name, parameter in named:
        with_noise(parameter, derive_seed(seed, "noise", canonical_name(name)))


def with_noise(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Change the zeros of a tensor in place, and all of it if it is constant."""
    if tensor.dtype not in _FLOATS:
        return tensor
    constant = tensor == (tensor.flatten()[0] if is_constant(tensor) else 0)
    generator = torch.Generator().manual_seed(seed)
    noise = NOISE * torch.randn(tensor.shape, generator=generator)
    return tensor.add_(noise.to(tensor.dtype) * constant)


def is_constant(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are the same; False for quantised tensors."""
    if tensor.dtype not in _FLOATS or tensor.numel() == 0:
        return False
    return bool(tensor.min() == tensor.max())


States = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name of a module -> the hidden states of its last call: input and output.

Without modules that have none, such as an embedding, or experts without a batch dimension."""


@dataclass
class CutLayer:
    """A layer whose input was detached from the computation before it."""

    name: str
    module: nn.Module
    input: torch.Tensor
    """`[batch, seq, dim]`, a leaf that requires gradients."""
    output: torch.Tensor
    """`[batch, seq, dim]`."""
    args: tuple[Any, ...]
    """The arguments of the call, `input` among them."""
    kwargs: dict[str, Any]

    def rerun(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for other hidden states, with its other inputs unchanged."""
        args = tuple(hidden if value is self.input else value for value in self.args)
        kwargs = {k: hidden if v is self.input else v for k, v in self.kwargs.items()}
        return hidden_states(self.module(*args, **kwargs))

    def gradient(self, where: tuple[Any, ...]) -> torch.Tensor:
        """Measure the dependence of the output at the places `where` on each feature of the input.

        Returns:
            `[batch, seq]`: for each token, the largest gradient of a random weighting of the output
            at `where`. 0 where there is no path, or where paths cancel out but for rounding.
        """
        grad = self._at(where)
        return grad.masked_fill(grad <= self._rounding, 0.0)

    @cached_property
    def _rounding(self) -> float:
        """What is left where paths cancel out, such as two sums whose difference is a document's.

        Compared with what the last token sees of others, so that its own residual does not count.
        """
        return 1e-5 * float(self._at((slice(None), -1))[:, :-1].max())

    def _at(self, where: tuple[Any, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        part = self.output[where]
        weights = torch.randn(part.shape, generator=generator).to(part.dtype)
        return self._backward(part, weights)

    def adds_gradients(self) -> bool:
        """Whether the backward pass adds gradients that do not come from the output.

        An example is a router's balance loss, a term of the loss that forward() does not return.
        """
        return bool((self._backward(self.output, torch.zeros_like(self.output)) > 0).any())

    def _backward(self, part: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(
            part, self.input, weights, retain_graph=True, materialize_grads=True
        )
        return grad.abs().amax(dim=tuple(range(2, grad.ndim)))


def cut_layers(model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> list[CutLayer]:
    """Run the model with its graph cut before each layer, so that each can be examined alone."""
    cuts: list[CutLayer] = []

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = hidden_states(*args, *kwargs.values())
        leaf = hidden.detach().requires_grad_()
        args = tuple(leaf if value is hidden else value for value in args)
        kwargs = {k: leaf if v is hidden else v for k, v in kwargs.items()}
        cuts.append(CutLayer(name, module, leaf, leaf, args, kwargs))
        return args, kwargs

    def after(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        cuts[-1].output = hidden_states(output)

    with ExitStack() as stack:
        for name, layer in named_layers(model):
            hook = partial(before, name)
            handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(hooked(named_layers(model), after))
        model(tokens, **inputs)
    return cuts


def cut_by_tokens(model: nn.Module, tokens: torch.Tensor, **inputs: torch.Tensor) -> list[CutLayer]:
    """Call `cut_layers`, for checks of single tokens' places.

    Raises:
        NotApplicableError: layers have no hidden state for each token, so no place is a token's.
    """
    cuts = cut_layers(model, tokens, **inputs)
    for cut in cuts:
        if cut.output.shape[:2] != tokens.shape[:2]:
            raise NotApplicableError(
                f"{cut.name} gives {list(cut.output.shape)}, not a hidden state for each token of "
                f"{list(tokens.shape)}"
            )
    return cuts


def named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers with their names, once each, even if they are in several places."""
    return [(f"layers.{name}", layer) for name, layer in layers_of(model).named_children()]


@contextmanager
def hooked(modules: Iterable[tuple[str, nn.Module]], hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook(name, module, args, kwargs, output)` after each forward, within the context."""
    with ExitStack() as stack:
        for name, module in modules:
            handle = module.register_forward_hook(partial(hook, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def hidden_states(*values: Any) -> torch.Tensor:
    """Return the first floating-point tensor with at least three dimensions.

    Raises:
        TypeError: there is none.
    """
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3:
            return value
        if isinstance(value, tuple | list):
            return hidden_states(*value)
    raise TypeError("a layer has no hidden states [batch, seq, dim] among its inputs or results")


@contextmanager
def recorded_outputs(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yield module name -> last output, filled within the context, in order of completion."""
    outputs: dict[str, torch.Tensor] = {}

    def record(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if isinstance(output, tuple | list) and output:
            output = output[0]
        if isinstance(output, torch.Tensor):
            outputs.pop(name, None)
            outputs[name] = output.detach()

    with hooked([(name, m) for name, m in model.named_modules() if name], record):
        yield outputs


@contextmanager
def recorded_states(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[States]:
    """Yield states that are filled within the context, by modules in order of completion."""
    states: States = {}

    def record(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        with suppress(TypeError):
            states[name] = hidden_states(*args, *kwargs.values()), hidden_states(output)

    with hooked(modules, record):
        yield states


def is_of_torch(file: str) -> bool:
    """Whether PyTorch has this source file; a folder of the author's may have its name, too."""
    return file.startswith(_TORCH)


def calling_line(file: str) -> str:
    """Return the innermost line of the call stack that is neither PyTorch's nor in `file`."""
    frames = traceback.extract_stack()[:-1]  # without this function's
    frame = [f for f in frames if f.filename != file and not is_of_torch(f.filename)][-1]
    return f"{frame.filename}:{frame.lineno}"


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    if actual.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp(min=1e-30)
    return ((actual.float() - expected.float()).abs().max() / scale).item()


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of each next token, a float32 scalar.

    Args:
        logits: `[batch, seq, vocab]`.
        tokens: `[batch, seq]`.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def packed_documents(rows: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Make `document_ids` `[rows, seq_len]` of several documents in each row, of other lengths."""
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(rows, seq_len, generator=generator) < 4 / seq_len
    begins[:, seq_len // 2] = True  # at least two documents
    return begins.long().cumsum(dim=1)


def document_inputs(model: ModelProtocol, document_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the inputs of `forward` besides tokens; the positions restart with each document."""
    inputs = {"document_ids": document_ids}
    if accepts(type(model), "positions"):
        inputs["positions"] = places_in_documents(document_ids)
    return inputs


def accepts(model_cls: type[ModelProtocol], name: str) -> bool:
    """Whether `forward` has the optional argument `name`."""
    return name in inspect.signature(model_cls.forward).parameters


def require_causal(model_cls: type[ModelProtocol]) -> None:
    """Raise `NotApplicableError` for a model whose tokens may see later ones."""
    if model_cls.sees_later_tokens:
        raise NotApplicableError(f"{model_cls.__name__}.sees_later_tokens is True")
