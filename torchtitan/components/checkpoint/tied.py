"""Parameters that have several names, and what the files of Hugging Face hold of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch.distributed.checkpoint.metadata import Metadata

from torchtitan.distributed.names import canonical_name
from torchtitan.errors import CheckpointError

from .reader import files_of
from .safetensors_files import SafetensorsFile

if TYPE_CHECKING:
    from torchtitan.protocols import BaseStateDictAdapter


def tied_names(model_parts: list[nn.Module]) -> set[str]:
    """Return the second names of tied parameters."""
    return {name for part in model_parts for name in first_names(part)}


def tied_embeddings(model_parts: list[nn.Module]) -> set[str]:
    """Return the second names of embeddings, which Hugging Face files hold only once.

    Its models tie only these, and need anything else that is shared under each of its names.
    """
    tied = set()
    for part in model_parts:
        weights = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
        names = part.named_parameters(remove_duplicate=False)
        tied |= {canonical_name(name) for name, param in names if id(param) in weights}
    return tied & tied_names(model_parts)


def first_names(model: nn.Module) -> dict[str, str]:
    """Second name of each parameter that has two -> its first name."""
    first = {id(param): canonical_name(name) for name, param in model.named_parameters()}
    names = {
        canonical_name(name): first[id(param)]
        for name, param in model.named_parameters(remove_duplicate=False)
    }
    return {name: other for name, other in names.items() if name != other}


def check_copies(
    path: Path,
    metadata: Metadata,
    adapter: BaseStateDictAdapter,
    model_parts: list[nn.Module],
) -> None:
    """Raise `CheckpointError` if a tensor that is skipped is no copy of the one that is read."""
    files, told = files_of(metadata), adapter.copies()
    for copy, first in (told | _copies_of_shared(adapter, model_parts)).items():
        if copy == first or not {copy, first} <= files.keys():
            continue
        with SafetensorsFile(path / files[copy]) as a, SafetensorsFile(path / files[first]) as b:
            spec = a.specs[copy]
            same = spec.shape == b.specs[first].shape and all(
                torch.equal(a.read(copy, *rows).float(), b.read(first, *rows).float())
                for rows in spec.pieces()
            )
        if not same:
            message = f"{path}: {copy} differs from {first}, but the model has one tensor for both"
            if copy in told:
                message += (
                    f" (tie_word_embeddings = true). If {copy} was trained separately, set "
                    "tie_word_embeddings = false in config.json and in the model's args; "
                    "otherwise remove it from the file"
                )
            raise CheckpointError(message)


def _copies_of_shared(
    adapter: BaseStateDictAdapter, model_parts: list[nn.Module]
) -> dict[str, str]:
    """Map the files' names of shared parameters to the name of the one that is read."""
    copies: dict[str, str] = {}
    for part in model_parts:
        for second, first in first_names(part).items():
            shape = part.get_parameter(first).shape
            keys = (
                adapter.to_hf({name: torch.empty(shape, device="meta")}) for name in (second, first)
            )
            copies |= dict(zip(*keys, strict=True))
    return copies
