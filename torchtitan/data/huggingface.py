"""Sources read through the `datasets` library: local tables, and streams from the hub.

`datasets` is imported only when a source is opened: the import takes a second, and `stdlib` and
`text` do not need it.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torchtitan.errors import (
    BadDocumentError,
    ConfigError,
    DataError,
    TitanError,
    begin_errors_with,
    did_you_mean,
    disk_is_full,
    outage_or,
)
from torchtitan.tools.foreign_files import exists, is_file
from torchtitan.tools.text import is_url

from .files import find_files, open_file, unpacked
from .json_lines import check_first
from .rows import TOOLS, Conversation, document_columns, document_of_table, read_line

if TYPE_CHECKING:
    import datasets
    import numpy as np


class Table:
    """Random access to the text column of a memory-mapped `datasets.Dataset`."""

    def __init__(
        self, dataset: datasets.Dataset, text_key: str, name: str, files: list[str]
    ) -> None:
        self._rows = dataset.select_columns(document_columns(text_key, dataset.column_names))
        self._text_key = text_key
        self._name = name
        self.files = files

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> object:
        """Return a document. Raises `BadDocumentError` if the row has no text, or none in UTF-8."""
        try:
            return document_of_table(self._rows[index], self._text_key)
        except (DataError, UnicodeDecodeError) as error:
            raise BadDocumentError(f"{self._name}, row {index} (from 0): {error}") from error


class Columns:
    """Random access to some columns of a memory-mapped `datasets.Dataset`, as NumPy arrays."""

    def __init__(self, dataset: datasets.Dataset, columns: Sequence[str], name: str) -> None:
        with begin_errors_with(name):
            chosen = _existing(columns, dataset.column_names)
        self._rows = dataset.select_columns(chosen).with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return a row: name of a column -> its value. Nested lists are one array."""
        return cast("dict[str, np.ndarray]", self._rows[index])


class Stream:
    """The texts of a `datasets.IterableDataset`, in its order; its files are the shards.

    A row without text is yielded as a `BadDocumentError`, for the reader to raise or to skip.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        text_key: str,
        name: str,
        config: str | None,
        split: str,
    ) -> None:
        if dataset.column_names:  # otherwise known only once rows are read
            dataset = dataset.select_columns(document_columns(text_key, dataset.column_names))
        self._dataset = dataset
        self._text_key = text_key
        self._name, self._config, self._split = name, config, split
        self.num_shards = dataset.num_shards

    @property
    def files(self) -> list[str]:
        """The files of a local copy; none for a dataset of the hub."""
        import datasets

        if not os.path.exists(self._name):
            return []
        found = datasets.load_dataset_builder(self._name, self._config).config.data_files or {}
        return [str(file) for file in found.get(self._split, [])]

    def __iter__(self) -> Iterator[object]:
        return self._texts(self._dataset, f"{self._name!r}")

    def shard(self, index: int) -> Iterator[object]:
        rows = self._dataset.shard(self.num_shards, index)
        return self._texts(rows, f"{self._name!r}, file {index} (from 0)")

    def _texts(self, rows: datasets.IterableDataset, where: str) -> Iterator[object]:
        with _explaining(where):
            for index, row in enumerate(rows):
                document: object
                try:
                    document = document_of_table(row, self._text_key)
                except DataError as error:
                    document = BadDocumentError(f"{where}, row {index} (from 0): {error}")
                yield document


def open_texts(kind: str, path: str | None, text_key: str, split: str | None = None) -> Table:
    """Open a table of texts. Args and errors: see `open_columns`."""
    dataset, name, files = _open(kind, path, split, partial(document_columns, text_key))
    return Table(dataset, text_key, name, files)


def open_columns(
    kind: str, path: str | None, columns: Sequence[str], split: str | None = None
) -> Columns:
    """Open a table whose rows are no texts, such as encoded images.

    Args:
        kind: `parquet` or `arrow`.
        path: `dataset_path` of the config section.
        columns: names of the columns to read.
        split: of an `arrow` folder that has several.

    Raises:
        ConfigError: `path` is missing, or `split` has no effect.
        DataError: the data is missing, empty or malformed, or lacks a column.
        OutageError: the data cannot be reached now.
    """
    choose = partial(_existing, columns)
    dataset, name, _ = _open(kind, path, split, choose, batch_size=16)  # rows may be large
    return Columns(dataset, columns, name)


def _existing(columns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return the columns. Raises `DataError` if one is not among the names."""
    for column in columns:
        if column not in names:
            raise DataError(f"no column {column!r}.{did_you_mean(column, names)}")
    return list(columns)


def _open(
    kind: str,
    path: str | None,
    split: str | None,
    choose: Callable[[Iterable[str]], list[str]],
    batch_size: int = 1000,
) -> tuple[datasets.Dataset, str, list[str]]:
    """Open a folder that `datasets` has saved, or the files at a path.

    `datasets` caches an uncompressed, memory-mapped copy of parquet files.

    Args:
        choose: returns the columns to copy, of those of parquet files; raises `DataError`.
        batch_size: rows to read at once, of parquet files. The default of `datasets` is the number
            of rows of a file's first group, which may be 0.

    Returns:
        The table, its name for messages, and its files.
    """
    folder = Path(path or "").expanduser()
    saved = any(is_file(folder / name, DataError) for name in ("state.json", "dataset_dict.json"))
    if kind == "arrow" and path and saved:
        dataset = _read_saved(str(folder), split)
        return dataset, repr(str(folder)), [file["filename"] for file in dataset.cache_files]
    if split is not None:
        raise ConfigError(f"split = {split!r} has no effect on plain files; remove it")
    files = find_files(path, (f".{kind}",))
    options: dict[str, Any] = {}
    if kind == "parquet":
        with _explaining(_name_of(files)):
            from pyarrow import parquet

            with open_file(files[0]) as file:
                options["columns"] = choose(parquet.read_schema(file).names)
        options["batch_size"] = batch_size
    return _load(kind, files, **options), _name_of(files), files


def open_json_arrays(files: list[str], text_key: str) -> Table:
    """Open files, perhaps compressed, each of which is a JSON array, as a table of texts."""
    return Table(_load("json", files), text_key, _name_of(files), files)


def _load(kind: str, files: list[str], **options: Any) -> datasets.Dataset:
    """Load files as a table, by paths or URLs."""
    import datasets

    exact = [file if is_url(file) else glob.escape(file) for file in files]
    with _explaining(_name_of(files)):
        return datasets.load_dataset(kind, data_files=exact, split="train", **options)


def _read_saved(folder: str, split: str | None) -> datasets.Dataset:
    """Open a folder of `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, memory-mapped."""
    import datasets

    with _explaining(repr(folder)):
        dataset = datasets.load_from_disk(folder)
    if isinstance(dataset, datasets.DatasetDict):
        name = split or "train"
        if name not in dataset:
            raise DataError(f"{folder!r} has no split {name!r}.{did_you_mean(name, dataset)}")
        dataset = dataset[name]
    elif split:
        raise ConfigError(f"split = {split!r} has no effect: {folder!r} contains a single split")
    return dataset


class Lines(Table):
    """A table of JSON-encoded documents; a malformed line is `{_BAD: reason}`.

    A `Conversation` is `{_MESSAGES: ..., TOOLS: ...}`.
    """

    def __getitem__(self, index: int) -> object:
        document = json.loads(self._rows[index][self._text_key])
        if not isinstance(document, dict):
            return document
        if _BAD in document:
            raise BadDocumentError(document[_BAD])
        return Conversation(document[_MESSAGES], document[TOOLS])


_BAD, _MESSAGES = "bad_line", "messages"


def open_lines(files: list[str], text_key: str) -> Lines:
    """Open compressed JSON Lines by copying the documents alone, since other fields may differ.

    Raises:
        DataError: a file cannot be read, all are empty, or the first object lacks `text_key`.
            Taking a document raises `BadDocumentError` if its line is not such an object.
    """
    import datasets

    versions = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    lines = ((f"{file}:{number}", line) for file in files for number, line in _lines(file))
    check_first(lines, text_key, files)
    with _explaining(_name_of(files)):
        rows = datasets.Dataset.from_generator(
            _documents_as_json,
            features=datasets.Features({text_key: datasets.Value("large_string")}),
            gen_kwargs={"files": files, "text_key": text_key, "versions": versions},
        )
    return Lines(cast("datasets.Dataset", rows), text_key, _name_of(files), files)


def _documents_as_json(
    files: list[str], text_key: str, versions: list[tuple[int, int]]
) -> Iterator[dict[str, str]]:
    """Yield rows; `datasets` caches a copy by the arguments, hence `versions`."""
    for file in files:
        for number, line in _lines(file):
            document: object
            try:
                document = read_line(line, text_key, file, number)
            except BadDocumentError as error:
                document = {_BAD: str(error)}
            if isinstance(document, Conversation):
                document = {_MESSAGES: document, TOOLS: document.tools}
            yield {text_key: json.dumps(document)}


def _lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers."""
    with unpacked(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


Streams = dict[tuple[str, str | None, str], tuple[str | None, Any]]
"""For a name, a configuration and a split, the configuration that there is, and its
`datasets.IterableDataset`; can be pickled."""
_opened: ContextVar[Streams | None] = ContextVar("streams that are opened once", default=None)


@contextmanager
def opening_once(streams: Streams) -> Iterator[None]:
    """Make `open_stream` take what is in `streams`, and put there what is not."""
    before = _opened.set(streams)
    try:
        yield
    finally:
        _opened.reset(before)


def open_stream(
    path: str | None,
    text_key: str,
    split: str | None = None,
    *,
    repository: str,
    config: str | None = None,
    usual_split: str = "train",
) -> Stream:
    """Stream a dataset of the Hugging Face hub, or a copy of it.

    Args:
        path: a local folder, or another repository, to read instead.
        repository: its name on the hub.
        config: its configuration (subset), None for the default one.

    Raises:
        DataError: there is no such dataset, or `path` cannot be opened.
        OutageError: the hub cannot be reached.
    """
    import datasets

    name, split = os.path.expanduser(path or repository), split or usual_split
    key = name, config, split
    known = _opened.get()
    streams: Streams = {} if known is None else known
    with _explaining(repr(name)):
        if key not in streams:
            if path and exists(Path(name), DataError):
                names = datasets.get_dataset_config_names(name)
                # A folder of data files alone has no named configurations.
                config = config if config in names else None
            dataset = datasets.load_dataset(name, config, split=split, streaming=True)
            streams[key] = config, dataset
    config, dataset = streams[key]
    return Stream(dataset, text_key, name, config, split)


@contextmanager
def _explaining(name: str) -> Iterator[None]:
    """Wrap code that reads by `datasets`, whose readers raise errors of many types."""
    try:
        yield
    except TitanError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` wraps errors of file formats
        if isinstance(cause, StopIteration):
            raise DataError(f"{name} is empty") from error
        detail = f"{type(cause).__name__}: {cause}"
        problem = f"{name} cannot be read as a dataset ({detail})"
        if disk_is_full(error):
            problem = (
                f"{name}: no space for its uncompressed copy in the cache of `datasets` "
                f"({detail}), which can be on another disk (HF_HOME)"
            )
        if isinstance(error, ConnectionError):
            problem = (
                f"{name}: the Hugging Face hub could not be reached ({detail}). Without a "
                "network, use `stdlib`, your own files with `text`, `jsonl` or `parquet`, or a "
                "local copy of the dataset with dataset_path"
            )
        raise outage_or(DataError, problem, error) from error


def _name_of(files: list[str]) -> str:
    if len(files) == 1:
        return repr(files[0])
    return f"one of the {len(files)} files {files[0]!r} to {files[-1]!r}"
