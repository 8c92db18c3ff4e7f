"""Orders the documents of a dataset into an endless, numbered series.

The series depends on the source, the seed, the size of the global batch and the number of lanes.
Ranks and rows of a batch divide it by number, so every layout of ranks sees the same data.
"""

from __future__ import annotations

import bisect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from torchtitan.errors import BadDocumentError, DataError

from .sources import RandomAccess, Sequential, has_random_access, num_shards, shard_of, take

Encode = Callable[[object], np.ndarray]
_MASK_64 = 2**64 - 1
_MIX_A, _MIX_B, _MIX_C = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x2545F4914F6CDD1D
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_PLANNED = 128
_EQUAL_LANES = 64
"""Maximum. A lane has a file open and a block of it in memory, 10 to 30 MB, on each rank that has
rows of the lane."""
_SHARDS_PER_LANE = 8
"""Minimum, so that lanes, and with them the rows of a batch, read similar amounts of text."""
_ROWS_PER_LANE = 8
"""Minimum if lanes have different numbers of rows, for the same reason. A rank reads the text of
all rows of its lanes."""


class Origin(NamedTuple):
    """Where a sequential source has a document, so that a resumed run finds it quickly."""

    turn: int = 0
    """Number of the shard in its lane, counting on over the epochs."""
    first: int = 0
    """Number in its lane of the first document of the shard."""


class Place(NamedTuple):
    """Where a row of the global batch is in a source, as stored in a state."""

    document: int
    offset: int = 0
    """Tokens of the document that were read."""
    turn: int = 0
    first: int = 0
    """`turn` and `first` are the document's `Origin`."""
    sequence: int = 0
    """In the pool that begins here. Only states of best-fit packing have it."""

    @property
    def origin(self) -> Origin:
        return Origin(self.turn, self.first)


class ShuffledDocuments:
    """Documents of a random-access source; document `n` belongs to epoch `n // len(source)`.

    Args:
        seed: seed of the order; each epoch has its own permutation.
        stride: distance between successive documents of a row.
    """

    def __init__(self, source: RandomAccess, encode: Encode, seed: int, stride: int = 1) -> None:
        self._source = source
        self._encode = encode
        self._seed = seed
        self.stride = stride
        self.size = len(source)
        self._planned: dict[int, int] = {}  # document -> index, for the next ones of each row
        # In a small dataset, several rows have the same document open.
        self._open: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()

    def open(self, number: int) -> tuple[np.ndarray, Origin]:
        """Return the ids of document `number`, and an `Origin`, which is not needed here."""
        index = self._planned.pop(number, None)
        if index is None:
            self._plan(number)
            index = self._planned.pop(number)
        tokens = self._open.get(index)
        if tokens is None:
            tokens = self._encode(take(self._source, index))
            if len(tokens):  # a skipped document is counted each time
                self._open[index] = tokens
        return tokens, Origin()

    def _plan(self, number: int) -> None:
        """Look up the documents of a row at once, from `number` on, at most to the epoch's end."""
        epoch, place = divmod(number, self.size)
        places = range(place, self.size, self.stride)[:_PLANNED]
        indices = permute(np.array(places), self.size, mix(self._seed, epoch)).tolist()
        for ahead, index in enumerate(indices):
            self._planned[number + ahead * self.stride] = index


class StreamedDocuments:
    """Documents of a sequential source, for the rows of one rank.

    Rows are grouped into lanes of about equally many consecutive rows. A lane reads every
    `lanes`-th shard (file) of the source, over and over, and deals the documents to its rows in
    turn. So a rank reads only the lanes of its own rows, each once. A source without shards is one
    lane, which all ranks read; but each rank tokenizes only its own documents.

    Empty and malformed documents are not numbered. Texts that a row will request later wait in
    memory; others are skipped before they are tokenized.

    Args:
        stride: number of rows of the global batch; row `b` takes documents `b`, `b + stride`, ...
        lanes: see `count_lanes`.
        first: for each row of this rank, the first document that it will request, and its origin.
    """

    size = None

    def __init__(
        self,
        source: Sequential,
        encode: Encode,
        stride: int,
        lanes: int,
        first: Iterable[tuple[int, Origin]],
    ) -> None:
        self._encode = encode
        self.stride = stride
        self._lock = threading.Lock()
        self._begins = [lane * stride // lanes for lane in range(lanes + 1)]
        """The first row of each lane, and the number of rows."""
        starts: dict[int, list[tuple[int, Origin]]] = defaultdict(list)
        for number, origin in first:
            lane, number = self._in_lane(number)
            starts[lane].append((number, origin))
        self._lanes = {
            lane: Lane(source, lane, lanes, self._width(lane), start, encode)
            for lane, start in starts.items()
        }

    def open(self, number: int) -> tuple[np.ndarray, Origin]:
        """Return the ids and origin of document `number`. Each row must ask in ascending order."""
        lane, number = self._in_lane(number)
        with self._lock:  # several threads may read rows
            document, origin = self._lanes[lane].take(number)
        return self._encode(document), origin

    def _in_lane(self, number: int) -> tuple[int, int]:
        """Return the lane of document `number`, and its number in the lane."""
        turn, row = divmod(number, self.stride)
        lane = bisect.bisect_right(self._begins, row) - 1
        return lane, turn * self._width(lane) + row - self._begins[lane]

    def _width(self, lane: int) -> int:
        return self._begins[lane + 1] - self._begins[lane]


Documents = ShuffledDocuments | StreamedDocuments


def count_lanes(shards: int, rows: int) -> int:
    """Return the number of lanes into which a new run divides the rows of a batch.

    Up to `_EQUAL_LANES` lanes divide the rows evenly, if that gives more of them.
    """
    filled = shards // _SHARDS_PER_LANE
    most_equal = min(_EQUAL_LANES, filled, rows)
    equal = [lanes for lanes in range(1, most_equal + 1) if rows % lanes == 0]
    return max(1, min(filled, rows // _ROWS_PER_LANE), *equal)


class Lane:
    """Every `lanes`-th shard of a sequential source, for `width` rows that take turns.

    `refuse` is called with malformed documents, and may raise them.
    """

    def __init__(
        self,
        source: Sequential,
        lane: int,
        lanes: int,
        width: int,
        starts: list[tuple[int, Origin]],
        refuse: Callable[[BadDocumentError], object],
    ) -> None:
        self._width = width
        self._refuse = refuse
        self._first = {number % width: number for number, _ in starts}
        self._documents = repeat(source, lane, lanes, min(origin for _, origin in starts))
        self._waiting: dict[int, tuple[object, Origin]] = {}

    def take(self, number: int) -> tuple[object, Origin]:
        """Return document `number` of the lane, and its origin."""
        while number not in self._waiting:
            read, document, origin = next(self._documents)
            first = self._first.get(read % self._width)
            if first is None or read < first:
                continue
            if isinstance(document, BadDocumentError):
                self._refuse(document)  # by the row whose turn it is, so it is counted once
            else:
                self._waiting[read] = document, origin
        return self._waiting.pop(number)


def repeat(
    source: Sequential, lane: int, lanes: int, origin: Origin
) -> Iterator[tuple[int, object, Origin]]:
    """Yield number, document and origin of a lane's non-empty documents, from a shard on, for ever.

    A malformed document has the number of the next well-formed one.

    Raises:
        DataError: there is no document with text.
    """
    shards = num_shards(source)
    turn, number = origin
    last_with_text = turn - 1
    while turn - last_with_text <= shards:
        here = Origin(turn, number)
        for document in shard_of(source, (lane + turn * lanes) % shards):
            if isinstance(document, BadDocumentError):
                yield number, document, here
            elif len(document) if hasattr(document, "__len__") else document:
                yield number, document, here
                number += 1
                last_with_text = turn
        turn += 1
    if lanes == 1:
        raise DataError("empty: it has no document with text")
    raise DataError(
        f"of its {shards} files, those that some rows of the batch read (counted from 0, {lane}, "
        f"{lane + lanes} and so on) have no document with text. Remove the empty files"
    )


def epochs(
    source: RandomAccess | Sequential, stride: int, lanes: int, place: Place, read: float
) -> float:
    """Return how often a source has been read, if all rows are as far as this one.

    A sequential source, whose size is unknown, is counted in whole shards.

    Args:
        place: of the row; it has taken a document in each turn before.
        read: documents that the row has read since `place`; mostly a part of the first one.
    """
    if has_random_access(source):
        turn, row = divmod(place.document, stride)
        begun = (row - row % len(source)) / stride  # in its first document: `packing.begin_of`
        return max(turn + read - begun, 0.0) * stride / len(source)
    return place.turn * lanes / num_shards(source)


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the images of `indices` in a pseudo-random permutation of `range(size)`: `[n]` int64.

    Computed without a table of `size` numbers: a Feistel network, keyed by `key`, permutes the next
    power of 4, and is applied again until the result falls into the range ("cycle walking", Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(((key + step) * _MIX_A + _MIX_C) & _MASK_64) for step in range(8)]
    result = indices.astype(np.uint64)
    outside = np.arange(len(result))
    while len(outside):
        index = result[outside]
        left, right = index >> half, index & mask
        for round_key in keys:
            x = right * np.uint64(_MIX_B) + round_key
            left, right = right, left ^ (_finalize(x) & mask)
        index = left << half | right
        result[outside] = index
        outside = outside[index >= np.uint64(size)]
    return result.astype(np.int64)


def _finalize(x: np.ndarray) -> np.ndarray:
    """Apply the last lines of `mix` to `[n]` uint64."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(_MIX_1)
    x = (x ^ x >> np.uint64(27)) * np.uint64(_MIX_2)
    return x ^ x >> np.uint64(31)


def mix(a: int, b: int) -> int:
    """Hash two integers to 64 bits: the finalizer of SplitMix64 (Steele, Lea, Flood, 2014)."""
    x = (a * _MIX_A + b * _MIX_B + _MIX_C) & _MASK_64
    x = (x ^ x >> 30) * _MIX_1 & _MASK_64
    x = (x ^ x >> 27) * _MIX_2 & _MASK_64
    return x ^ x >> 31
