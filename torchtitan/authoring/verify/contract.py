"""Checks a model's contract: the guide's steps 1, 2 and 4 for its parts and signatures."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn as nn

from torchtitan.components.model_inputs import USUAL_KEYS
from torchtitan.errors import ConfigError
from torchtitan.models.which_model import dataclass_of
from torchtitan.protocols import BaseModelArgs, BaseStateDictAdapter, ModelProtocol, TrainSpec
from torchtitan.protocols.changed_args import plain_args
from torchtitan.protocols.train_spec import ARGUMENTS, get_train_spec
from torchtitan.tools.text import few

from .check import CheckFailedError, Checks
from .subject import Subject

CHECKS = Checks("contract.spec")

_FUNCTIONS = {name: args for name, args in ARGUMENTS.items() if name != "model_cls"}

_LONG = 4096
"""Tokens of the second job that args are adapted to, if possible."""


@CHECKS.of("contract.import", "the module that registers the model can be imported", needs=())
def can_be_imported(subject: Subject) -> str:
    """Every check begins with the import (`run.py`); all others need this one."""
    return ""


@CHECKS.of(
    "contract.spec",
    "the TrainSpec's fields have the right types, and a job can have its args",
    needs=("contract.import",),
)
def spec_is_complete(subject: Subject) -> str:
    spec = subject.spec
    _require_subclass("model_cls", spec.model_cls, ModelProtocol)
    _require_dataclass(type(spec.model_args))
    optional = {f.name for f in dataclasses.fields(TrainSpec) if "None" in str(f.type)}
    for name, arguments in _FUNCTIONS.items():
        value = getattr(spec, name)
        if not callable(value) and not (value is None and name in optional):
            raise CheckFailedError(
                f"TrainSpec.{name} is {value!r}, which cannot be called",
                f"It is called with ({arguments}).",
            )
    if spec.state_dict_adapter is not None:
        _require_subclass("state_dict_adapter", spec.state_dict_adapter, BaseStateDictAdapter)
    args_name = type(spec.model_args).__name__
    try:
        subject.args  # noqa: B018
    except ConfigError as error:
        raise CheckFailedError(str(error), f"args.py: update_from_config of {args_name}") from error
    return f"{spec.model_cls.__name__}, {args_name}"


def _require_subclass(field: str, value: Any, base: type) -> None:
    if not isinstance(value, type) or not issubclass(value, base):
        raise CheckFailedError(
            f"TrainSpec.{field} is {value!r}, not a subclass of {base.__name__}",
            f"Give the class itself, derived from torchtitan.protocols.{base.__name__}.",
        )
    missing = sorted(
        name
        for name in dir(base)
        if getattr(getattr(base, name), "__isabstractmethod__", False)
        and getattr(value, name) is getattr(base, name)
    )
    if missing:
        raise CheckFailedError(f"{value.__name__} does not define {few(missing, 5)}")


def _require_dataclass(args_cls: type) -> None:
    fields = {field.name for field in dataclasses.fields(args_cls)}
    forgotten = [name for name in inspect.get_annotations(args_cls) if name not in fields]
    forgotten = [n for n in forgotten if "ClassVar" not in str(args_cls.__annotations__[n])]
    if forgotten:
        raise CheckFailedError(
            f"{args_cls.__name__} declares {few(forgotten, 5)}, which are not fields",
            "args.py: put @dataclass above the class.",
        )


@CHECKS.of("contract.signatures", "all can be called as the trainer calls it")
def signatures_fit(subject: Subject) -> str:
    spec = subject.spec
    _require_call(f"{spec.model_cls.__name__}.__init__", spec.model_cls, ("args",))
    forward = spec.model_cls.forward
    keys = subject.own_batches.keys if subject.own_batches else []
    given = tuple(name for name in keys if name not in USUAL_KEYS)
    _require_call(f"{spec.model_cls.__name__}.forward", forward, ("self", "tokens"), given)
    extra = list(inspect.signature(forward).parameters.values())[2:]
    named = [p.name for p in extra if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    similar = {
        "position_ids": "positions",
        "doc_ids": "document_ids",
        "document_id": "document_ids",
    }
    for name in named:
        if name in similar:
            raise CheckFailedError(
                f"forward() takes {name!r}, which the trainer never fills",
                f"Rename it to {similar[name]!r}: [batch, seq] int64, by default None.",
            )
    for name, arguments in _FUNCTIONS.items():
        if (function := getattr(spec, name)) is not None:
            _require_call(f"TrainSpec.{name}", function, tuple(arguments.split(", ")))
    args_name = type(spec.model_args).__name__
    _require_call(f"{args_name}.get_nparams_and_flops", subject.args.get_nparams_and_flops, ("s",))
    _require_call(f"{args_name}.update_from_config", spec.model_args.update_from_config, ("job",))
    if spec.state_dict_adapter is not None:
        adapter = spec.state_dict_adapter
        _require_call(f"{adapter.__name__}.__init__", adapter, ("model_args",), ("hf_assets_path",))
    takes = [name for name in named if name in (*USUAL_KEYS[2:], *given)]
    others = [name for name in named if name not in takes]
    never = f"; the trainer never fills {few(others, 5)}" if others else ""
    return f"forward(tokens{''.join(f', {name}' for name in takes)}){never}"


def _require_call(
    name: str, function: Callable, positional: tuple[str, ...], keywords: tuple[str, ...] = ()
) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        called = ", ".join([*positional, *(f"{keyword}=..." for keyword in keywords)])
        raise CheckFailedError(
            f"{name}{signature} cannot be called with ({called}): {error}",
            "All arguments but these need defaults, and these may have any names.",
        ) from error


@CHECKS.of("contract.args", "update_from_config returns args and leaves the flavor unchanged")
def args_are_not_modified(subject: Subject) -> str:
    """Also, a checkpoint gives the args back, and `vocab_size` is a number of tokens."""
    args = get_train_spec(subject.name, subject.flavor).model_args
    before = copy.deepcopy(vars(args))
    # Two jobs that differ in every option that args may take from a job.
    first = args.update_from_config(subject.config())
    if not isinstance(first, type(args)):
        raise CheckFailedError(
            f"{type(args).__name__}.update_from_config returns {type(first).__name__}",
            "args.py: return dataclasses.replace(self, ...), or self if nothing changes.",
        )
    longest = subject.at_most(_LONG)
    args.update_from_config(subject.config(f"--training.seq_len={longest}", "--debug.seed=1"))
    again = get_train_spec(subject.name, subject.flavor).model_args
    for now in (args, again):
        after = vars(now)
        changed = sorted(k for k in before | after if before.get(k) != after.get(k))
        if changed:
            values = [f"{k} = {before.get(k)!r} became {after.get(k)!r}" for k in changed]
            raise CheckFailedError(
                f"{type(args).__name__}.update_from_config changes the flavor in place: "
                f"{few(values, 5)}",
                "args.py: return dataclasses.replace(self, ...) instead of assigning to self. A "
                "flavor is shared by all jobs of a process.",
            )
    _require_way_back(first)
    limit = f", of {longest} tokens at most" if longest < _LONG else ""
    vocab_size = getattr(first, "vocab_size", None)
    if vocab_size is None and subject.own_batches is not None:
        return f"{len(before)} fields, no vocab_size{limit}"
    if type(vocab_size) is not int or vocab_size < 2:
        raise CheckFailedError(
            f"{type(args).__name__}.vocab_size is {vocab_size!r}, not a number of tokens",
            "args.py: vocab_size: int = ... The trainer compares it with the tokenizer's. Only a "
            "model with its own build_dataloader_fn may have none.",
        )
    return f"{len(before)} fields, vocab_size {vocab_size}{limit}"


def _require_way_back(args: BaseModelArgs) -> None:
    """Require that args survive JSON: `generate`, `eval`, `convert` read them from a manifest."""
    hint = (
        "args.py: numbers, text, dataclasses, and Optional, list, tuple and dict of these, each "
        "with its type (layers: tuple[LayerArgs, ...]), can be restored from the manifest of a "
        "checkpoint."
    )
    try:
        back = dataclass_of(type(args), plain_args(args))
    except (NameError, TypeError, ValueError) as error:
        raise CheckFailedError(
            f"{type(args).__name__} cannot be restored from a checkpoint: {error}", hint
        ) from error
    for field in dataclasses.fields(args):
        was, now = getattr(args, field.name), getattr(back, field.name)
        if type(was) is not type(now) or was != now:
            raise CheckFailedError(
                f"{type(args).__name__}.{field.name} is {was!r}, but is restored from a "
                f"checkpoint as {now!r}",
                hint,
            )


@CHECKS.of("contract.layers", "the layers are an nn.ModuleDict keyed by their number")
def layers_are_a_dict(subject: Subject) -> str:
    """So that layers can be deleted one by one without renaming others."""
    model = subject.spec.meta_model(subject.args)
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleDict):
        raise CheckFailedError(
            f"{type(model).__name__}.layers is {type(layers).__name__}, not nn.ModuleDict",
            "model.py: self.layers = nn.ModuleDict({str(i): Block(args) for i in ...}). A list "
            "would rename the remaining layers when a pipeline stage deletes some.",
        )
    expected = [str(number) for number in range(len(layers))]
    if list(layers) != expected:
        raise CheckFailedError(
            f"{type(model).__name__}.layers has the keys {few(list(layers), 5)}, not "
            f"{few(expected, 5)} in this order",
            'model.py: the key of a layer is its number from 0, as text: "0", "1", ...',
        )
    wanted = getattr(subject.args, "n_layers", len(layers))
    if len(layers) != wanted:
        raise CheckFailedError(
            f"{type(model).__name__} has {len(layers)} layers, but n_layers is {wanted}",
            "model.py: create args.n_layers of them.",
        )
    return f"{len(layers)} layers"
