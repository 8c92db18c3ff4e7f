"""Packs documents into sequences of equal length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.errors import DataError

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer

    from .order import ShuffledDocuments, StreamedDocuments


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids of a text and the eos that ends it, `[length]` int32; none at all for an empty text.

    Raises:
        DataError: the source gave something else than Unicode text.
    """
    if not isinstance(text, str):
        raise DataError(f"a document of the dataset is a {type(text).__name__}, not text")
    if not text:
        return np.empty(0, dtype=np.int32)
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"a document of the dataset is not Unicode text ({error})") from error
    if isinstance(tokenizer, BytesTokenizer):  # without a list of integers, 8 bytes for each byte
        ids = np.frombuffer(utf8, dtype=np.uint8)
    else:
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
    return np.append(ids, np.int32(tokenizer.eos_id))


class Row:
    """One row of the global batch: an endless stream of tokens, cut into sequences.

    Row `b` of `stride` rows joins the documents `b`, `b + stride`, `b + 2 stride`, ... Its place in
    the stream is the document of the next token, the tokens of it before that, and the document's
    `Origin`.

    A dataset with fewer documents than rows is still worth training on (one big text file, say):
    the rows that share a document then begin at evenly spaced places in it.

    Raises:
        DataError: the place does not exist, since the dataset is not the one it was saved with.
    """

    def __init__(
        self,
        documents: ShuffledDocuments | StreamedDocuments,
        stride: int,
        document: int,
        offset: int,
    ) -> None:
        self._documents = documents
        self._stride = stride
        self._document = document
        self._offset = offset
        self._tokens, self._origin = documents.open(document)
        length = len(self._tokens)
        if offset == 0 and documents.size is not None and document < stride:
            self._offset = length * (document - document % documents.size) // stride
        elif offset > 0 and offset >= length:
            raise DataError(
                f"the checkpoint is at token {offset} of document {document}, but the document has "
                f"{length} tokens: the dataset or the tokenizer has changed. Restore it, or set "
                'checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'
            )

    @property
    def place(self) -> tuple[int, ...]:
        """`(document, offset, *origin)` of the next token."""
        return self._document, self._offset, *self._origin

    def fill(self, tokens: np.ndarray, positions: np.ndarray, document_ids: np.ndarray) -> None:
        """Write the next sequence and one token more, which also begins the sequence after it.

        All are `[seq_len + 1]` int64. Positions count from the start of the document or of the
        sequence, whichever is later; documents are numbered within the sequence.
        """
        filled, count = 0, 0
        while filled < len(tokens):
            while self._offset == len(self._tokens):  # more than once where documents are empty
                self._document += self._stride
                self._offset = 0
                self._tokens, self._origin = self._documents.open(self._document)
            n = min(len(self._tokens) - self._offset, len(tokens) - filled)
            part = slice(filled, filled + n)
            tokens[part] = self._tokens[self._offset : self._offset + n]
            positions[part] = np.arange(n)
            document_ids[part] = count
            self._offset += n
            filled += n
            count += 1
        self._offset -= 1


def pack(rows: list[Row], seq_len: int, document_mask: bool) -> dict[str, torch.Tensor]:
    """The next batch of some rows: `tokens`, `labels`, `positions`, `document_ids`.

    All are `[len(rows), seq_len]` int64. A label is the next token of the row; under
    `document_mask` the end of a document predicts nothing (`IGNORE_INDEX`), since what follows
    cannot be known.
    """
    tokens, positions, document_ids = np.empty((3, len(rows), seq_len + 1), dtype=np.int64)
    for row, *out in zip(rows, tokens, positions, document_ids, strict=True):
        row.fill(*out)
    labels = tokens[:, 1:].copy()
    if document_mask:
        labels[document_ids[:, 1:] != document_ids[:, :-1]] = IGNORE_INDEX
    batch = {
        "tokens": tokens[:, :-1],
        "labels": labels,
        "positions": positions[:, :-1],
        "document_ids": document_ids[:, :-1],
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}
