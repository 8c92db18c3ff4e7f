"""Keeps a batch in a folder for later inspection by `torchtitan data batch FOLDER`."""

from __future__ import annotations

import itertools
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import open_tokenizer
from torchtitan.errors import ConfigError, DataError, begin_errors_with
from torchtitan.tools.foreign_files import is_folder, read_json
from torchtitan.tools.text import first_line

_FACTS = "batch.json"


def keep_batch(
    folder: Path, dp_rank: int, batches: list[dict[str, torch.Tensor]], facts: dict[str, Any]
) -> None:
    """Write the rows of one data rank: `tokens`, `labels` and the model's other inputs.

    An array whose shape or dtype differs between micro-batches, or that some of them lack, is
    written for each micro-batch separately, as `0.tokens`, `1.tokens`.

    Data rank 0 also writes `facts`, among them `tokenizer`, a path or `bytes`.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The positions and document ids of texts follow from their tokens.
    names = set().union(*batches) - {"positions", "document_ids"}
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(names):
        parts = {i: _array(name, batch[name]) for i, batch in enumerate(batches) if name in batch}
        kinds = {(part.dtype, part.shape[1:]) for part in parts.values()}
        if len(parts) == len(batches) and len(kinds) == 1:
            arrays[name] = np.concatenate(list(parts.values()))
        else:
            arrays |= {f"{number}.{name}": part for number, part in parts.items()}
    _write(folder / f"data-rank-{dp_rank}.npz", arrays)
    if dp_rank == 0:
        (folder / _FACTS).write_text(json.dumps(facts))


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    # Like np.savez_compressed, which cannot write an array named like one of its own arguments.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _array(name: str, tensor: torch.Tensor) -> np.ndarray:
    if tensor.is_floating_point():  # NumPy knows no bfloat16
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    elif name in ("tokens", "labels") and tensor.dtype == torch.int64:  # ids are small
        tensor = tensor.int()
    return tensor.numpy(force=True)


def show_batch(folder: Path, tokenizer_path: str | None = None, characters: int = 400) -> None:
    """Write each row of a kept batch to stdout: its text, and how much of it is trained on.

    Of other inputs, and if a row is no text, write the shape and the range of the values.
    """
    with begin_errors_with(f"{folder} holds no kept batch"):
        facts = read_json(folder / _FACTS, DataError)
    if not isinstance(facts.get("tokenizer"), str):
        raise DataError(f"{folder / _FACTS} is damaged: it has no tokenizer entry")
    lines = [f"{name:10} {value}" for name, value in facts.items()]
    decode: Any = None
    for number, (tokens, labels, others) in enumerate(_rows(folder)):
        told = ", ".join(f"{name} {_summary(values)}" for name, values in others.items())
        if tokens.ndim != 1 or labels.ndim != 1 or tokens.dtype != np.int32:  # no text
            shown = f"tokens {_summary(tokens)}, labels {_summary(labels)}"
            lines += [f"row {number}: {shown}{', ' * bool(told)}{told}"]
            continue
        decode = decode or _decoder(tokenizer_path or facts["tokenizer"])
        trained = int((labels != IGNORE_INDEX).sum())
        text = decode(tokens[: 8 * characters].tolist())[:characters]
        lines += [
            "",
            f"--- row {number}: {len(tokens):,} tokens, {trained:,} trained on, "
            f"{len(np.unique(tokens)):,} distinct ---",
            text,
            *filter(None, [told]),
        ]
    sys.stdout.write("\n".join(lines) + "\n")


def _summary(values: np.ndarray) -> str:
    if not values.ndim:
        return str(values)
    finite = values[np.isfinite(values)]
    text = f"{values.dtype} {list(values.shape)}"
    if finite.size:
        text += f" from {finite.min():.4g} to {finite.max():.4g}"
    bad = values.size - finite.size
    return f"{text}, {bad:,} NaN or infinite" if bad else text


def _rows(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]]:
    """Yield tokens and labels of each row (`[seq]` for texts), in the order of the global batch.

    Last, yield the row's other inputs by name, except those written for each micro-batch.
    """
    numbers = {path: path.stem.rpartition("-")[2] for path in folder.glob("data-rank-*.npz")}
    files = [path for path, number in numbers.items() if number.isdecimal()]
    for file in sorted(files, key=lambda path: int(numbers[path])):
        try:
            arrays = np.load(file)
            whole = [name for name in arrays.files if not name.partition(".")[0].isdecimal()]
            others = {name: arrays[name] for name in whole if name not in ("tokens", "labels")}
            pairs = zip(_of(arrays, "tokens"), _of(arrays, "labels"), strict=True)
            for row, pair in enumerate(pairs):
                yield *pair, {name: values[row] for name, values in others.items()}
        except Exception as error:  # zipfile, its codecs and NumPy raise many types
            raise DataError(f"{file} is damaged: {first_line(error)}") from error


def _of(arrays: Mapping[str, np.ndarray], name: str) -> Iterator[np.ndarray]:
    """Yield the rows of an array, written as a whole or for each micro-batch separately."""
    if name in arrays or f"0.{name}" not in arrays:
        yield from arrays[name]
        return
    for number in itertools.takewhile(lambda i: f"{i}.{name}" in arrays, itertools.count()):
        yield from arrays[f"{number}.{name}"]


def _decoder(path: str) -> Any:
    """Return a function from ids to text, or to numbers if the run's tokenizer had no path."""
    if not path:
        return lambda ids: " ".join(map(str, ids))
    with begin_errors_with(f"--tokenizer-path {path}"):
        if path != "bytes" and not is_folder(Path(path).expanduser(), ConfigError):
            raise ConfigError("no such folder")
        return open_tokenizer(path).decode
