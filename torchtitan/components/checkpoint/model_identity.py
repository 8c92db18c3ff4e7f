"""Describe a run's model for the manifest, and compare it with what it resumes or starts from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import BytesTokenizer, path_of
from torchtitan.config import JobConfig
from torchtitan.config.load import origin
from torchtitan.protocols.changed_args import plain_args
from torchtitan.tools.differences import nested_differences
from torchtitan.tools.foreign_files import parse_json
from torchtitan.tools.logging import logger, rank0

from .huggingface import TRAINING_ONLY, initial_load_path
from .manifest import Manifest, is_hf_weights
from .retry import read_again
from .storage import StoragePath
from .tokenizer_files import TOKENIZER_FILES

_WITH_BUFFERS = (("use_bias",), ("aux_loss_weight", "z_loss_weight"))
"""Args of a router: with any of a group, it has a buffer in checkpoints."""


def describe_model(job_config: JobConfig, args: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the manifest's description of the model, as JSON would load it."""
    return {
        "name": job_config.model.name,
        "flavor": job_config.model.flavor,
        "args": plain_args(args),
        **describe_tokenizer(tokenizer),
        "seq_len": job_config.training.seq_len,
    }


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return that part of the description; a custom one is described under `own_tokenizer`."""
    path = path_of(tokenizer)
    described: dict[str, Any] = {"tokenizer": path, "tokenizer_sha256": ""}
    if path not in ("", "bytes"):
        folder = Path(path).expanduser()
        described["tokenizer"] = str(folder.absolute())
        described["tokenizer_sha256"] = _digest_of_tokenizer(folder)
    if tokenizer is not None and not path:
        fields = ("vocab_size", "bos_id", "eos_id", "fingerprint")
        told = {name: getattr(tokenizer, name, None) for name in fields}
        described["own_tokenizer"] = {"class": type(tokenizer).__qualname__, **told}
    return described


def model_differences(
    saved: dict[str, Any], current: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield each field in which two descriptions differ as models, with its old and new value.

    The attention kernel and the weights of a router's losses do not make another model. Whether it
    has a buffer in checkpoints does: one for its bias, and one for any loss. Tokenizers are
    compared by the contents of their files, not their location.
    """
    for name in ("name", "flavor"):
        if saved.get(name) != current[name]:
            yield f"model.{name}", saved.get(name), current[name]
    if other := tokenizer_difference(saved, current):
        yield "model.tokenizer_path", *other
    was, now = saved.get("args", {}), current["args"]
    for name, a, b in nested_differences(was, now, may_lack_options=True):
        field = name.rpartition(".")[2]
        if field not in TRAINING_ONLY or _has_buffer(was, name) != _has_buffer(now, name):
            yield name, a, b


def _has_buffer(args: dict[str, Any], name: str) -> bool:
    """Return whether there is a buffer in checkpoints for the field with the dotted name `name`."""
    *parents, field = name.split(".")
    for parent in parents:
        args = args.get(parent) or {}
    return any(args.get(arg) for group in _WITH_BUFFERS if field in group for arg in group)


def warn_of_other_tokenizer(folder: StoragePath, saved: dict[str, Any], tokenizer: Any) -> None:
    """Warn if a tokenizer is not the one that a checkpoint was trained with.

    Args:
        saved: description of the model in its manifest; without a tokenizer's, nothing is known.
    """
    if "tokenizer_sha256" not in saved:
        return
    if other := tokenizer_difference(saved, describe_tokenizer(tokenizer)):
        rank0.warning("%s was trained with the tokenizer %s, and this is %s", folder, *other)


def warn_of_initial_weights(job_config: JobConfig, tokenizer: Any) -> None:
    """Warn if the initial weights of a new run do not go with its tokenizer."""
    path = initial_load_path(job_config)
    if path is None:
        return
    if not is_hf_weights(path):
        manifest = Manifest.read(path)
        if not manifest.is_converted:
            if other := tokenizer_difference(manifest.model, describe_tokenizer(tokenizer)):
                logger.warning(
                    "%s: the weights in %s were trained with the tokenizer %s, and this run uses "
                    "%s",
                    *(origin(job_config, "model.tokenizer_path"), path, *other),
                )
            return
        path = Path(manifest.model["tokenizer"])  # the Hugging Face folder that `convert` has read
    if isinstance(tokenizer, BytesTokenizer) and _has_other_tokenizer(path):
        logger.warning(
            "%s: the weights in %s were probably trained with the tokenizer in their folder, and "
            "are useless for bytes: set model.tokenizer_path to a local copy of that folder",
            *(origin(job_config, "model.tokenizer_path"), path),
        )
    if not job_config.data.add_bos and getattr(tokenizer, "adds_bos", False):
        logger.warning(
            "data.add_bos is false, but the tokenizer of %s begins texts with bos, so the weights "
            "in %s were probably trained with it: set data.add_bos = true",
            job_config.model.tokenizer_path,
            path,
        )


def _has_other_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer other than `bytes` as `last_save_in_hf` writes it."""
    try:
        theirs = parse_json((folder / TOKENIZER_FILES[0]).read_bytes())["model"]
        return len(theirs["vocab"]) != 256 or bool(theirs["merges"])
    except OSError:
        return False
    except (ValueError, LookupError, TypeError):  # not a file that we write
        return True


def tokenizer_difference(saved: dict[str, Any], current: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the tokenizers of two descriptions if they differ."""
    if all(saved.get(key) == current.get(key) for key in ("tokenizer_sha256", "own_tokenizer")):
        return None
    was, now = (of.get("own_tokenizer") or of.get("tokenizer") for of in (saved, current))
    return was, now if now != was else f"{now} with other files"


def _digest_of_tokenizer(folder: Path) -> str:
    """Return the digest of a tokenizer's files. Raises `OutageError`."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            content = read_again(path, path.read_bytes)
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
