"""Reads the folder that `torchtitan data prepare` writes; docs/data.md describes it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan.errors import DataError
from torchtitan.runtime.world import local_world_size, rank
from torchtitan.tools.foreign_files import parse_json

from .files import file_size, reading, sha256
from .mapped import SHARDS, map_file
from .token_shards import Shard, TokenFiles

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer

FORMAT = "torchtitan-tokens"
VERSION = 1
_OF_TOKENIZERS: dict[str, type] = {
    "path": str,
    "fingerprint": str,
    "eos_id": int,
    "vocab_size": int,
}
_OF_SHARDS: dict[str, type] = {
    "name": str,
    "tokens": int,
    "documents": int,
    "bin_sha256": str,
    "idx_sha256": str,
}
INDEX = "index.json"
_LONGEST_COPY = 2**24
"""Bytes of a document up to which it is copied."""


class PreparedShard:
    """Two files, mapped while their documents are used: see `mapped.SHARDS`."""

    def __init__(self, folder: Path, index: dict[str, Any], entry: dict[str, Any]) -> None:
        stem = f"{folder}{os.sep}{entry['name']}"
        self.path = f"{stem}.bin"
        self.dtype = np.dtype(index["dtype"])
        self.num_tokens: int = entry["tokens"]
        self.documents: int = entry["documents"]
        self._sizes = {
            self.path: self.num_tokens * self.dtype.itemsize,
            f"{stem}.idx": self.documents * 8,
        }

    def document(self, index: int) -> np.ndarray:
        """Return document `index`. Raises as `PreparedTokens` does: the files may have changed."""
        tokens: np.ndarray = SHARDS.get(self, self._map).document(index)
        # A view would keep its file open after `SHARDS` has evicted it.
        return tokens if tokens.nbytes > _LONGEST_COPY else tokens.copy()

    def _map(self) -> Shard:
        self.require_sizes()
        _, ends = self._sizes
        return Shard(self.path, map_file(self.path, self.dtype), map_file(ends, "<i8"))

    def require_sizes(self) -> None:
        """Raise `DataError` if a file has changed, or as `unreadable` says."""
        for path, expected in self._sizes.items():
            size = file_size(path)
            if size != expected:
                raise _changed(path, f"it has {size} bytes instead of {expected}")


class PreparedTokens(TokenFiles):
    """A folder of `torchtitan data prepare`.

    Raises:
        DataError: the folder is damaged, unfinished, or of a later version.
        OutageError: it cannot be read now.
    """

    shards: Sequence[PreparedShard]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        super().__init__([PreparedShard(folder, self.index, e) for e in self.index["shards"]])
        # Each rank of a host checks its share, since a host may have its own copy; `build` raises
        # an error that one rank finds on all ranks.
        for shard in self.shards[rank() % local_world_size() :: local_world_size()]:
            shard.require_sizes()

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        super().use_tokenizer(tokenizer)
        prepared = self.index["tokenizer"]
        for key in ("fingerprint", "eos_id", "vocab_size"):
            now = getattr(tokenizer, key, None)
            if now != prepared[key] and not (key == "fingerprint" and now is None):
                raise DataError(
                    f"{self.folder} was prepared with the tokenizer {prepared['path']!r} ({key} "
                    f"{prepared[key]}), but model.tokenizer_path is a different one ({key} "
                    f"{now}). Use that tokenizer, or prepare the data again"
                )

    def require_bos(self, bos_id: int) -> None:
        if not self.index.get("add_bos"):
            raise DataError(
                f"add_bos is set, but {self.folder} was prepared without it, so its documents do "
                "not begin with bos. Prepare the data again with --add-bos, or set add_bos to "
                "false"
            )
        written = self.index["tokenizer"].get("bos_id", bos_id)
        if written != bos_id:
            raise DataError(
                f"{self.folder} was prepared with the bos {written}, but the bos of "
                f"model.tokenizer_path is now {bos_id}. Use that tokenizer, or prepare the data "
                "again"
            )

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the content hashes of every `parts`-th shard with those of the index."""
        for entry in self.index["shards"][part::parts]:
            for suffix in ("bin", "idx"):
                path = self.folder / f"{entry['name']}.{suffix}"
                if sha256(path) != entry[f"{suffix}_sha256"]:
                    raise _changed(path, "its content hash does not match")


def read_index(folder: Path) -> dict[str, Any]:
    """Read `index.json` of a prepared folder. Raises `DataError`, or as `unreadable` says."""
    path = folder / INDEX
    with reading(path):
        content = path.read_bytes()
    try:
        index = parse_json(content.decode())
        if index["format"] != FORMAT or index["version"] > VERSION:
            raise DataError(
                f"{path} is of format {index['format']!r} version {index['version']}; this version "
                f"reads {FORMAT!r} up to {VERSION}"
            )
        _check_fields(index)
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return index


def _check_fields(index: dict[str, Any]) -> None:
    """Raise `LookupError` or `TypeError` if a field that is read later is missing or mistyped."""
    shards = index["shards"][0], *index["shards"][1:]
    tables: list[tuple[dict[str, Any], dict[str, type]]] = [
        (index, {"dtype": str, "skipped": int}),
        (index["source"], {"dataset": str}),
        (index["tokenizer"], _OF_TOKENIZERS),
        *((shard, _OF_SHARDS) for shard in shards),
    ]
    for table, kinds in tables:
        for key, kind in kinds.items():
            if type(table[key]) is not kind:
                raise TypeError(f"{key} is {table[key]!r}")
    np.dtype(index["dtype"])


def _changed(path: str | Path, how: str) -> DataError:
    return DataError(f"{path} has changed since it was prepared: {how}. Prepare the data again")
