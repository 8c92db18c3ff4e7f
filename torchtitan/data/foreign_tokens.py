"""Reads token files of other programs: Megatron-LM, nanoGPT and llm.c."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchtitan.errors import DataError
from torchtitan.tools.logging import rank0

from .files import reading
from .mapped import map_file, read_ahead
from .piece_ends import ends_of
from .token_shards import MappedTokens, Shard, TokenFiles

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer

_MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
_MEGATRON_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type of the ids, numbers of sequences and of bounds of documents."""
_MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_HEADER_WORDS = 256
"""Words of 4 bytes: a magic number, a version, how many tokens follow, and zeros."""
_HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""Magic number -> version and type of the ids, as llm.c's `data_common.py` writes them."""
_BLOCK_TOKENS = 2**16
"""Tokens of a document, for a file without a token that ends documents."""


@dataclass
class MegatronShard(MappedTokens):
    """A `.bin` of Megatron-LM: a document is a range of consecutive sequences."""

    lengths: np.ndarray
    """`[sequences]` int32: tokens."""
    pointers: np.ndarray
    """`[sequences]` int64: first byte."""
    bounds: np.ndarray
    """`[documents + 1]` int64: each document's first sequence."""

    @property
    def documents(self) -> int:
        return max(0, len(self.bounds) - 1)

    def document(self, index: int) -> np.ndarray:
        """Return document `index`. Raises `DataError` if its bounds are no range of sequences."""
        first, last = int(self.bounds[index]), int(self.bounds[index + 1]) - 1
        if not 0 <= first <= last + 1 <= len(self.lengths):
            raise _not_in_order(megatron_index(self.path), len(self.lengths))
        if first > last:
            return self.tokens[:0]
        size = self.tokens.itemsize
        end = int(self.pointers[last]) // size + int(self.lengths[last])
        return read_ahead(self.tokens, int(self.pointers[first]) // size, end)


class MegatronTokens(TokenFiles):
    """Megatron-LM's `.bin` files, each with its `.idx`.

    The end-of-sequence token is added to each document, unless the document already ends with it
    (prepared with `--append-eod`).

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

    In a file without that token, such as llm.c's for Llama 3, bos begins each document. A file with
    neither, such as nanoGPT's characters, is cut into blocks of 65,536 tokens.

    Raises:
        DataError: a file is empty, has an odd number of bytes, an unknown header, or larger ids.
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
            largest, bos_id = np.iinfo(dtype).max, tokenizer.bos_id
            ends = np.empty(0, np.int64)
            if tokenizer.eos_id <= largest:
                ends = ends_of(shard.path, tokenizer.eos_id, dtype, start)
            if len(ends) < 2 and bos_id is not None and bos_id <= largest:
                places = ends_of(shard.path, bos_id, dtype, start) - 1
                begins = places[(places > 0) & (shard.tokens[places] == bos_id)]
                ends = np.append(begins, len(shard.tokens))
            if len(ends) < 2 and len(shard.tokens) > _BLOCK_TOKENS:
                rank0.warning(
                    "%s has neither the tokenizer's eos (%s) nor bos (%s), which separate "
                    "documents: it is cut into documents of %s tokens",
                    *(shard.path, tokenizer.eos_id, bos_id, f"{_BLOCK_TOKENS:,}"),
                )
            shard.ends = ends if len(ends) > 1 else _blocks(len(shard.tokens))
        self._count()


def _open_megatron(path: Path) -> MegatronShard:
    index = megatron_index(str(path))
    start = _MEGATRON_HEADER.size
    content = map_file(index, "u1")
    head = content[:start].tobytes().ljust(start, b"\x00")
    magic, version, code, sequences, bounds = _MEGATRON_HEADER.unpack(head)
    if magic != _MEGATRON_MAGIC or version != 1:
        raise DataError(f"{index} is not an index of Megatron-LM's indexed datasets, version 1")
    if code not in _MEGATRON_TYPES:
        raise DataError(f"{index} has a data type ({code}) that is not one of token ids")
    if len(content) < start + 12 * sequences + 8 * bounds:
        raise DataError(f"{index} is damaged: it is too short for its {sequences} sequences")

    def section(dtype: str, items: int) -> np.ndarray:
        nonlocal start
        first, start = start, start + items * np.dtype(dtype).itemsize
        return content[first:start].view(dtype)

    lengths, pointers = section("<i4", sequences), section("<i8", sequences)
    documents = section("<i8", bounds)
    tokens = map_file(path, np.dtype(_MEGATRON_TYPES[code]).newbyteorder("<"))
    if sequences and pointers[-1] // tokens.itemsize + lengths[-1] > len(tokens):
        raise DataError(f"{path} is damaged: it is too short for {index}")
    # The bounds in between are checked when their documents are read, since reading all takes long.
    if bounds and (documents[0] != 0 or documents[-1] != sequences):
        raise _not_in_order(index, sequences)
    return MegatronShard(str(path), tokens, lengths, pointers, documents)


def _not_in_order(index: Path, sequences: int) -> DataError:
    return DataError(
        f"{index} is damaged: its documents do not partition its {sequences} sequences in order"
    )


def megatron_index(path: str) -> Path:
    return Path(path).with_suffix(".idx")


def _nanogpt_layout(path: Path) -> tuple[int, str]:
    """Return the offset of the tokens in bytes, and their type.

    Raises `DataError`, or as `unreadable` says.
    """
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
                f"has {size} bytes; supported is version {expected}, with {np.dtype(dtype).name} "
                "tokens"
            )
        return start, dtype
    if len(head) == _HEADER_WORDS and magic >> 16 and not head[3:].any():
        raise DataError(
            f"{path} begins with a header of an unknown kind ({magic}). Known: those of llm.c, "
            f"{' and '.join(map(str, _HEADERS))}; files of `torchtitan data prepare` have none"
        )
    halves = head.view("<u2").reshape(-1, 2)  # of ids of 4 bytes, the upper halves are small
    if len(head) == _HEADER_WORDS and halves[:, 1].max() < 4 <= halves[:, 0].max():
        raise DataError(
            f"{path} holds ids of 4 or 8 bytes. Without an .idx beside it, as Megatron-LM writes, "
            "ids are of 2 bytes (uint16)"
        )
    return 0, "<u2"


def _blocks(tokens: int) -> np.ndarray:
    """Return the ends of blocks of equal size; the last block also takes the rest."""
    if tokens < _BLOCK_TOKENS:
        return np.array([tokens] if tokens else [], np.int64)
    ends = np.arange(_BLOCK_TOKENS, tokens + 1, _BLOCK_TOKENS)
    ends[-1] = tokens
    return ends
