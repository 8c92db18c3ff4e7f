"""Collects the rows of a rank into its micro-batches: the code of the reading threads.

These are functions, not methods of the loader: a thread that runs them must not keep it alive.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from torchtitan.components.data_loader import Batch
from torchtitan.errors import begin_errors_with

if TYPE_CHECKING:
    from .best_fit import BestFitRow
    from .encode import Encoder
    from .packing import PaddingRow, Row


class RowSequence(NamedTuple):
    """The next sequence of a row."""

    arrays: np.ndarray
    """`[3, seq_len + 1]` int32: tokens, positions, document ids."""
    padding: int
    """Number of its tokens that are padding."""
    place: list[int]
    """The row's place after this step: a row of `DataLoader.state_dict`."""
    read: list[float]
    """For each source, documents of the row read from that place on."""


@dataclass(frozen=True)
class Counts:
    """Counts over the sequences up to a micro-batch, since the process began."""

    tokens: int = 0
    padding: int = 0
    skipped: int = 0
    """Malformed documents left out; a few of them belong to batches to come."""
    read: list[list[float]] | None = None
    """`RowSequence.read` of each row after the last complete step."""


def naming(source: str) -> AbstractContextManager[None]:
    """Begin errors with the name of a mixture's source."""
    return begin_errors_with(repr(source)) if source else nullcontext()


def read_rows(
    rows: list[tuple[int, tuple[Row | BestFitRow | PaddingRow, ...]]],
    names: list[str],
    steps: Iterable[tuple[np.ndarray, list[int]]],
    seq_len: int,
) -> Iterator[RowSequence]:
    """Yield the sequences of some rows, row by row and step by step, for ever.

    Args:
        rows: for each row, its number in the global batch and its `Row` of each source.
        steps: the source of each row's next sequence, and the mixture's state: see `mixing.Steps`.
    """
    for chosen, schedule in steps:
        for number, streams in rows:
            source = chosen[number % len(chosen)]
            arrays = np.empty((3, seq_len + 1), np.int32)
            with naming(names[source]):
                padding = streams[source].fill(*arrays)
            places = itertools.chain.from_iterable(stream.place for stream in streams)
            read = [stream.read for stream in streams]
            yield RowSequence(arrays, padding, [*schedule, *places], read)


def collect(
    readers: list[Iterator[RowSequence]],
    local_batch_size: int,
    to_batch: Callable[[np.ndarray, np.ndarray, np.ndarray], Batch],
    places: np.ndarray,
    encoder: Encoder,
) -> Iterator[tuple[Batch, np.ndarray, Counts]]:
    """Yield micro-batches with the places of all rows after the last complete step, and counts.

    Args:
        readers: read the rows in turn: the first of n readers has rows 0, n, 2 n, ...
        to_batch: makes a batch of tokens, positions and document ids `[rows, seq_len + 1]`.
        places: current places of the rows.
    """
    tokens = pads = 0
    read: list[list[float]] | None = None
    while True:
        after, read_after = [], []
        for end in range(local_batch_size, len(places) + 1, local_batch_size):
            rows = range(end - local_batch_size, end)
            sequences = [next(readers[row % len(readers)]) for row in rows]
            batch = to_batch(*np.stack([sequence.arrays for sequence in sequences], axis=1))
            after += [sequence.place for sequence in sequences]
            read_after += [sequence.read for sequence in sequences]
            tokens += batch["tokens"].numel()
            pads += sum(sequence.padding for sequence in sequences)
            if end == len(places):
                places, read = np.array(after), read_after
            yield batch, places, Counts(tokens, pads, encoder.skipped, read)
