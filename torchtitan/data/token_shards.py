"""Documents of token ids in shards: the common part of the formats of the dataset `tokens`."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from torchtitan.errors import BadDocumentError, DataError

from .mapped import read_ahead

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer


class TokenShard(Protocol):
    """Documents that lie in one file."""

    path: str

    @property
    def documents(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def dtype(self) -> np.dtype: ...
    def document(self, index: int) -> np.ndarray: ...


@dataclass
class MappedTokens:
    """The tokens of one file."""

    path: str
    tokens: np.ndarray
    """`[tokens]`, of an integer type, memory-mapped."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        return self.tokens.dtype


@dataclass
class Shard(MappedTokens):
    """One file of tokens and the bounds of its documents."""

    ends: Sequence[int] | np.ndarray
    """`[documents]`: the token after the last one of each document."""

    @property
    def documents(self) -> int:
        return len(self.ends)

    def document(self, index: int) -> np.ndarray:
        """Return document `index`. Raises `DataError` if its bounds are impossible."""
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        if not 0 <= start <= end <= len(self.tokens):
            raise DataError(
                f"{self.path} is damaged: document {index} (counted from 0) is recorded as tokens "
                f"{start} to {end}, but there are {len(self.tokens)}"
            )
        return read_ahead(self.tokens, start, end)


class TokenFiles:
    """Random access to documents of token ids: `source[i]` is `[length]`, of an integer type."""

    def __init__(self, shards: Sequence[TokenShard]) -> None:
        self.shards = shards
        self._vocab_size: int | None = None
        self._limit: int | None = None
        self._count()

    def _count(self) -> None:
        documents = (shard.documents for shard in self.shards)
        self._starts = list(itertools.accumulate(documents, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        number = bisect.bisect_right(self._starts, index) - 1
        shard = self.shards[number]
        place = index - self._starts[number]
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
        return sum(shard.num_tokens for shard in self.shards)

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Check the tokenizer; called before documents are taken.

        Raises:
            DataError: the tokens are not this tokenizer's.
        """
        self._limit = getattr(tokenizer, "limit", None)

    def require_bos(self, bos_id: int) -> None:
        """Check for bos; called if documents must begin with it, since nothing is added to ids.

        Raises:
            DataError: the first document does not begin with bos.
        """
        documents = (self[index] for index in range(len(self)))
        # A document may be an eos alone, which is GPT-2's bos too.
        first = next((tokens for tokens in documents if len(tokens) > 1), None)
        if first is not None and first[0] != bos_id:
            raise DataError(
                f"{self.shards[0].path}: add_bos is set, but documents of token ids are used "
                f"unchanged, and these do not begin with bos ({bos_id}). Add bos to the file, or "
                "set add_bos to false"
            )


def _check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    least, largest = int(tokens.min()), int(tokens.max())
    if largest >= vocab_size or least < 0:
        token = least if least < 0 else largest
        raise DataError(
            f"{where}: token {token} is outside the tokenizer's vocabulary of {vocab_size}. The "
            "file was made with a different tokenizer than model.tokenizer_path"
        )
