"""Checks initialisation: construction allocates nothing, then every tensor is set, reproducibly.

Models are built on the meta device, allocated after they were sharded or cut into pipeline stages,
and filled by `init_weights`.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan.distributed.init import SeededInit, initialize_weights, set_weights
from torchtitan.distributed.pipeline_parallel import modules_around_layers
from torchtitan.distributed.pipeline_split import parameters_of
from torchtitan.distributed.tying import allocate
from torchtitan.protocols import ModelProtocol
from torchtitan.protocols.model import layers_of
from torchtitan.tools.text import few

from .check import CheckFailedError, Checks, NotApplicableError
from .diagnose import problem_and_place
from .probe import calling_line, loss_of
from .subject import Subject

CHECKS = Checks("contract.spec")

_SCRATCH_BYTES = 4096  # for a table of a few numbers, such as rates by layer


@CHECKS.of("contract.meta", "building on the meta device allocates no memory")
def construction_allocates_nothing(subject: Subject) -> str:
    args = subject.args  # may build an author's loader, which has its own tensors
    with torch.device("meta"), _Allocations() as allocations:
        model = subject.spec.model_cls(args)
    real = [name for name, tensor in _all_tensors(model) if not tensor.is_meta]
    if real:
        raise CheckFailedError(
            f"built on the meta device, {len(real)} tensors allocate memory: {few(real, 5)}",
            "model.py: create tensors in __init__ without device=... and without numpy, so that "
            "they follow the device that the model is built on.",
        )
    if allocations.bytes > _SCRATCH_BYTES:
        raise CheckFailedError(
            f"the constructor allocates {allocations.bytes:,} bytes on the CPU, most of it by "
            f"{allocations.largest}",
            "Create it in init_weights() or in forward(), on the device of the weights.",
        )
    return f"{sum(1 for _ in model.parameters())} parameters"


class _Allocations(TorchDispatchMode):
    """Counts the bytes allocated outside of the meta device, and records where."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._most = 0
        self.largest = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(value) for value in tree_leaves((args, kwargs))}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and id(tensor) not in inputs:
                self.bytes += tensor.nbytes
                if tensor.nbytes > self._most:
                    self._most = tensor.nbytes
                    self.largest = f"{func} ({calling_line(__file__)})"
        return result


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, buffers, and tensors that are plain attributes of modules, or of those in
    lists and dicts.
    """
    yield from state_of(model)
    for module_name, module in model.named_modules():
        for name, value in vars(module).items():
            path = f"{module_name}.{name}".lstrip(".")
            if isinstance(value, torch.Tensor):
                yield path, value
            elif name != "_modules" and isinstance(value, list | tuple | dict):
                for inner in tree_leaves(value):
                    if isinstance(inner, nn.Module):
                        yield from ((f"{path}.{n}", tensor) for n, tensor in state_of(inner))


@CHECKS.of("contract.init_weights", "init_weights sets every parameter and buffer")
def init_weights_sets_everything(subject: Subject) -> str:
    poisoned = [_initialised(subject, poison) for poison in (0, 1)]
    unset = []
    for (name, a), (_, b) in zip(*map(state_of, poisoned), strict=True):
        left = a.isnan().any() if a.is_floating_point() or a.is_complex() else (a != b).any()
        if left:
            unset.append(name)
    if unset:
        parameters = dict(poisoned[0].named_parameters(remove_duplicate=False))
        buffers = [name for name in unset if name not in parameters]
        fix = "self.NAME.copy_(...) for buffers, " if buffers else ""
        raise CheckFailedError(
            f"{type(poisoned[0]).__name__}.init_weights() leaves {len(unset)} tensors unset: "
            f"{few(unset, 5)}",
            f"init_weights() must set them ({fix}nn.init.* for parameters), in each module that "
            "has them. Values computed in __init__ are lost, since models are built without "
            "memory.",
        )
    left = [name for name, tensor in _all_tensors(poisoned[0]) if tensor.is_meta]
    if left:
        raise CheckFailedError(
            f"after init_weights(), {few(left, 5)} is still without memory (on the meta device)",
            "A tensor that is a plain attribute is not moved with the model: register_buffer(NAME, "
            "tensor, persistent=False), and set it in init_weights(). Modules in a list or dict "
            "are not part of the model: nn.ModuleList or nn.ModuleDict.",
        )
    return f"{sum(1 for _ in state_of(poisoned[0]))} tensors"


def _initialised(subject: Subject, poison: int) -> ModelProtocol:
    """Like `initialize_weights`, but tensors that it leaves unset keep `poison`, or NaN."""
    model = subject.spec.meta_model(subject.args)
    allocate(model, "cpu")
    with torch.no_grad():
        for _, tensor in state_of(model):
            floating = tensor.is_floating_point() or tensor.is_complex()
            tensor.fill_(float("nan") if floating else poison)
        with SeededInit(model, subject.seed):
            set_weights(model)
    return model


def state_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


@CHECKS.of("contract.forward", "forward gives logits [batch, seq, vocab]")
def forward_gives_logits(subject: Subject) -> str:
    """Also, a gradient comes back.

    A model that reads something else, or more, gets a batch of its loader, and returns an input of
    its loss.
    """
    if not subject.reads_text:
        return _own_batch_gives_a_loss(subject)
    model = subject.build()
    tokens = subject.tokens(2, 16)
    logits = model(tokens)
    expected = [2, 16, subject.vocab_size]
    if not isinstance(logits, torch.Tensor):
        raise CheckFailedError(
            f"forward() returns {type(logits).__name__}, not logits",
            "In eval(), return only the tensor [batch, seq, vocab]; in training, your own loss "
            "may get more. Add auxiliary losses, such as those that balance experts, in the "
            "backward pass.",
        )
    if list(logits.shape) != expected:
        raise CheckFailedError(
            f"forward() of tokens [2, 16] returns {list(logits.shape)}, not {expected}",
            "The last module is the output layer, nn.Linear(dim, vocab_size).",
        )
    if not torch.isfinite(logits).all():
        raise CheckFailedError("logits of an untrained model are not finite")
    loss_of(logits, tokens).backward()
    also = f"; {_own_batch_gives_a_loss(subject)}" if subject.later_tokens else ""
    return f"[batch, seq] -> [batch, seq, {subject.vocab_size}]{also}"


def _own_batch_gives_a_loss(subject: Subject) -> str:
    own = subject.own_batches
    if own is None or own.error:
        raise CheckFailedError(
            f"the data loader of {subject.name} gives no batches here: {own.error if own else ''}",
            "Without them, nothing can run: the model has no vocab_size, so random tokens are not "
            "valid inputs. build_dataloader_fn must work with the default options, as in a debug "
            "flavor.",
        )
    model, example = subject.build(), subject.example(2)
    output = example.run(model)
    if not isinstance(output, torch.Tensor):
        raise CheckFailedError(
            f"forward() returns {type(output).__name__}, not a tensor",
            "Return one tensor, which the loss gets: torch.stack several, or put targets into the "
            "labels.",
        )
    if not output.isfinite().all():
        raise CheckFailedError("the output of an untrained model is not finite")
    loss = example.loss(output)
    if not loss.isfinite():
        raise CheckFailedError(f"the loss of an untrained model is {loss}")
    loss.backward()
    return f"{own.describe()} -> {list(output.shape)} of 2 rows, loss {loss.item():.4g}"


@CHECKS.of(
    "contract.deterministic",
    "the weights depend only on the seed",
    needs=("contract.forward",),
)
def init_is_deterministic(subject: Subject) -> str:
    states = []
    for state_of_python, seed in ((1, 0), (2, 0), (1, 1)):
        # The generators that a model might draw from by mistake.
        random.seed(state_of_python)
        torch.manual_seed(state_of_python)
        numpy.random.seed(state_of_python)
        states.append(dict(state_of(subject.build(subject.seed + seed))))
    first, again, other = states
    differing = [name for name in first if not torch.equal(first[name], again[name])]
    if differing:
        raise CheckFailedError(
            f"two models with one seed differ in {len(differing)} tensors: {few(differing, 5)}",
            "init_weights() may draw only from PyTorch's default generator: no generator=..., no "
            "numpy or random. Otherwise ranks start from different weights.",
        )
    if all(torch.equal(first[name], other[name]) for name in first):
        raise CheckFailedError(
            "models with two seeds have the same weights",
            "init_weights() must not set a seed of its own.",
        )
    return f"{len(first)} tensors alike"


@CHECKS.of(
    "contract.recursive",
    "parts of the model get the same weights as the whole",
    needs=("contract.layers", "contract.forward"),
)
def init_is_recursive(subject: Subject) -> str:
    shared = _shared_by_layers(subject)
    if shared and subject.spec.pipeline_fn is None:
        raise NotApplicableError(f"layers share {shared[0]}, and pipeline_fn is None: never parted")
    model = subject.build()
    whole = dict(state_of(model))
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    # A model that is never parted may have a frozen teacher that begins as a copy of its layers.
    copies = frozen if subject.spec.pipeline_fn is None else set()
    count = 0
    for part, description in _parts_of(subject):
        try:
            initialize_weights(part, subject.seed, torch.device("cpu"))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise CheckFailedError(
                f"init_weights() fails for {description}: {problem_and_place(error)}",
                "Iterate over the modules that exist (self.layers.values()), and guard "
                "self.tok_embeddings, self.norm and self.output by `is not None`.",
            ) from error
        for name, tensor in state_of(part):
            if name not in whole:
                raise CheckFailedError(
                    f"{description} has {name}, which the whole model does not have",
                    "Names must not depend on which parts of the model exist.",
                )
            if name not in copies and not torch.equal(tensor, whole[name]):
                if name in shared:
                    raise CheckFailedError(
                        f"{name} is shared by several layers, so they cannot be in different parts",
                        "Set pipeline_fn=None in the TrainSpec, or give each stage its own module.",
                    )
                raise CheckFailedError(
                    f"{description} gets a different {name} than the whole model",
                    "Draw in place (nn.init.*, or weight.normal_()): torch.randn(...) and copy_() "
                    "have no name to derive a seed from. And nothing may depend on how many "
                    "layers exist.",
                )
            count += 1
    return f"{count} tensors of parts as in the whole"


def _shared_by_layers(subject: Subject) -> list[str]:
    """Return all names of each parameter that several layers share."""
    layers = subject.spec.meta_model(subject.args).layers
    names: dict[int, dict[str, str]] = {}
    for number, layer in layers.items():
        for name, parameter in layer.named_parameters():
            names.setdefault(id(parameter), {})[number] = f"layers.{number}.{name}"
    return [name for found in names.values() if len(found) > 1 for name in found.values()]


def _parts_of(subject: Subject) -> Iterator[tuple[ModelProtocol, str]]:
    """Yield parts of the model such as pipeline stages, on the meta device, with descriptions.

    Layers can be deleted from every model; other modules only from models that can be split. Where
    weights are tied, both modules stay.
    """
    model = subject.spec.meta_model(subject.args)
    layers = list(model.layers)
    for kept in sorted({layers[0], layers[-1]}):
        part = copy.deepcopy(model)
        for name in layers:
            if name != kept:
                del layers_of(part)[name]
        yield part, f"the model with layers.{kept} alone"
    for names in _absent_modules(subject, model):
        part = copy.deepcopy(model)
        for name in names:
            setattr(part, name, None)
        yield part, f"the model without {', '.join(names)}"


def _absent_modules(subject: Subject, model: nn.Module) -> Iterator[list[str]]:
    """Yield modules that a stage may lack: those before the layers, then each one after them."""
    if subject.spec.pipeline_fn is None:
        return
    first, last = (
        [name for name in names if getattr(model, name, None) is not None]
        for names in modules_around_layers(subject.spec.pipeline_fn)
    )
    uses = Counter(p for name in [*first, *last] for p in parameters_of(model, name))
    for names in [first, *([name] for name in last)]:
        free = [n for n in names if all(uses[p] == 1 for p in parameters_of(model, n))]
        if free:
            yield free


@CHECKS.of("contract.state_dict", "the state_dict is complete", needs=("contract.forward",))
def state_dict_is_enough(subject: Subject) -> str:
    model, other = subject.build(), subject.build(subject.seed + 1)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    if missing or unexpected:
        raise CheckFailedError(f"load_state_dict: {few([*missing, *unexpected], 5)} do not fit")
    if subject.reads_text:  # else the loader decides on the length
        _require_same_shapes_at_any_length(model, subject)
    example = subject.example(2)
    with torch.no_grad():
        expected, actual = example.run(model), example.run(other)
    if torch.equal(actual, expected):
        return f"{len(model.state_dict())} tensors"
    lost = [
        name
        for (name, a), (_, b) in zip(_all_tensors(model), _all_tensors(other), strict=True)
        if a.shape != b.shape or not torch.equal(a, b)
    ]
    raise CheckFailedError(
        "a model that was saved and loaded gives different logits: its state_dict lacks "
        f"{few(lost, 5) or 'something'}",
        "Register buffers that are drawn or trained with persistent=True; only buffers that "
        "init_weights() computes from the args alone may be persistent=False.",
    )


def _require_same_shapes_at_any_length(model: ModelProtocol, subject: Subject) -> None:
    other = next(filter(subject.takes, (subject.length // 2, 2 * subject.length)), subject.length)
    args = subject.spec.updated_args(subject.config(f"--training.seq_len={other}"))
    there = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in subject.spec.meta_model(args).state_dict().items():
        if there.get(name) != tensor.shape:
            raise CheckFailedError(
                f"{name} is {list(there.get(name, ()))} in a checkpoint of training.seq_len = "
                f"{subject.length}, but {list(tensor.shape)} in one of {other}",
                "Another context could not start from a checkpoint. Register a table that "
                "init_weights() computes with persistent=False; a trained one needs a size of its "
                "own in the args.",
            )
