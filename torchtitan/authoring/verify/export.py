"""Checks the `config.json` that args export for Hugging Face, for every flavor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torchtitan.components.checkpoint.huggingface import export_config, is_of_diffusers
from torchtitan.errors import CheckpointError, TitanError
from torchtitan.protocols import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec, model_flavors
from torchtitan.tools.text import few

from .check import CheckFailedError, Checks, NotApplicableError
from .diagnose import problem_and_place
from .hf_files import unlike_config
from .subject import Subject

CHECKS = Checks("contract.spec")

_HINT = "args.py: to_hf_config() must give each option of the args, under Hugging Face's name."


@CHECKS.of("adapter.config_json", "to_hf_config describes the args of every flavor")
def config_says_what_args_say(subject: Subject) -> str:
    """So that an export is of this model, and does not fail after training."""
    flavors = {subject.flavor: subject.spec.model_args}
    for flavor in model_flavors(subject.name):
        flavors[flavor] = get_train_spec(subject.name, flavor).model_args
    given, refused = 0, []
    for flavor, args in flavors.items():
        try:
            config = args.to_hf_config()
        except TitanError:  # reports that Hugging Face has no such model
            refused.append(flavor)
            continue
        except Exception as error:
            raise CheckFailedError(
                f"{flavor}: to_hf_config() fails: {problem_and_place(error)}", _HINT
            ) from error
        if config is None:
            continue
        given += 1
        _require_json(flavor, config)
        if lost := list(_lost(args, config)):
            raise CheckFailedError(f"{flavor}: config.json would have {few(lost, 5)}", _HINT)
        try:
            export_config(args)
        except CheckpointError:  # Hugging Face's implementation has no such option
            refused.append(flavor)
        except Exception as error:
            raise CheckFailedError(
                f"{flavor}: from_hf_config(to_hf_config()) fails: {problem_and_place(error)}",
                "args.py: from_hf_config() must read what to_hf_config() writes.",
            ) from error
    if not given and not refused:
        raise NotApplicableError("to_hf_config gives none, so exports have no config.json")
    note = f"; Hugging Face cannot represent {few(refused, 5)}" if refused else ""
    return f"{given} flavor{'s' if given != 1 else ''}{note}"


def _require_json(flavor: str, config: dict[str, Any]) -> None:
    missing = [name for name in ("model_type", "architectures") if name not in config]
    if missing and not is_of_diffusers(config):
        raise CheckFailedError(
            f"{flavor}: config.json would have no {few(missing)}, by which transformers "
            "identifies the model",
            _HINT,
        )
    try:
        json.dumps(config)
    except TypeError as error:
        raise CheckFailedError(
            f"{flavor}: to_hf_config() is not valid JSON: {error}", _HINT
        ) from error


def _lost(args: BaseModelArgs, config: dict[str, Any]) -> Iterator[str]:
    """Yield fields of `args` that the file can express, but with another value."""
    read = getattr(type(args), "from_hf_config", None)
    if read is None:
        for name, key in unlike_config(args, config):
            yield f"{key} = {config[key]!r} ({name} is {getattr(args, name)!r})"
        return
    try:
        back = read(dict(config))
    except Exception:  # reported elsewhere
        return
    for name, value in vars(args).items():
        if not isinstance(value, int | float) or (other := getattr(back, name)) == value:
            continue
        if key := _key_of(name, other, config, read):
            yield f"{key} = {config[key]!r}, which is {name} = {other!r} and not {value!r}"


def _key_of(name: str, value: Any, config: dict[str, Any], read: Any) -> str:
    """Return the entry of `config.json` that `name` is read from; "" if there is none."""
    for key, entry in config.items():
        if not isinstance(entry, int | float):
            continue
        changed = not entry if isinstance(entry, bool) else 2 * entry
        try:
            if getattr(read({**config, key: changed}), name) != value:
                return key
        except Exception:  # no such model exists
            continue
    return ""
