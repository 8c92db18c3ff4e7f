"""Encodes the documents of a source as token ids.

A token that is read but not learned, such as the user's words in a conversation, is stored as its
complement `~id`, a negative number, so that a document remains a single array.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.errors import BadDocumentError, DataError
from torchtitan.tools.logging import logger
from torchtitan.tools.text import is_unicode, printable

from .token_shards import TokenFiles

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from torchtitan.components.tokenizer import Tokenizer

    from .chat import ChatTemplate

_REPORTED = 10
_MOST_IN_A_ROW = 10_000
_SHOWN = 120
"""Characters of a document that let a user find it."""


def _token_ids(ids: np.ndarray) -> np.ndarray:
    """Return a document of ids unchanged. Raises `BadDocumentError` if it is none."""
    if not ids.size:  # an array of nothing is float64
        return ids
    whole = ids.ndim == 1 and ids.dtype.kind in "iu"
    if not whole or (ids.dtype.itemsize > 2 and (ids.astype(np.int32) != ids).any()):
        kind = f"{ids.dtype} {list(ids.shape)}"
        raise BadDocumentError(f"a document of the dataset is an array of {kind}, not of token ids")
    return ids


def _is_conversation(document: object) -> TypeIs[list]:
    return isinstance(document, list) and all(isinstance(one, dict) for one in document)


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        problem = f"a document of the dataset is not Unicode text ({error})"
        raise BadDocumentError(problem) from error
    if type(tokenizer) is BytesTokenizer:  # avoids a list of integers, 8 bytes for each byte
        return np.frombuffer(utf8, dtype=np.uint8)
    return np.array(tokenizer.encode(text), dtype=np.int32)


def _encode_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode the pieces of a conversation, `[length]` int32 each."""
    encode_pieces = getattr(tokenizer, "encode_pieces", None)
    if encode_pieces is None or not is_unicode("".join(texts)):  # `_encode` reports bad Unicode
        return [_encode(tokenizer, text).astype(np.int32) for text in texts]
    return [np.array(ids, np.int32) for ids in encode_pieces(texts)]


class Encoder:
    """Encodes a source's documents, of every kind described in `sources`, as token ids.

    Args:
        tokenizer: its eos token ends every document, except one of token ids, which is used as it
            is.
        chat: loads the chat template when the first conversation comes; without it, conversations
            are refused.
        on_error: for a malformed document, `stop` raises, `skip` leaves it out.
        add_bos: bos begins every document, again except one of token ids. In a conversation, whose
            template may already have written it, bos is a token that is not learned.

    Raises:
        DataError: `add_bos` is set, and the tokenizer has no bos.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Callable[[], ChatTemplate] | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        add_bos: bool = False,
    ) -> None:
        if add_bos and tokenizer.bos_id is None:
            raise DataError(
                "the tokenizer has no bos token. Set bos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_id if add_bos else None
        """Begins each document; None without `add_bos`."""
        self.chat = None if chat is None else functools.cache(chat)
        self.skips = on_error == "skip"
        self.skipped = 0
        """Malformed documents left out so far, counted each time they come."""
        self.has_conversations = False
        """Whether a conversation has come so far."""
        self._in_a_row = 0
        self._lock = threading.Lock()

    def require_bos(self, ids: np.ndarray) -> None:
        """Raise `DataError` if `add_bos` is set, and a document of token ids lacks bos."""
        bos_id = self.bos_id
        if bos_id is not None and ids[0] not in (bos_id, ~bos_id):
            raise DataError(
                "add_bos is set, but documents of token ids are used unchanged, and one begins "
                f"with {ids[0]} instead of bos ({bos_id})"
            )

    def __call__(self, document: object) -> np.ndarray:
        """Encode a document: `[length]`, of an integer type; length 0 if it is empty or skipped.

        Raises:
            BadDocumentError: the document is malformed, or is this error itself.
        """
        try:
            if isinstance(document, BadDocumentError):
                raise document
            if isinstance(document, np.ndarray):
                ids = _token_ids(document)
            elif self.chat is not None and _is_conversation(document):
                ids = self._encode_chat(self.chat(), document)
                self.has_conversations = True
            elif self.chat is None and document and _is_conversation(document):
                raise BadDocumentError(
                    "a document of the dataset is a conversation, and only training tokenizes "
                    "those: give it this dataset as it is"
                )
            elif not isinstance(document, str):
                raise BadDocumentError(
                    f"a document of the dataset is a {type(document).__name__}, not text, a list "
                    "of messages, or a NumPy array of token ids"
                )
            elif document:
                ids = self.enclose(_encode(self.tokenizer, document))
            else:
                ids = np.empty(0, dtype=np.int32)
            self._in_a_row = 0
            return ids
        except BadDocumentError as error:
            if error is document:  # which names its file and line
                return self.skip(error)
            start = printable(str(document)[:_SHOWN])
            return self.skip(BadDocumentError(f"{error}. The document begins {start}"))

    def enclose(self, ids: np.ndarray) -> np.ndarray:
        """Append eos to the ids of a text, `[length]` int32.

        Under `add_bos`, also prepend bos, unless the text already begins with it.
        """
        ids = np.append(ids, np.int32(self.tokenizer.eos_id))
        if self.bos_id is not None and (len(ids) == 1 or ids[0] != self.bos_id):
            ids = np.insert(ids, 0, self.bos_id)
        return ids

    def skip(self, error: BadDocumentError) -> np.ndarray:
        """Skip a document: return an empty one in its place. Raises the error under `stop`."""
        if not self.skips:
            raise error
        with self._lock:
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row > _MOST_IN_A_ROW:
                raise DataError(f"{_MOST_IN_A_ROW:,} malformed documents in a row: {error}")
            if self.skipped <= _REPORTED:
                last = " (further ones are only counted)" if self.skipped == _REPORTED else ""
                logger.warning("skipped: %s%s", error, last)
        return np.empty(0, dtype=np.int32)

    def check(self, source: object) -> None:
        """Check that the ids of a source fit the tokenizer, and that it can be read repeatedly.

        Raises:
            DataError: they do not, or it is an iterator.
        """
        if isinstance(source, Iterator):
            raise DataError(
                "the dataset is an iterator, such as a generator, and can be read only once. Give "
                "an object whose __iter__ starts from the beginning each time"
            )
        if isinstance(source, TokenFiles):
            source.use_tokenizer(self.tokenizer)
            if self.bos_id is not None:
                source.require_bos(self.bos_id)

    def _encode_chat(self, chat: ChatTemplate, messages: list) -> np.ndarray:
        texts, trained = zip(*chat.segments(messages), strict=True)
        parts = [
            ids if learned else ~ids
            for ids, learned in zip(_encode_pieces(self.tokenizer, texts), trained, strict=True)
            if len(ids)
        ]
        eos_id = np.int32(self.tokenizer.eos_id)
        # Many templates end the assistant's message with eos. Spaces alone may have no tokens.
        if not parts or parts[-1][-1] not in (eos_id, ~eos_id):
            parts.append(np.array([~eos_id]))
        bos_id = self.bos_id
        if bos_id is not None and parts[0][0] not in (bos_id, ~bos_id):
            parts.insert(0, np.array([~bos_id], np.int32))
        return np.concatenate(parts)
