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

from .mixing import state_size

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
    """The row's place after this sequence: a row of `DataLoader.state_dict`."""
    read: list[float]
    """For each source, documents of the row read from that place on."""


@dataclass(frozen=True)
class Counts:
    """Counts over the sequences up to a micro-batch, since the process began."""

    tokens: int = 0
    padding: int = 0
    skipped: int = 0
    """Malformed documents left out; a few of them belong to batches to come."""
    read: np.ndarray | None = None
    """`RowSequence.read` of each row after the last complete slice, `[rows, sources]`."""


def naming(source: str) -> AbstractContextManager[None]:
    """Begin errors with the name of a mixture's source."""
    return begin_errors_with(repr(source)) if source else nullcontext()


def read_rows(
    slices: list[list[tuple[int, tuple[Row | BestFitRow | PaddingRow, ...]]]],
    first: int,
    names: list[str],
    steps: Iterable[tuple[np.ndarray, list[int]]],
    seq_len: int,
) -> Iterator[RowSequence]:
    """Yield the sequences of some rows, row by row and slice by slice, for ever.

    Args:
        slices: for each row of each slice, its number in that slice of all ranks, and its `Row` of
            each source.
        first: the slice to begin with.
        steps: for each slice of all ranks, the source of each row's next sequence, and the
            mixture's state: see `mixing.Steps`.
    """
    for turn, (chosen, schedule) in enumerate(steps, first):
        for number, streams in slices[turn % len(slices)]:
            source = chosen[number % len(chosen)]
            arrays = np.empty((3, seq_len + 1), np.int32)
            with naming(names[source]):
                padding = streams[source].fill(*arrays)
            places = itertools.chain.from_iterable(stream.place for stream in streams)
            read = [stream.read for stream in streams]
            yield RowSequence(arrays, padding, [*schedule, *places], read)


def collect(
    readers: list[Iterator[RowSequence]],
    slices: np.ndarray,
    first: int,
    local_batch_size: int,
    to_batch: Callable[[np.ndarray, np.ndarray, np.ndarray], Batch],
    places: np.ndarray,
    read: np.ndarray,
    encoder: Encoder,
) -> Iterator[tuple[Batch, np.ndarray, int, Counts]]:
    """Yield micro-batches with the places of all rows after the last complete slice, the number of
    the next slice, and counts.

    Args:
        readers: read the rows in turn: the first of n readers has row 0, n, 2 n, ... of `slices`.
        slices: the rows of each slice, `[slices, rows of a slice]`, indices of `places`.
        first: the slice to begin with.
        to_batch: makes a batch of tokens, positions and document ids `[rows, seq_len + 1]`.
        places: current places of the rows.
        read: `RowSequence.read` of the rows there, `[rows, sources]`.
    """
    tokens = pads = 0
    shared = state_size(read.shape[1])  # numbers of a place that all rows share
    turns = np.arange(slices.size).reshape(slices.shape)
    number = first
    while True:
        rows, after, read_after = slices[number], [], []
        for end in range(local_batch_size, len(rows) + 1, local_batch_size):
            micro_batch = turns[number, end - local_batch_size : end].tolist()
            sequences = [next(readers[turn % len(readers)]) for turn in micro_batch]
            batch = to_batch(*np.stack([sequence.arrays for sequence in sequences], axis=1))
            after += [sequence.place for sequence in sequences]
            read_after += [sequence.read for sequence in sequences]
            tokens += batch["tokens"].numel()
            pads += sum(sequence.padding for sequence in sequences)
            if end == len(rows):
                places, read, number = places.copy(), read.copy(), (number + 1) % len(slices)
                places[rows] = after
                places[:, :shared] = after[0][:shared]
                read[rows] = read_after
            yield batch, places, number, Counts(tokens, pads, encoder.skipped, read)
