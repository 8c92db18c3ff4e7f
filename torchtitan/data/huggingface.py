"""Sources read through the `datasets` library: local tables, and streams from the hub.

`datasets` is imported when a source is opened: it takes a second, and `stdlib` and `text` need none
of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torchtitan.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets


class Table:
    """Random access to the text column of a memory-mapped `datasets.Dataset`."""

    def __init__(self, dataset: datasets.Dataset, text_key: str) -> None:
        _check_key(text_key, dataset.column_names)
        self._rows = dataset.select_columns(text_key)
        self._text_key = text_key

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> str:
        return _text(self._rows[index], self._text_key, index)


class Stream:
    """The texts of a `datasets.IterableDataset`, in its order; its files are the shards."""

    def __init__(self, dataset: datasets.IterableDataset, text_key: str, name: str) -> None:
        if dataset.column_names is not None:  # else known only once rows are read
            _check_key(text_key, dataset.column_names)
            dataset = dataset.select_columns(text_key)
        self._dataset = dataset
        self._text_key = text_key
        self._name = name
        self.num_shards = dataset.num_shards

    def __iter__(self) -> Iterator[str]:
        return self._texts(self._dataset)

    def shard(self, index: int) -> Iterator[str]:
        return self._texts(self._dataset.shard(self.num_shards, index))

    def _texts(self, rows: datasets.IterableDataset) -> Iterator[str]:
        try:
            for index, row in enumerate(rows):
                yield _text(row, self._text_key, index)
        except DataError:
            raise
        except Exception as error:
            raise _unreadable(self._name, error) from error


def open_files(kind: str, files: list[str], text_key: str) -> Table:
    """Local files as a table. `datasets` keeps a memory-mapped copy in its cache folder.

    Args:
        kind: `json` (lines) or `parquet`.
        files: paths; `json` files may be compressed.
        text_key: field that holds the text.

    Raises:
        DataError: a file is malformed, or the text is not under `text_key`.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(kind, data_files=files, split="train")
    except Exception as error:  # the readers behind `datasets` raise their own types
        if kind == "json":
            _check_json_lines(files)
        raise _unreadable(files[0] if len(files) == 1 else f"one of {files}", error) from error
    return Table(dataset, text_key)


def open_stream(
    repository: str, config: str | None, split: str, path: str | None, text_key: str
) -> Stream:
    """Stream a dataset of the Hugging Face hub, or a copy of it.

    Args:
        repository: its name on the hub.
        config: its configuration (subset), None for the default one.
        split: its split.
        path: a local folder, or another repository, to read instead.
        text_key: field that holds the text.

    Raises:
        DataError: the hub cannot be reached, or what is at `path` cannot be opened.
    """
    import datasets

    name = path or repository
    try:
        if path and os.path.exists(os.path.expanduser(path)):
            name = os.path.expanduser(path)
            if config not in datasets.get_dataset_config_names(name):
                config = None  # a folder of data files alone has no named configurations
        dataset = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # of `datasets`, `huggingface_hub`, `fsspec` or the file format
        raise _unreadable(name, error) from error
    return Stream(dataset, text_key, name)


def _unreadable(name: str, error: Exception) -> DataError:
    cause = error.__cause__ or error  # `datasets` wraps errors of file formats
    detail = f"{type(cause).__name__}: {cause}"
    if isinstance(error, ConnectionError):
        return DataError(
            f"{name!r}: the Hugging Face hub could not be reached ({detail}). Without a network "
            "use `stdlib`, own files with `text`, `jsonl` or `parquet`, or a local copy of the "
            "dataset with dataset_path"
        )
    return DataError(f"{name!r} cannot be read as a dataset ({detail})")


def _check_key(text_key: str, keys: Iterable[str]) -> None:
    if text_key not in keys:
        raise DataError(f"text_key = {text_key!r}: no such field.{did_you_mean(text_key, keys)}")


def _text(row: dict[str, Any], text_key: str, index: int) -> str:
    _check_key(text_key, row)
    text = row[text_key]
    if not isinstance(text, str):
        kind = "missing" if text is None else f"{type(text).__name__}, not text"
        raise DataError(f"row {index} (from 0): the field {text_key!r} is {kind}")
    return text


def _check_json_lines(files: list[str]) -> None:
    """Raise `DataError` for the first line that is no JSON object in UTF-8."""
    import fsspec

    for file in files:
        with fsspec.open(file, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip() and not isinstance(json.loads(line), dict):
                        raise DataError(f"{file}:{number}: must be a JSON object")
                except UnicodeDecodeError as error:
                    raise DataError(f"{file}:{number}: not UTF-8 text") from error
                except ValueError as error:
                    raise DataError(f"{file}:{number}: not valid JSON ({error})") from error
