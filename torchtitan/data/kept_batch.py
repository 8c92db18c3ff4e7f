"""A batch kept in a folder, to be looked at later: `torchtitan data batch FOLDER`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.errors import ConfigError, DataError, begin_errors_with

_FACTS = "batch.json"


def keep_batch(
    folder: Path, dp_rank: int, batches: list[dict[str, torch.Tensor]], facts: dict[str, Any]
) -> None:
    """Write the rows of one data rank: `tokens`, `labels` and what else reaches the model.

    Data rank 0 also writes `facts`, among them `tokenizer`, a path or `bytes`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # What the trainer knows of texts follows from their tokens.
    names = [name for name in batches[0] if name not in ("positions", "document_ids")]
    arrays: dict[str, Any] = {
        name: np.concatenate([_array(name, batch[name]) for batch in batches]) for name in names
    }
    np.savez_compressed(folder / f"data-rank-{dp_rank}.npz", **arrays)
    if dp_rank == 0:
        (folder / _FACTS).write_text(json.dumps(facts))


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_floating_point():  # NumPy knows no bfloat16
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    elif name in ("tokens", "labels") and tensor.dtype == torch.int64:  # ids, which are small
        tensor = tensor.int()
    return tensor.numpy(force=True)


def show_batch(folder: Path, tokenizer_path: str | None = None, characters: int = 400) -> None:
    """Write each row of a kept batch to stdout: how much of it is trained on, and its text.

    Of what is no text, the shape and the range of values.

    Args:
        tokenizer_path: None for that of the run.
        characters: the most to show of a row.

    Raises:
        TitanError: the folder holds no batch, or the tokenizer is missing.
    """
    from torchtitan.components.loss import IGNORE_INDEX

    try:
        facts = json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no kept batch: {error}") from error
    lines = [f"{name:10} {value}" for name, value in facts.items()]
    decode: Any = None
    for number, (tokens, labels) in enumerate(_rows(folder)):
        if tokens.ndim != 1 or labels.ndim != 1 or tokens.dtype != np.int32:  # no text
            lines += [f"row {number}: tokens {_summary(tokens)}, labels {_summary(labels)}"]
            continue
        decode = decode or _decoder(tokenizer_path or facts["tokenizer"])
        trained = int((labels != IGNORE_INDEX).sum())
        text = decode(tokens[: 8 * characters].tolist())[:characters]
        lines += [
            "",
            f"--- row {number}: {len(tokens):,} tokens, {trained:,} trained on, "
            f"{len(np.unique(tokens)):,} distinct ---",
            text,
        ]
    sys.stdout.write("\n".join(lines) + "\n")


def _summary(values: np.ndarray) -> str:
    finite = values[np.isfinite(values)]
    text = f"{values.dtype} {list(values.shape)}"
    if finite.size:
        text += f" from {finite.min():.4g} to {finite.max():.4g}"
    bad = values.size - finite.size
    return f"{text}, {bad:,} NaN or infinite" if bad else text


def _rows(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of each row, of texts `[seq]`, in the order of the global batch."""
    files = sorted(folder.glob("data-rank-*.npz"), key=lambda p: int(p.stem.rpartition("-")[2]))
    for file in files:
        try:
            arrays = np.load(file)
            yield from zip(arrays["tokens"], arrays["labels"], strict=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{file} is damaged: {error}") from error


def _decoder(path: str) -> Any:
    from torchtitan.components.tokenizer import open_tokenizer

    with begin_errors_with(f"--tokenizer-path {path}"):
        if path != "bytes" and not Path(path).expanduser().is_dir():
            raise ConfigError("no such folder")
        return open_tokenizer(path).decode
