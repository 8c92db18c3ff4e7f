"""Documents that are token ids already, in memory-mapped files: the dataset `tokens`.

Three formats are read; docs/data.md describes the first.

* The folder that `torchtitan data prepare` writes: `index.json` and shards.
* Megatron-LM's indexed dataset: `NAME.bin` beside `NAME.idx`.
* nanoGPT's `.bin`: uint16 ids alone, or with the header of llm.c and modded-nanogpt; with that of
  llm.c for Llama 3 they are uint32.

Neither tokens nor an index are loaded: a document costs the pages that it lies on.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan.errors import BadDocumentError, ConfigError, DataError

from .files import ends_of, find_files, is_url, reading, sha256

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer

FORMAT = "torchtitan-tokens"
VERSION = 1
INDEX = "index.json"
_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_HEADER_WORDS = 256
"""Of 4 bytes: a magic number, a version, how many tokens follow, and zeros."""
_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic number -> version and type of the ids, as llm.c's `data_common.py` writes them."""
_BLOCK_TOKENS = 2**16
"""Of a file in which no token ends a document."""


@dataclass
class Shard:
    """One file of tokens and where its documents are."""

    path: str
    tokens: np.ndarray
    """`[tokens]`, of an integer type, memory-mapped."""
    ends: Sequence[int] | np.ndarray
    """`[documents]`: the token after the last one of each document."""

    @property
    def documents(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> np.ndarray:
        start = self.ends[index - 1] if index else 0
        return self.tokens[int(start) : int(self.ends[index])]


@dataclass
class MegatronShard:
    """A `.bin` of Megatron-LM: a document is a range of sequences, which lie one after another."""

    path: str
    tokens: np.ndarray
    """`[tokens]`"""
    lengths: np.ndarray
    """`[sequences]` int32: tokens."""
    pointers: np.ndarray
    """`[sequences]` int64: first byte."""
    bounds: np.ndarray
    """`[documents + 1]` int64: number of each document's first sequence."""

    @property
    def documents(self) -> int:
        return max(0, len(self.bounds) - 1)

    def document(self, index: int) -> np.ndarray:
        """Raises `DataError` where it is no range of sequences."""
        first, last = int(self.bounds[index]), int(self.bounds[index + 1]) - 1
        if not 0 <= first <= last + 1 <= len(self.lengths):
            raise _not_in_order(_megatron_index(self.path), len(self.lengths))
        if first > last:
            return self.tokens[:0]
        size = self.tokens.itemsize
        end = int(self.pointers[last]) // size + int(self.lengths[last])
        return self.tokens[int(self.pointers[first]) // size : end]


class TokenFiles:
    """Random access to documents of token ids: `source[i]` is `[length]`, of an integer type."""

    def __init__(self, shards: Sequence[Shard | MegatronShard]) -> None:
        self.shards = shards
        self._vocab_size: int | None = None
        self._limit: int | None = None
        self._count()

    def _count(self) -> None:
        self._ends = list(itertools.accumulate(shard.documents for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> np.ndarray:
        number = bisect.bisect_right(self._ends, index)
        shard = self.shards[number]
        place = index - (self._ends[number - 1] if number else 0)
        tokens = shard.document(place)
        if self._vocab_size is not None and len(tokens):
            _check_ids(tokens, self._vocab_size, f"{shard.path}, document {place} (from 0)")
        if self._limit is not None and len(tokens) and tokens.max() >= self._limit:
            raise BadDocumentError(
                f"{shard.path}, document {place} (from 0): token {tokens.max()} has no embedding: "
                f"the vocabulary of the model is {self._limit}"
            )
        return tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Called before documents are taken.

        Raises:
            DataError: the tokens are not this tokenizer's.
        """
        self._limit = getattr(tokenizer, "limit", None)

    def require_bos(self, bos_id: int) -> None:
        """Called if documents shall begin with bos, since nothing is added to ids.

        Raises:
            DataError: the first document does not.
        """
        documents = (self[index] for index in range(len(self)))
        # One may be an eos alone, which is GPT-2's bos too.
        first = next((tokens for tokens in documents if len(tokens) > 1), None)
        if first is not None and first[0] != bos_id:
            raise DataError(
                f"{self.shards[0].path}: add_bos is set, but these documents are token ids, which "
                f"are taken as they are, and they do not begin with bos ({bos_id}). Write it into "
                "the file, or set add_bos to false"
            )


class PreparedTokens(TokenFiles):
    """A folder of `torchtitan data prepare`.

    Raises:
        DataError: it is damaged, unfinished, or of a later version.
        OutageError: it cannot be read now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        super().__init__([self._open(entry) for entry in self.index["shards"]])

    def _open(self, entry: dict[str, Any]) -> Shard:
        path = self.folder / f"{entry['name']}.bin"
        index = self.folder / f"{entry['name']}.idx"
        dtype = np.dtype(self.index["dtype"])
        _require_size(path, entry["tokens"] * dtype.itemsize)
        _require_size(index, entry["documents"] * 8)
        return Shard(str(path), map_file(path, dtype), map_file(index, np.dtype("<i8")))

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().use_tokenizer(tokenizer)
        prepared = self.index["tokenizer"]
        for key in ("fingerprint", "eos_id", "vocab_size"):
            now = getattr(tokenizer, key, None)
            if now != prepared[key] and not (key == "fingerprint" and now is None):
                raise DataError(
                    f"{self.folder} was prepared with the tokenizer {prepared['path']!r} ({key} "
                    f"{prepared[key]}), but model.tokenizer_path is another one ({key} {now}). Use "
                    "that tokenizer, or prepare the data again"
                )

    def require_bos(self, bos_id: int) -> None:
        if not self.index.get("add_bos"):
            raise DataError(
                f"add_bos is set, but {self.folder} was prepared without: its documents do not "
                "begin with bos. Prepare the data again with --add-bos, or set add_bos to false"
            )
        written = self.index["tokenizer"].get("bos_id", bos_id)
        if written != bos_id:
            raise DataError(
                f"{self.folder} was prepared with the bos {written}, but that of model."
                f"tokenizer_path is {bos_id} now. Use that tokenizer, or prepare the data again"
            )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the content hashes of every `parts`-th shard with those of the index.

        Raises:
            DataError: a shard has changed.
        """
        for entry in self.index["shards"][part::parts]:
            for suffix in ("bin", "idx"):
                path = self.folder / f"{entry['name']}.{suffix}"
                if sha256(path) != entry[f"{suffix}_sha256"]:
                    raise _changed(path, "its content hash is another")


def read_index(folder: Path) -> dict[str, Any]:
    """`index.json` of a prepared folder. Raises `DataError`, or as `unreadable` says."""
    path = folder / INDEX
    with reading(path):
        content = path.read_bytes()
    try:
        index = json.loads(content.decode())
        if index["format"] != FORMAT or index["version"] > VERSION:
            raise DataError(
                f"{path} is of format {index['format']!r} version {index['version']}; this version "
                f"reads {FORMAT!r} up to {VERSION}"
            )
        _ = index["dtype"], index["tokenizer"]["fingerprint"], index["shards"][0]["documents"]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return index


class MegatronTokens(TokenFiles):
    """Megatron-LM's `.bin` files, each beside its `.idx`.

    A document gets the end-of-sequence token that it lacks, unless it was prepared with one
    (`--append-eod`).

    Raises:
        DataError: a file is missing, damaged, or not of integers.
    """

    def __init__(self, files: list[str]) -> None:
        super().__init__([_open_megatron(Path(file)) for file in files])
        self._eos_id: int | None = None

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().use_tokenizer(tokenizer)
        self._eos_id, self._vocab_size = tokenizer.eos_id, tokenizer.vocab_size

    def __getitem__(self, index: int) -> np.ndarray:
        tokens = super().__getitem__(index)
        if self._eos_id is not None and len(tokens) and tokens[-1] != self._eos_id:
            tokens = np.append(tokens.astype(np.int32), np.int32(self._eos_id))
        return tokens


class NanoGPTTokens(TokenFiles):
    """nanoGPT's `.bin` files. The tokenizer's end-of-sequence token ends each document.

    In a file without that token, as llm.c's of Llama 3, bos begins each. One without either, as
    nanoGPT's characters, is cut into blocks of 65,536 tokens.

    Raises:
        DataError: a file is empty, of an odd number of bytes, or has a header that is unknown.
    """

    def __init__(self, files: list[str]) -> None:
        self._layouts = [_nanogpt_layout(Path(file)) for file in files]
        shards: list[Shard] = []
        for file, (start, dtype) in zip(files, self._layouts, strict=True):
            tokens = map_file(Path(file), np.dtype(dtype), start)
            shards.append(Shard(file, tokens, _blocks(len(tokens))))
        super().__init__(shards)
        self._files = shards

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().use_tokenizer(tokenizer)
        self._vocab_size = tokenizer.vocab_size
        for shard, (start, dtype) in zip(self._files, self._layouts, strict=True):
            largest, bos_id = np.iinfo(dtype).max, getattr(tokenizer, "bos_id", None)
            ends = np.empty(0, np.int64)
            if tokenizer.eos_id <= largest:
                ends = ends_of(shard.path, tokenizer.eos_id, dtype, start)
            if len(ends) < 2 and bos_id is not None and bos_id <= largest:
                places = ends_of(shard.path, bos_id, dtype, start) - 1
                begins = places[(places > 0) & (shard.tokens[places] == bos_id)]
                ends = np.append(begins, len(shard.tokens))
            shard.ends = ends if len(ends) > 1 else _blocks(len(shard.tokens))
        self._count()


def open_token_files(path: str | None) -> TokenFiles:
    """Prepared tokens of any of the three formats, at a folder, a file or a glob.

    Raises:
        ConfigError: no path is given, or it is a URL.
        DataError: there is no such file, or it is damaged.
    """
    if path and is_url(path):
        raise ConfigError(
            f"dataset_path = {path!r}: tokens are memory-mapped and must be local files. Copy them"
        )
    folder = Path(path or "").expanduser()
    if path and (folder / INDEX).is_file():
        return PreparedTokens(folder)
    if path and (folder / "prepare.json").is_file():
        raise DataError(
            f"{folder} is not finished: run the same `torchtitan data prepare` again, which goes on"
        )
    files = [file for file in find_files(path, (".bin",)) if not file.endswith(".idx")]
    for file in files:
        if not file.endswith(".bin"):
            raise DataError(
                f"{file} holds no tokens, which are in files that end in .bin. Text is read by "
                "another dataset (jsonl, text, parquet), or prepared first: torchtitan data prepare"
            )
    with_index = [file for file in files if _megatron_index(file).is_file()]
    if with_index and len(with_index) < len(files):
        lacking = next(file for file in files if file not in with_index)
        raise DataError(f"{lacking} has no .idx beside it, unlike {with_index[0]}")
    return MegatronTokens(files) if with_index else NanoGPTTokens(files)


def map_file(path: Path, dtype: np.dtype, start: int = 0) -> np.ndarray:
    """A file's items from byte `start` on, memory-mapped: `[items]`.

    Raises:
        DataError: it is no whole number of items, or as `unreadable` says.
    """
    try:
        with reading(path):
            if path.stat().st_size == start:
                return np.empty(0, dtype)
            return np.memmap(path, dtype, "r", start).view(np.ndarray)
    except ValueError as error:
        raise DataError(f"{path} is damaged: it is no whole number of {dtype.name} ids") from error


def _open_megatron(path: Path) -> MegatronShard:
    index = _megatron_index(str(path))
    with reading(index), index.open("rb") as file:
        magic = file.read(len(_MEGATRON_MAGIC))
        version = int.from_bytes(file.read(8), "little")
        code = int.from_bytes(file.read(1), "little")
        sequences = int.from_bytes(file.read(8), "little")
        bounds = int.from_bytes(file.read(8), "little")
        start = file.tell()
    if magic != _MEGATRON_MAGIC or version != 1:
        raise DataError(f"{index} is not an index of Megatron-LM's indexed datasets, version 1")
    if code not in _MEGATRON_TYPES:
        raise DataError(f"{index} is of a data type ({code}) that token ids do not have")
    if index.stat().st_size < start + 12 * sequences + 8 * bounds:
        raise DataError(f"{index} is damaged: it is too short for its {sequences} sequences")

    def section(dtype: str, items: int) -> np.ndarray:
        nonlocal start
        found: np.ndarray | list[int] = []
        if items:
            found = np.memmap(index, dtype, "r", start, (items,)).view(np.ndarray)
        start += items * np.dtype(dtype).itemsize
        return np.asarray(found)

    lengths, pointers = section("<i4", sequences), section("<i8", sequences)
    documents = section("<i8", bounds)
    tokens = map_file(path, np.dtype(_MEGATRON_TYPES[code]).newbyteorder("<"))
    if sequences and pointers[-1] // tokens.itemsize + lengths[-1] > len(tokens):
        raise DataError(f"{path} is damaged: it is too short for {index}")
    # The bounds between are looked at with their documents, as reading all would take long.
    if bounds and (documents[0] != 0 or documents[-1] != sequences):
        raise _not_in_order(index, sequences)
    return MegatronShard(str(path), tokens, lengths, pointers, documents)


def _not_in_order(index: Path, sequences: int) -> DataError:
    return DataError(
        f"{index} is damaged: its documents are not one after another, each of some of its "
        f"{sequences} sequences"
    )


def _megatron_index(path: str) -> Path:
    return Path(path).with_suffix(".idx")


def _nanogpt_layout(path: Path) -> tuple[int, str]:
    """Bytes before the tokens, and their type. Raises `DataError`, or as `unreadable` says."""
    with reading(path):
        head = np.fromfile(path, "<i4", _HEADER_WORDS)
        size = os.path.getsize(path)
    if len(head) < 3:
        return 0, "<u2"
    magic, version, tokens = head[:3].tolist()
    if magic in _HEADERS:
        expected, dtype = _HEADERS[magic]
        start = 4 * _HEADER_WORDS
        if version != expected or size != start + tokens * np.dtype(dtype).itemsize:
            raise DataError(
                f"{path} is damaged: its header says {tokens} tokens, version {version}, but it "
                f"has {size} bytes; read is version {expected}, of {np.dtype(dtype).name}"
            )
        return start, dtype
    if len(head) == _HEADER_WORDS and magic >> 16 and not head[3:].any():
        raise DataError(
            f"{path} begins with a header of an unknown kind ({magic}). Known are those of llm.c, "
            f"{' and '.join(map(str, _HEADERS))}; `torchtitan data prepare` writes other files"
        )
    return 0, "<u2"


def _blocks(tokens: int) -> Sequence[int]:
    """Ends of blocks of equal size; the last one has the rest too."""
    blocks = max(1, tokens // _BLOCK_TOKENS)
    if tokens == 0:
        return ()
    if blocks * _BLOCK_TOKENS == tokens:
        return range(_BLOCK_TOKENS, tokens + 1, _BLOCK_TOKENS)
    return [*range(_BLOCK_TOKENS, blocks * _BLOCK_TOKENS, _BLOCK_TOKENS), tokens]


def _check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    largest = int(tokens.max())
    if largest >= vocab_size or tokens.min() < 0:
        raise DataError(
            f"{where}: token {largest} is outside of the tokenizer's vocabulary of {vocab_size}. "
            "The file was made with another tokenizer than model.tokenizer_path"
        )


def _require_size(path: Path, expected: int) -> None:
    with reading(path):
        size = path.stat().st_size
    if size != expected:
        raise _changed(path, f"it has {size} bytes instead of {expected}")


def _changed(path: Path, how: str) -> DataError:
    return DataError(f"{path} has changed since it was prepared: {how}. Prepare the data again")
