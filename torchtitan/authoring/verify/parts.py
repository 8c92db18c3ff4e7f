"""Checks parts of a model, such as pipeline stages: names and initial weights."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn as nn

from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.pipeline_parallel import modules_around_layers
from torchtitan.distributed.pipeline_split import parameters_of
from torchtitan.protocols.model import ModelProtocol, layers_of

from .check import CheckFailedError, Checks, NotApplicableError
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
    for part, description in _parts_of(subject):
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
