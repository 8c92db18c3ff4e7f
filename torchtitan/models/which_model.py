"""Find out which model a folder holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from torchtitan.components.checkpoint.huggingface import (
    TRAINING_ONLY,
    check_same_model,
    differences,
)
from torchtitan.components.checkpoint.manifest import MANIFEST, Manifest
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.protocols import BaseModelArgs, BaseStateDictAdapter, ModelProtocol, TrainSpec
from torchtitan.protocols.train_spec import get_train_spec, model_flavors
from torchtitan.tools.foreign_files import is_file


@dataclass(frozen=True)
class KnownModel:
    """A model of the registry."""

    name: str
    flavor: str
    """"" if none of the flavors has these args."""
    spec: TrainSpec
    """With the args of one checkpoint."""

    @property
    def args(self) -> BaseModelArgs:
        return self.spec.model_args

    def build(self) -> ModelProtocol:
        """Return the model on the meta device."""
        return self.spec.meta_model()

    def adapter(self, folder: Path) -> BaseStateDictAdapter:
        """Return the model's state dict adapter. Raise `CheckpointError` if it has none."""
        if self.spec.state_dict_adapter is None:
            raise CheckpointError(
                f"the model {self.name} has no state_dict_adapter in its TrainSpec"
            )
        return self.spec.state_dict_adapter(self.args, hf_assets_path=folder)

    def __str__(self) -> str:
        return (
            f"{self.name} {self.flavor}" if self.flavor else f"{self.name} (no predefined flavor)"
        )


def model_of_options(name: str | None, flavor: str | None) -> KnownModel | None:
    """Return the model that `--model` and `--flavor` name; None without them.

    Raises:
        ConfigError: an unknown name, or one without the other.
    """
    if name is None:
        if flavor is not None:
            raise ConfigError("--flavor needs --model")
        return None
    flavors = model_flavors(name) if name in MODEL_REGISTRY else []
    if flavors and flavor is None:
        raise ConfigError(f"--model {name} needs --flavor. Allowed: {', '.join(flavors)}")
    flavor = flavor or ""
    return KnownModel(name, flavor, get_train_spec(name, flavor))


def model_of_hf_folder(folder: Path, told: KnownModel | None = None) -> KnownModel:
    """Return the model of a Hugging Face folder: `told` if given, else by `config.json`.

    Raises:
        CheckpointError: there is neither, or `config.json` is of another model or not understood.
    """
    if is_file(folder / MANIFEST, CheckpointError):
        raise CheckpointError(
            f"{folder} is a torchtitan checkpoint, not a Hugging Face folder. Convert it: "
            f"`torchtitan convert to-hf {folder} OUT`"
        )
    if told is not None:
        check_same_model(folder, told.args)
        return told
    if not is_file(folder / "config.json", CheckpointError):
        raise CheckpointError(
            f"{folder} has no config.json: give the model with --model and --flavor"
        )
    name, spec = train_spec_of_hf_folder(folder)
    flavor = _flavor_of(name, spec.model_args, TRAINING_ONLY)
    if flavor:  # its args also describe the training
        spec = get_train_spec(name, flavor)
    return KnownModel(name, flavor, spec)


def model_of_checkpoint(folder: Path, told: KnownModel | None = None) -> KnownModel:
    """Return the model of a checkpoint of ours: `told` if given, else by the manifest.

    Raises:
        CheckpointError: the model is not registered, or its args have changed since.
    """
    if told is not None:
        return told
    model = Manifest.read(folder).model
    name = model.get("name")
    if name not in MODEL_REGISTRY:
        raise CheckpointError(
            f"{folder / MANIFEST}: there is no model {name!r}. Give --custom-import if it is your "
            "own, or --model and --flavor"
        )
    flavors = model_flavors(name)
    flavor = model.get("flavor", "")
    spec = MODEL_REGISTRY[name](flavors[0] if flavors and flavor not in flavors else flavor)
    if not model.get("args"):
        return KnownModel(name, flavor, spec)
    try:
        args = dataclass_of(type(spec.model_args), model["args"])
    except (NameError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: the args of {name}: {error}") from error
    flavor = _flavor_of(name, args, frozenset({"attention"}))
    return KnownModel(name, flavor, replace(spec, model_args=args))


def dataclass_of(cls: type, fields: dict[str, Any]) -> Any:
    """Build a dataclass from JSON by the types of its fields: the inverse of `plain_args`.

    Restores dataclasses, tuples, and keys that are numbers, also in lists, tuples, dicts and
    unions. Other types that JSON lacks are left as JSON has them.

    Raises:
        TypeError: an unknown field.
        ValueError: a tuple of another length than its type says, or a key that is no number.
    """
    hints = get_type_hints(cls)
    computed = {field.name for field in dataclasses.fields(cls) if not field.init}
    values = {k: _value_of(hints.get(k), v) for k, v in fields.items() if k not in computed}
    return cls(**values)


def _value_of(hint: Any, value: Any) -> Any:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        possible = [one for one in inner if _may_be(one, value)]
        return _value_of(max(possible, key=partial(_fit, value)), value) if possible else value
    if not _may_be(hint, value):
        return value
    if dataclasses.is_dataclass(kind):
        return dataclass_of(cast(type, kind), value)
    if isinstance(value, dict):
        key, of_value = inner or (str, Any)
        number = key if key in (int, float) else str  # JSON's keys are text
        return {number(k): _value_of(of_value, v) for k, v in value.items()}
    if kind is tuple and inner and inner[-1] is not ...:
        return tuple(_value_of(one, item) for one, item in zip(inner, value, strict=True))
    made = [_value_of(inner[0] if inner else Any, item) for item in value]
    return tuple(made) if kind is tuple else made


def _may_be(hint: Any, value: Any) -> bool:
    """Return whether JSON's dict or list may represent a value of this type."""
    kind = get_origin(hint) or hint
    if isinstance(value, dict):
        return dataclasses.is_dataclass(kind) or kind in (dict, Mapping)
    return isinstance(value, list) and kind in (list, tuple, Sequence)


def _fit(fields: Any, hint: Any) -> tuple[bool, int]:
    """Return what is larger the better the fields fit: a dataclass has all, and few others."""
    known = {f.name for f in dataclasses.fields(hint)} if dataclasses.is_dataclass(hint) else set()
    if not isinstance(fields, dict):
        return False, 0
    return fields.keys() <= known, -len(known - fields.keys())


def _flavor_of(name: str, args: BaseModelArgs, ignored: frozenset[str]) -> str:
    """Return the flavor that differs from `args` only in `ignored`; "" if there is none."""
    for flavor in model_flavors(name):
        of_flavor = MODEL_REGISTRY[name](flavor).model_args
        if type(of_flavor) is type(args) and not any(differences(of_flavor, args, ignored)):
            return flavor
    return ""
