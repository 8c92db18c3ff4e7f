"""Which document comes when: a dataset as an endless, numbered series of documents.

The series depends on the source and the seed alone. Ranks and rows of a batch share it out by
number, so every layout of ranks sees the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from weakref import WeakValueDictionary

import numpy as np

from torchtitan.errors import DataError

from .sources import RandomAccess

Encode = Callable[[str], np.ndarray]
_MASK_64 = 2**64 - 1


class ShuffledDocuments:
    """Documents of a random-access source; document `n` belongs to epoch `n // len(source)`.

    Args:
        source: the texts.
        encode: text -> ids.
        seed: of the order; each epoch has its own permutation.
    """

    def __init__(self, source: RandomAccess, encode: Encode, seed: int) -> None:
        self._source = source
        self._encode = encode
        self._seed = seed
        self.size = len(source)
        # In a small dataset several rows have the same document open.
        self._open: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()

    def tokens(self, number: int) -> np.ndarray:
        """Ids of document `number`."""
        epoch, place = divmod(number, self.size)
        index = permute(place, self.size, _mix(self._seed, epoch))
        tokens = self._open.get(index)
        if tokens is None:
            self._open[index] = tokens = self._encode(self._source[index])
        return tokens


class StreamedDocuments:
    """Documents of a sequential source, which is read once for all the rows of this rank.

    Empty documents have no number. Texts that a row will ask for later wait in memory; others are
    skipped before they are tokenized.

    Args:
        source: the texts, in order.
        encode: text -> ids.
        stride: number of rows of the global batch; row `b` takes documents `b`, `b + stride`, ...
        first: row -> the first document that it will ask for, for the rows of this rank.
    """

    size = None

    def __init__(
        self, source: Iterable[str], encode: Encode, stride: int, first: Mapping[int, int]
    ) -> None:
        self._encode = encode
        self._stride = stride
        self._first = first
        self._stream = repeat(source, start=min(first.values()))
        self._waiting: dict[int, str] = {}

    def tokens(self, number: int) -> np.ndarray:
        """Ids of document `number`. Each row must ask in ascending order."""
        while number not in self._waiting:
            read, text = next(self._stream)
            first = self._first.get(read % self._stride)
            if first is not None and read >= first:
                self._waiting[read] = text
        return self._encode(self._waiting.pop(number))


def repeat(source: Iterable[str], start: int) -> Iterator[tuple[int, str]]:
    """Number and text of the non-empty documents from number `start` on, over and over.

    Raises:
        DataError: there is none.
    """
    number = 0
    while True:
        before = number
        for text in source:
            if not text:
                continue
            if number >= start:
                yield number, text
            number += 1
        size = number - before
        if size == 0:
            raise DataError("the dataset is empty: it has no document with text")
        if number < start:  # whole epochs that were used before a resume
            number += (start - number) // size * size


def permute(index: int, size: int, key: int) -> int:
    """Where `index` goes in the pseudo-random permutation `key` of `range(size)`.

    A formula needs no table of `size` numbers: a Feistel network permutes the next power of 4, and
    is applied again until the result falls into the range ("cycle walking", Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for step in range(8):
            left, right = right, left ^ (_mix(key + step, right) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mix(a: int, b: int) -> int:
    """A 64-bit hash of two integers: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (a * 0x9E3779B97F4A7C15 + b * 0xD1B54A32D192ED03 + 0x2545F4914F6CDD1D) & _MASK_64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK_64
    return x ^ x >> 31
