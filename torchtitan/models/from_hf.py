"""Find out which of our models a Hugging Face folder holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.errors import CheckpointError, begin_errors_with, did_you_mean
from torchtitan.models.common.hf_config import OtherArchitectureError
from torchtitan.protocols.train_spec import TrainSpec, some_specs
from torchtitan.tools.foreign_files import read_json, read_json_if_any
from torchtitan.tools.text import first_line

CONFIG = "config.json"


def train_spec_of_hf_folder(folder: Path) -> tuple[str, TrainSpec]:
    """Return the name of the model that reads `config.json`, and its `TrainSpec` with those args.

    Asks every registered model whose args have `from_hf_config`: one of the user's may support what
    ours of the same architecture does not.

    Raises:
        CheckpointError: the file is missing or damaged, no model reads it, or the model that does
            has no support for a field in it.
    """
    config = read_hf_config(folder)
    with begin_errors_with(str(folder)):
        return _train_spec(config)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the fields of `config.json`. Raise `CheckpointError` if it is missing or damaged."""
    return read_json(folder / CONFIG, CheckpointError)


def max_seq_len_of_hf_folder(folder: Path) -> int | None:
    """Return the longest sequence that `config.json` allows; None if that is not known."""
    return read_json_if_any(folder / CONFIG, CheckpointError).get("max_position_embeddings")


def args_of_hf_config(cls: Any, config: dict[str, Any]) -> Any:
    """Return `cls.from_hf_config(config)`. An author's may not expect what another model's has.

    Raises:
        CheckpointError: the method fails.
    """
    try:
        return cls.from_hf_config(config)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CONFIG}: {cls.__name__}.from_hf_config cannot read it: {first_line(error)}"
        ) from error


def _train_spec(config: dict[str, Any]) -> tuple[str, TrainSpec]:
    known: list[str] = []
    refused: list[CheckpointError] = []
    specs, broken = some_specs()
    # A model that is written for the architecture comes before the one that takes any.
    for name, spec in sorted(specs.items(), key=lambda item: item[0] == "transformers"):
        if not hasattr(spec.model_args, "from_hf_config"):
            continue
        if name == "transformers" and refused:
            break
        try:
            return name, replace(spec, model_args=args_of_hf_config(type(spec.model_args), config))
        except OtherArchitectureError as error:
            known += error.model_types
        except CheckpointError as error:
            refused.append(error)
    if refused:
        raise refused[-1]
    key = "_class_name" if "_class_name" in config else "model_type"
    model_type = config.get(key)
    raise CheckpointError(
        f"{CONFIG}: {key} = {model_type!r} is not supported."
        f"{did_you_mean(str(model_type), set(known))}"
        f"{''.join(f' And {problem}.' for problem in broken)}"
    )
