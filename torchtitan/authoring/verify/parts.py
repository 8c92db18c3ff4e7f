"""Checks parts of a model, such as pipeline stages: names, initial weights, forward pass.

Other modules compare the numbers of whole pipelines; this one uses one process, and one cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from torchtitan.distributed.init import initialize_weights
from torchtitan.protocols.model import ModelProtocol, layers_of

from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .probe import relative_difference
from .subject import Subject
from .weights import state_of

CHECKS = Checks("contract.layers", "contract.forward")


@CHECKS.of("contract.recursive", "parts of the model get the same weights as the whole")
def init_is_recursive(subject: Subject) -> str:
    shared = _shared_by_layers(subject)
    if shared and subject.spec.pipeline_fn is None:
        raise NotApplicableError(f"layers share {shared[0]}, and pipeline_fn is None: never parted")
    whole = dict(state_of(subject.build()))
    count = 0
    for part, description in parts_of(subject):
        try:
            initialize_weights(part, subject.seed, torch.device("cpu"))
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise CheckFailedError(
                f"init_weights() fails for {description}: {type(error).__name__}: {error}",
                "Iterate over the modules that exist (self.layers.values()), and guard "
                "self.tok_embeddings, self.norm and self.output by `is not None`.",
            ) from error
        for name, tensor in state_of(part):
            if name not in whole:
                raise CheckFailedError(
                    f"{description} has {name}, which the whole model does not have",
                    "Names must not depend on which parts of the model exist.",
                )
            if not torch.equal(tensor, whole[name]):
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


def parts_of(subject: Subject) -> Iterator[tuple[ModelProtocol, str]]:
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
    first, last = absent_modules(subject)
    for names in [first, *([name] for name in last)]:  # the first modules stay together
        part = copy.deepcopy(model)
        _remove(part, names, [])
        if names:
            yield part, f"the model without {', '.join(names)}"


def absent_modules(subject: Subject) -> tuple[list[str], list[str]]:
    """Return modules before and after the layers that a stage may lack; none if never split."""
    from torchtitan.distributed.pipeline_parallel import modules_around_layers
    from torchtitan.distributed.pipeline_split import parameters_of

    if subject.spec.pipeline_fn is None:
        return [], []
    model = subject.spec.meta_model(subject.args)
    first, last = (
        [name for name in names if getattr(model, name, None) is not None]
        for names in modules_around_layers(subject.spec.pipeline_fn)
    )
    owners: dict[int, set[str]] = {}
    for name in [*first, *last]:
        for parameter in parameters_of(model, name):
            owners.setdefault(id(parameter), set()).add(name)
    tied = {name for shared in owners.values() if len(shared) > 1 for name in shared}
    return [n for n in first if n not in tied], [n for n in last if n not in tied]


@CHECKS.of("contract.absent", "forward works where embedding, norm or output is absent")
def forward_without_modules(subject: Subject) -> str:
    """A model cut in two must give the numbers of the whole."""
    if subject.spec.pipeline_fn is None:
        raise NotApplicableError("pipeline_fn is None: the model is never cut into stages")
    before, after = absent_modules(subject)
    if not before or not after:
        raise NotApplicableError("the embedding and the output layer share a weight, so they stay")
    whole, first, last = (subject.build_varied() for _ in range(3))
    layers = list(whole.layers)
    _remove(first, after, [])
    _remove(last, before, layers)
    example = subject.example(2)
    with torch.no_grad():
        expected = example.run(whole)
        hidden = _run_part(first, (example.tokens,), example.inputs, f"without {', '.join(after)}")
        if not isinstance(hidden, tuple):
            _require_hidden_states(hidden, example, f"without {', '.join(after)}", subject)
        handed = hidden if isinstance(hidden, tuple) else (hidden,)
        for part in handed:
            if not isinstance(part, torch.Tensor):
                raise CheckFailedError(
                    f"without {', '.join(after)}, forward() returns a tuple with "
                    f"{type(part).__name__}",
                    "A pipeline stage passes on a tensor, or a tuple of tensors.",
                )
        actual = _run_part(last, handed, example.inputs, f"without {', '.join(before)} and layers")
    difference = relative_difference(actual, expected)
    if actual.shape != expected.shape or difference > 1e-5:
        raise CheckFailedError(
            f"{', '.join(before)} and the layers, then {', '.join(after)}: as two parts they give "
            f"logits that differ from the whole model's by {difference:.1e} of the largest",
            "forward() must do nothing else between modules that may be absent: no scaling or "
            "second norm outside `if self.norm is not None`.",
        )
    return f"without {', '.join([*before, *after])}: equal to {difference:.0e}"


def _require_hidden_states(
    hidden: torch.Tensor, example: Example, without: str, subject: Subject
) -> None:
    shape = list(example.tokens.shape)
    # A model with its own loader may have several tokens per hidden state.
    wrong = subject.own_batches is None and list(hidden.shape[:2]) != shape
    if wrong or not hidden.is_floating_point():
        raise CheckFailedError(
            f"{without}, forward() returns {hidden.dtype} {list(hidden.shape)}, not the hidden "
            "states [batch, seq, dim]"
        )


def _remove(model: nn.Module, names: list[str], layers: list[str]) -> None:
    for name in names:
        setattr(model, name, None)
    for name in layers:
        del layers_of(model)[name]


def _run_part(
    model: nn.Module, entry: tuple[torch.Tensor, ...], inputs: dict[str, Any], description: str
) -> Any:
    torch.manual_seed(0)  # as in `Example.run`
    try:
        return model(*entry, **inputs)
    except Exception as error:
        raise CheckFailedError(
            f"forward() fails {description}: {type(error).__name__}: {error}",
            "model.py: `h = self.norm(h) if self.norm is not None else h`, and likewise for the "
            "embedding and the output layer; a pipeline stage receives and returns hidden states.",
        ) from error
