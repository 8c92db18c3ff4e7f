"""Named datasets: the registry, and the sources that need only files.

A source is one of two kinds.

* Random access: it has `len(source)` documents, and `source[i]` is one of them. They are shuffled
  again in every epoch. A plain list of texts is such a source.
* Sequential: each iteration yields the texts from the first one on. The order is kept. The source
  may consist of shards (files) that can be read one by one: then ranks divide the reading among
  them, and a resumed run reads on from its shard, not from the beginning.

A document is a text; a list of messages (`[{"role": ..., "content": ...}, ...]`), which the chat
template turns into a text; or an array of token ids, which is used as it is. A malformed document
is a `BadDocumentError`, raised by `source[i]` and yielded by a sequential source.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import math
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from torchtitan.data import huggingface
from torchtitan.errors import BadDocumentError, ConfigError, DataError, did_you_mean
from torchtitan.tools.text import is_url

from .files import file_size, find_files, line_number, open_file, reading
from .huggingface import open_columns as open_columns
from .json_lines import JsonLines, JsonLineStream, is_array
from .token_files import open_token_files

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class RandomAccess(Protocol):
    """A source whose texts can be read in any order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> object: ...


Sequential = Iterable[object]


@runtime_checkable
class Sharded(Protocol):
    """A sequential source with shards."""

    num_shards: int

    def __iter__(self) -> Iterator[object]: ...
    def shard(self, index: int) -> Iterable[object]:
        """Return the documents of one of the `num_shards` shards."""


def has_random_access(source: object) -> TypeIs[RandomAccess]:
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


Source = RandomAccess | Sequential
SourceFactory = Callable[..., Source]
"""`factory(dataset_path, text_key) -> Source`; raises a `TitanError` for a user's mistake.

A factory of a dataset with splits takes a third parameter, `split: str | None`.
"""


def num_shards(source: object) -> int:
    """Return the number of shards; 1 for a source without shards."""
    return source.num_shards if isinstance(source, Sharded) else 1


def shard_of(source: Sequential, index: int) -> Iterable[object]:
    """Return the documents of a shard; of a source with a single one, or none, those of it all."""
    return source.shard(index) if isinstance(source, Sharded) and source.num_shards > 1 else source


def take(source: RandomAccess, index: int) -> object:
    """Return document `index` of a random-access source, or the error if it is malformed."""
    try:
        return source[index]
    except BadDocumentError as error:
        return error


def documents_of(source: Source) -> Iterable[object]:
    """Return the documents in their order; a malformed one is a `BadDocumentError`."""
    if has_random_access(source):
        return map(partial(take, source), range(len(source)))
    return source


def first_document(source: Source, skips: bool) -> object | None:
    """Return the first document that is not empty, or None.

    Raises:
        DataError: a document before it is malformed, unless `skips`, or is a row of fields.
    """
    for document in documents_of(source):
        if isinstance(document, BadDocumentError):
            if not skips:
                raise document
        elif isinstance(document, dict):
            raise DataError("a document is a row of fields (dict). Give the text of each row")
        elif not hasattr(document, "__len__") or len(document):
            return document
    return None


def size_of(source: Source) -> dict[str, int]:
    """Return the number of `documents`, or else of `shards`, if the source knows one of them."""
    if has_random_access(source):
        return {"documents": len(source)}
    return {"shards": int(source.num_shards)} if isinstance(source, Sharded) else {}


def sample_of(source: Source) -> dict[str, int]:
    """Return `{"sample": checksum of 8 documents}` of a random-access source, to recognize it."""
    if not has_random_access(source):
        return {}
    plain: list[object] = []
    for number in range(8):
        document = take(source, number * len(source) // 8)
        if isinstance(document, np.ndarray):
            document = document.tolist()  # uint16 or uint32
        plain.append(None if isinstance(document, BadDocumentError) else document)
    return {"sample": zlib.crc32(repr(plain).encode(errors="surrogatepass"))}


DATASETS: dict[str, SourceFactory] = {}
"""Name of a dataset (`training.dataset`) -> its factory."""


def register_dataset(name: str, factory: SourceFactory) -> None:
    """Make a dataset known as `training.dataset = name`. Repeating the same call is harmless.

    Raises:
        ValueError: the name is taken by another factory.
    """
    if DATASETS.setdefault(name, factory) is not factory:
        raise ValueError(f"dataset {name!r} is already registered; choose another name")


def open_dataset(
    name: str, path: str | None, text_key: str = "text", split: str | None = None
) -> Source:
    """Open a dataset by name.

    Args:
        name: a key of `DATASETS`.
        path: `dataset_path` of the config section.
        text_key: field that holds the text, in formats that have fields.
        split: part of the dataset, None for the usual one.

    Raises:
        ConfigError: there is no such dataset, or `path` or `split` is missing or has no effect.
        DataError: the data is missing, empty or malformed.
        OutageError: the data cannot be reached now.
    """
    if name not in DATASETS:
        raise ConfigError(f"no such dataset.{did_you_mean(name, DATASETS)}")
    factory = DATASETS[name]
    if split is None:
        return factory(path, text_key)
    if "split" not in inspect.signature(factory).parameters:
        raise ConfigError(f"split = {split!r} has no effect here; remove it")
    return factory(path, text_key, split=split)


_LINE_BYTES = 2**14
"""Most lines are shorter."""


class TextFiles:
    """UTF-8 text files; each is a document.

    A file of more than `piece_bytes` is cut at line ends into pieces of about that size, each a
    document, so that a whole corpus in one file is shuffled too and need not fit into memory.

    Raises:
        DataError: a file cannot be read; `OutageError`: not now. Taking a document raises
            `BadDocumentError` if it is not UTF-8.
    """

    def __init__(self, files: list[str], piece_bytes: int = 2**20) -> None:
        self.files = files
        self._piece_bytes = piece_bytes
        pieces = (max(1, math.ceil(file_size(file) / piece_bytes)) for file in files)
        self._starts = list(itertools.accumulate(pieces, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> str:
        number = bisect.bisect_right(self._starts, index) - 1
        piece = index - self._starts[number]
        path = self.files[number]
        with reading(path), open_file(path) as file:
            start = self._cut(file, piece)
            end = self._cut(file, piece + 1)
            file.seek(start)
            content = file.read(end - start)
        try:
            return content.decode("utf-8" if start else "utf-8-sig")
        except UnicodeDecodeError as error:
            line = line_number(path, start + error.start)
            raise BadDocumentError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error

    def _cut(self, file: BinaryIO, piece: int) -> int:
        """Return the start of a piece: after the first line end in its share of the bytes."""
        if piece == 0:
            return 0
        start = piece * self._piece_bytes
        for share in (min(_LINE_BYTES, self._piece_bytes), self._piece_bytes):
            file.seek(start)
            content = file.read(share)
            line_end = content.find(b"\n")
            if line_end >= 0:
                return start + line_end + 1
        # A very long line is cut anywhere, but not within a character (10xxxxxx continues one).
        inside = itertools.takewhile(lambda byte: byte & 0xC0 == 0x80, content[:3])
        return start + len(list(inside))


def stdlib_files(held_out: bool) -> list[str]:
    """List the sources of the interpreter's standard library, sorted; a hash holds out about 5%.

    Raises:
        DataError: the interpreter comes without them.
    """
    root = sysconfig.get_paths()["stdlib"]
    not_text = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - not_text  # os.walk does not enter the removed ones
        names += [
            Path(folder, file).relative_to(root).as_posix()
            for file in files
            if file.endswith(".py") and not file.startswith("_sysconfigdata")  # of this build
        ]
    chosen = sorted(name for name in names if (zlib.crc32(name.encode()) % 20 == 0) == held_out)
    if not chosen:
        raise DataError(
            f"this Python has no library sources in {root}; use `text` with your own files"
        )
    return [os.path.join(root, name) for name in chosen]


def _open_stdlib(path: str | None, held_out: bool) -> TextFiles:
    if path is not None:
        raise ConfigError(
            "dataset_path has no effect here; remove it, or use `text` for your own files"
        )
    return TextFiles(stdlib_files(held_out))


def _open_jsonl(path: str | None, text_key: str) -> Source:
    plain = (".jsonl", ".json")
    packed = tuple(suffix + ending for suffix in plain for ending in (".gz", ".zst"))
    files = find_files(path, plain + packed)
    if any(map(is_url, files)):
        return JsonLineStream(files, text_key)
    if is_array(files[0]):
        return huggingface.open_json_arrays(files, text_key)
    if any(file.endswith((".gz", ".zst")) for file in files):
        return huggingface.open_lines(files, text_key)
    return JsonLines(files, text_key)


def _open_hub(path: str | None, text_key: str, split: str | None = None) -> Sequential:
    """`path` is `REPOSITORY`, `REPOSITORY:CONFIGURATION`, or a local copy."""
    if not path:
        raise ConfigError(
            "needs dataset_path: a repository of the Hugging Face hub, such as "
            "'HuggingFaceFW/fineweb' or 'allenai/c4:en', or a local copy"
        )
    is_local = os.path.exists(os.path.expanduser(path))  # its name may have a colon
    repository, _, config = (path, "", "") if is_local else path.partition(":")
    return huggingface.open_stream(
        None, text_key, split, repository=repository, config=config or None
    )


register_dataset("stdlib", lambda path, text_key: _open_stdlib(path, held_out=False))
register_dataset("stdlib_validation", lambda path, text_key: _open_stdlib(path, held_out=True))
register_dataset("text", lambda path, text_key: TextFiles(find_files(path)))
register_dataset("jsonl", _open_jsonl)
register_dataset(
    "parquet", lambda path, text_key: huggingface.open_texts("parquet", path, text_key)
)
register_dataset("arrow", partial(huggingface.open_texts, "arrow"))
register_dataset("hf", _open_hub)
register_dataset("tokens", lambda path, text_key: open_token_files(path))
_ON_HUB: dict[str, dict[str, Any]] = {
    "c4": {"repository": "allenai/c4", "config": "en"},
    "c4_validation": {"repository": "allenai/c4", "config": "en", "usual_split": "validation"},
    "fineweb": {"repository": "HuggingFaceFW/fineweb"},
    "fineweb_edu": {"repository": "HuggingFaceFW/fineweb-edu"},
    "slimpajama": {"repository": "cerebras/SlimPajama-627B"},
}
for _name, _place in _ON_HUB.items():
    register_dataset(_name, partial(huggingface.open_stream, **_place))
HUB_DATASETS = ("hf", *_ON_HUB)
"""Datasets that `huggingface.open_stream` opens."""
