"""Whether runs train the same model: what a manifest says of it, and how two of these differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.components.tokenizer import path_of

from .huggingface import TOKENIZER_FILES, TRAINING_ONLY
from .manifest import nested_differences, plain_args

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

_WITH_BUFFERS = ("aux_loss_weight", "use_bias")


def describe_model(job_config: JobConfig, args: Any, tokenizer: Any) -> dict[str, Any]:
    """What a manifest says of the model, as JSON gives it back.

    Of a tokenizer of an author's, `own_tokenizer` tells.
    """
    path = path_of(tokenizer)
    described = {
        "name": job_config.model.name,
        "flavor": job_config.model.flavor,
        "args": plain_args(args),
        "tokenizer": _absolute(path),
        "tokenizer_sha256": _tokenizer_digest(path),
        "seq_len": job_config.training.seq_len,
    }
    if tokenizer is not None and not path:
        fields = ("vocab_size", "bos_id", "eos_id", "fingerprint")
        told = {name: getattr(tokenizer, name, None) for name in fields}
        described["own_tokenizer"] = {"class": type(tokenizer).__qualname__, **told}
    return described


def model_differences(
    saved: dict[str, Any], current: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Each field in which two descriptions are of another model, its old and new value.

    How attention is computed and how strongly a router is balanced make no other model. Whether it
    is, does: checkpoints have buffers for it. Of a tokenizer, its files count and not the place
    where they are.
    """
    for name in ("name", "flavor"):
        if saved.get(name) != current[name]:
            yield f"model.{name}", saved.get(name), current[name]
    if any(saved.get(key) != current.get(key) for key in ("tokenizer_sha256", "own_tokenizer")):
        was, now = (of.get("own_tokenizer") or of.get("tokenizer") for of in (saved, current))
        yield "model.tokenizer_path", was, now if now != was else f"{now} with other files"
    was, now = saved.get("args", {}), current["args"]
    for name, a, b in nested_differences(was, now):
        field = name.rpartition(".")[2]
        if field not in TRAINING_ONLY or (field in _WITH_BUFFERS and bool(a) != bool(b)):
            yield name, a, b


def _absolute(tokenizer: str) -> str:
    return tokenizer if tokenizer in ("", "bytes") else str(Path(tokenizer).expanduser().absolute())


def _tokenizer_digest(tokenizer: str) -> str:
    """Digest of the files that make a tokenizer; "" where there are none."""
    if tokenizer in ("", "bytes"):
        return ""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = Path(tokenizer).expanduser() / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
