"""Packs whole documents into sequences: best-fit decreasing over a pool of documents.

Ding et al., "Fewer Truncations Improve Language Modeling", 2024. Only documents longer than a
sequence are cut; the remaining room is padding, which predicts nothing.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np

from .order import mix, permute
from .packing import begin_of, no_such_place

if TYPE_CHECKING:
    from .order import Documents, Place

POOL_SEQUENCES = 32
"""Sequences' worth of documents that are packed together."""


class BestFitRow:
    """One row of the global batch, like `packing.Row`, whose sequences hold whole documents.

    A row's place is the first document of a pool, the number of that document's tokens read before
    the pool, its `Origin`, and the number of the pool's next sequence. A resumed row packs the pool
    again. A pool is packed when its first sequence is requested, so that the threads share this
    work, and a paused source causes none.

    Raises:
        DataError: the place does not exist, because the dataset is not the one it was saved with.
    """

    def __init__(self, documents: Documents, seq_len: int, place: Place) -> None:
        self._documents = documents
        self._seq_len = seq_len
        self._document = place.document
        self._next, self._next_origin = documents.open(place.document)
        self._offset = begin_of(documents, place, len(self._next))
        self._expect_pool()
        self._sequence = place.sequence

    @property
    def place(self) -> tuple[int, ...]:
        """`order.Place`."""
        return (*self._pool_place, self._sequence)

    @property
    def read(self) -> float:
        """Documents of this row read since the place; a pool counts in proportion."""
        if not self._sequences:
            return self._begun
        documents = (self._document - self._pool_place[0]) / self._documents.stride
        share = self._sequence / len(self._sequences)
        return self._begun + (documents - self._begun) * share

    def fill(self, tokens: np.ndarray, positions: np.ndarray, document_ids: np.ndarray) -> int:
        """Write the next sequence and one more token, which is only a label.

        All arrays are `[seq_len + 1]` integers. Padding is a document of its own, made of
        complements (see `encode`). It is text, of the pool's next sequence: padding that is all
        alike would go to the same experts, and their balance would be that of text and padding.
        Returns the number of padding tokens, not counting the token that is only a label.
        """
        if not self._sequences:
            self._open_pool()
            if self._sequence >= len(self._sequences):
                raise no_such_place(
                    f"sequence {self._sequence} of those packed from document "
                    f"{self._pool_place[0]} on, but there are only {len(self._sequences)}"
                )
        filled = 0
        pieces = self._sequences[self._sequence]
        for count, piece in enumerate(pieces):
            part = slice(filled, filled + len(piece))
            tokens[part] = piece
            positions[part] = np.arange(len(piece))
            document_ids[part] = count
            filled += len(piece)
        padding = len(tokens) - filled
        if padding:
            following = self._sequences[(self._sequence + 1) % len(self._sequences)]
            text = np.resize(np.concatenate(following).astype(tokens.dtype), padding)
            tokens[filled:] = np.minimum(text, ~text)
            positions[filled:] = np.arange(padding)
            document_ids[filled:] = len(pieces)
        self._sequence += 1
        if self._sequence == len(self._sequences):
            self._expect_pool()
        return max(padding - 1, 0)

    def _expect_pool(self) -> None:
        """Make the next pool begin here."""
        self._pool_place = (self._document, self._offset, *self._next_origin)
        self._begun = self._offset / max(len(self._next), 1)
        self._sequences: list[list[np.ndarray]] = []
        self._sequence = 0

    def _open_pool(self) -> None:
        """Read documents for the pool's sequences and pack them."""
        pieces, tokens = [], 0
        while tokens < POOL_SEQUENCES * self._seq_len:
            for piece in cut(self._next[self._offset :], self._seq_len):
                pieces.append(piece)
                tokens += len(piece)
            self._document += self._documents.stride
            self._offset = 0
            self._next, self._next_origin = self._documents.open(self._document)
        packed = best_fit([len(piece) for piece in pieces], self._seq_len + 1)
        # Otherwise the longest documents of every row would come in the same steps.
        key = mix(self._pool_place[0], self._pool_place[1])
        order = permute(np.arange(len(packed)), len(packed), key).tolist()
        self._sequences = [[pieces[piece] for piece in packed[place]] for place in order]


def cut(tokens: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Split into pieces of at most `seq_len + 1` tokens; neighbours overlap by one token.

    That token is the label at the end of one piece, and no label at the start of the next.
    """
    pieces = [tokens[: seq_len + 1]] if len(tokens) else []
    for start in range(seq_len, len(tokens) - 1, seq_len):
        piece = tokens[start : start + seq_len + 1].astype(np.int32)
        if piece[0] >= 0:
            piece[0] = ~piece[0]
        pieces.append(piece)
    return pieces


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Assign items to bins: longest first, each into the fullest bin that has room.

    No item is longer than `capacity`. Returns the item numbers of each bin, ascending.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda item: -lengths[item]):
        length = lengths[item]
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            bins.append([])
            room, number = capacity, len(bins) - 1
        else:
            room, number = rooms.pop(at)
        bins[number].append(item)
        if room > length:
            bisect.insort(rooms, (room - length, number))
    return [sorted(items) for items in bins]
