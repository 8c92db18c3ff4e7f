"""Packs documents into sequences of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.errors import DataError

if TYPE_CHECKING:
    from .order import Documents, Place


class Row:
    """One row of the global batch: an endless stream of tokens, cut into sequences.

    Row `b` of `stride` rows joins the documents `b`, `b + stride`, `b + 2 stride`, ... A row's
    place in the stream is the document of the next token, the number of that document's tokens
    before it, and the document's `Origin`.

    A dataset with fewer documents than rows is still worth training on (one big text file, say):
    the rows that share a document then begin at evenly spaced places in it.

    Raises:
        DataError: the place does not exist, because the dataset is not the one it was saved with.
    """

    def __init__(self, documents: Documents, place: Place) -> None:
        self._documents = documents
        self._document = place.document
        self._tokens, self._origin = documents.open(place.document)
        self._offset = begin_of(documents, place, len(self._tokens))

    @property
    def place(self) -> tuple[int, ...]:
        """`order.Place` of the next token, without `sequence`."""
        return self._document, self._offset, *self._origin

    @property
    def read(self) -> float:
        """The part of the current document that has been read."""
        return self._offset / max(len(self._tokens), 1)

    def fill(self, tokens: np.ndarray, positions: np.ndarray, document_ids: np.ndarray) -> int:
        """Write the next sequence and one more token, which also begins the following sequence.

        All arrays are `[seq_len + 1]` integers. Positions count from the start of the document or
        of the sequence, whichever is later; documents are numbered within the sequence. Returns the
        number of padding tokens, which is 0.
        """
        filled, count = 0, 0
        while filled < len(tokens):
            while self._offset == len(self._tokens):  # more than once where documents are empty
                self._document += self._documents.stride
                self._offset = 0
                self._tokens, self._origin = self._documents.open(self._document)
            n = min(len(self._tokens) - self._offset, len(tokens) - filled)
            part = slice(filled, filled + n)
            tokens[part] = self._tokens[self._offset : self._offset + n]
            positions[part] = np.arange(n, dtype=positions.dtype)
            document_ids[part] = count
            self._offset += n
            filled += n
            count += 1
        self._offset -= 1
        return 0


class PaddingRow:
    """A row beyond the global batch, see `DataLoader`: it reads no documents, predicts nothing."""

    read = 0.0

    def __init__(self, place: tuple[int, ...]) -> None:
        self.place = place

    def fill(self, tokens: np.ndarray, positions: np.ndarray, document_ids: np.ndarray) -> int:
        """Write a sequence of complements (see `encode`), all `[seq_len + 1]`. Returns 0."""
        tokens[:] = ~0
        positions[:] = np.arange(len(positions))
        document_ids[:] = 0
        return 0


def no_such_place(what: str) -> DataError:
    return DataError(
        f"the checkpoint is at {what}: the dataset or the tokenizer has changed. Restore it, or "
        'set checkpoint.exclude_from_loading = ["dataloader"] to restart the data from the '
        "beginning"
    )


def begin_of(documents: Documents, place: Place, length: int) -> int:
    """Return the token at which a row goes on in the document of `place`: see `Row`.

    Raises:
        DataError: the document, of `length` tokens, does not have the saved place.
    """
    document, offset = place.document, place.offset
    if offset == 0 and documents.size is not None and document < documents.stride:
        return length * (document - document % documents.size) // documents.stride
    if offset > 0 and offset >= length:
        raise no_such_place(
            f"token {offset} of document {document}, but the document has {length} tokens"
        )
    return offset


def to_batch(
    tokens: np.ndarray,
    positions: np.ndarray,
    document_ids: np.ndarray,
    document_mask: bool,
    later_tokens: int = 0,
) -> dict[str, torch.Tensor]:
    """Make a batch of some rows: `tokens`, `labels`, `positions`, `document_ids`.

    The arguments are `[rows, seq_len + 1]`, the results `[rows, seq_len]` int64. A label is the
    next token of the row, or `IGNORE_INDEX` if that is a complement (see `encode`). Under
    `document_mask` the end of a document has no label either, since the next document cannot be
    predicted.

    With `later_tokens` = n, `next_tokens` `[rows, seq_len, n]` int64 are the n tokens after each
    token (0 beyond the sequence), and labels are `[rows, seq_len, 1 + n]`: those of the token and
    of these. There are none beyond the sequence nor, under `document_mask`, in other documents.
    """
    labels = tokens[:, 1:].astype(np.int64)
    inputs = tokens[:, :-1].astype(np.int64)
    if tokens.min() < 0:
        labels[labels < 0] = IGNORE_INDEX
        np.bitwise_xor(inputs, inputs >> 63, out=inputs)  # ~id where id is negative
    if document_mask:
        labels[document_ids[:, 1:] != document_ids[:, :-1]] = IGNORE_INDEX
    batch = {
        "tokens": inputs,
        "labels": labels,
        "positions": positions[:, :-1].astype(np.int64),
        "document_ids": document_ids[:, :-1].astype(np.int64),
    }
    if later_tokens:
        last = tokens[:, -1:].astype(np.int64)
        known = np.concatenate([inputs, last ^ last >> 63], axis=1)
        ids = document_ids if document_mask else np.zeros_like(document_ids)
        batch |= _later(known, labels, ids, later_tokens)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _later(
    tokens: np.ndarray, labels: np.ndarray, document_ids: np.ndarray, count: int
) -> dict[str, np.ndarray]:
    """Return `next_tokens` and `labels` of `to_batch`.

    Args:
        tokens, document_ids: `[rows, seq_len + 1]`.
        labels: `[rows, seq_len]`.
    """
    seq_len = labels.shape[1]
    next_tokens = np.zeros((*labels.shape, count), np.int64)
    all_labels = np.full((*labels.shape, 1 + count), IGNORE_INDEX)
    all_labels[:, :, 0] = labels
    for distance in range(1, min(count, seq_len) + 1):
        labelled = seq_len - distance  # positions with a label that far away
        next_tokens[:, : labelled + 1, distance - 1] = tokens[:, distance:]
        same = document_ids[:, distance:-1] == document_ids[:, :labelled]
        all_labels[:, :labelled, distance] = np.where(same, labels[:, distance:], IGNORE_INDEX)
    return {"next_tokens": next_tokens, "labels": all_labels}
