"""Documents of a source become token ids.

A token that is read but not learned, such as the user's words in a conversation, is stored as its
complement `~id`, a negative number; so a document stays one array.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.errors import BadDocumentError, DataError

from .sources import has_random_access

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer

    from .chat import ChatTemplate
    from .sources import RandomAccess, Source

logger = logging.getLogger("torchtitan")
_REPORTED = 10
_MOST_IN_A_ROW = 10_000


def encode_document(tokenizer: Tokenizer, text: object, add_bos: bool = False) -> np.ndarray:
    """Ids of a text as `enclose` gives them, `[length]` int32; none at all for an empty text.

    Raises:
        BadDocumentError: the source gave something else than Unicode text, or this error.
    """
    if isinstance(text, BadDocumentError):
        raise text
    if not isinstance(text, str):
        raise BadDocumentError(f"a document of the dataset is a {type(text).__name__}, not text")
    if not text:
        return np.empty(0, dtype=np.int32)
    return enclose(tokenizer, _encode(tokenizer, text), add_bos)


def enclose(tokenizer: Tokenizer, ids: np.ndarray, add_bos: bool) -> np.ndarray:
    """Ids of a text and the eos that ends it, `[length]` int32.

    Under `add_bos`, bos begins it, but not a second one where the text has it.
    """
    ids = np.append(ids, np.int32(tokenizer.eos_id))
    bos_id = tokenizer.bos_id if add_bos else None
    if bos_id is not None and (len(ids) == 1 or ids[0] != bos_id):
        ids = np.insert(ids, 0, bos_id)
    return ids


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    try:
        utf8 = text.encode()
    except UnicodeEncodeError as error:
        problem = f"a document of the dataset is not Unicode text ({error})"
        raise BadDocumentError(problem) from error
    if isinstance(tokenizer, BytesTokenizer):  # without a list of integers, 8 bytes for each byte
        return np.frombuffer(utf8, dtype=np.uint8)
    return np.array(tokenizer.encode(text), dtype=np.int32)


def _encode_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of the pieces of a conversation, `[length]` int32 each."""
    encode_pieces = getattr(tokenizer, "encode_pieces", None)
    if encode_pieces is None or not is_unicode("".join(texts)):  # of which `_encode` tells
        return [_encode(tokenizer, text).astype(np.int32) for text in texts]
    return [np.array(ids, np.int32) for ids in encode_pieces(texts)]


def is_unicode(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Encoder:
    """Token ids of a source's documents, of every kind that `sources` describes.

    Args:
        tokenizer: its eos token ends every document but one of ids, which is taken as it is.
        chat: gives the template for conversations, once one comes; they are refused without it.
        on_error: what happens to a malformed document: `stop` raises, `skip` leaves it out.
        add_bos: bos begins every document, likewise but one of ids; a conversation, whose template
            may have written it, has it as a token that is not learned.

    Raises:
        DataError: the tokenizer has no bos for `add_bos`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: Callable[[], ChatTemplate] | None = None,
        on_error: Literal["stop", "skip"] = "stop",
        add_bos: bool = False,
    ) -> None:
        if add_bos and getattr(tokenizer, "bos_id", None) is None:
            raise DataError(
                "the tokenizer has no bos token. Name it as bos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.add_bos = add_bos
        self._chat = None if chat is None else functools.cache(chat)
        self.skips = on_error == "skip"
        self.skipped = 0
        """Malformed documents left out so far, each as often as it came."""
        self.has_conversations = False
        """Whether one has come so far."""
        self._in_a_row = 0
        self._lock = threading.Lock()

    def require_bos(self, ids: np.ndarray) -> None:
        """Raises `DataError` if `add_bos` is set, and a document that came as ids lacks bos."""
        bos_id = self.tokenizer.bos_id if self.add_bos else None
        if bos_id is not None and ids[0] not in (bos_id, ~bos_id):
            raise DataError(
                f"add_bos is set, but a document is token ids, which are taken as they are, and it "
                f"begins with {ids[0]} instead of bos ({bos_id})"
            )

    def __call__(self, document: object) -> np.ndarray:
        """`[length]`, of an integer type; of length 0 for a document that is empty or skipped.

        Raises:
            BadDocumentError: the document is malformed, or an error in a document's place.
        """
        if isinstance(document, np.ndarray):
            return document
        try:
            if isinstance(document, BadDocumentError):
                raise document
            if isinstance(document, list) and self._chat is not None:
                ids = self._encode_chat(self._chat(), document)
                self.has_conversations = True
            else:
                ids = encode_document(self.tokenizer, document, self.add_bos)
            self._in_a_row = 0
            return ids
        except BadDocumentError as error:
            return self.skip(error)

    def skip(self, error: BadDocumentError) -> np.ndarray:
        """Leave out a document: an empty one in its place. Raises the error under `stop`."""
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
        """Have a source of ids look at the tokenizer. Raises `DataError`: they do not fit."""
        use_tokenizer = getattr(source, "use_tokenizer", None)
        if use_tokenizer is not None:
            use_tokenizer(self.tokenizer)
        require_bos = getattr(source, "require_bos", None)
        if self.add_bos and require_bos is not None:
            require_bos(self.tokenizer.bos_id)

    def _encode_chat(self, chat: ChatTemplate, messages: list) -> np.ndarray:
        texts, trained = zip(*chat.segments(messages), strict=True)
        parts = [
            ids if learned else ~ids
            for ids, learned in zip(_encode_pieces(self.tokenizer, texts), trained, strict=True)
            if len(ids)
        ]
        last, eos_id = parts[-1], np.int32(self.tokenizer.eos_id)
        if last[-1] != eos_id:  # of many templates it ends the assistant's message
            parts.append(np.array([~eos_id]))
        bos_id = self.tokenizer.bos_id if self.add_bos else None
        if bos_id is not None and parts[0][0] not in (bos_id, ~bos_id):
            parts.insert(0, np.array([~bos_id], np.int32))
        return np.concatenate(parts)


def first_document(source: Source, encoder: Encoder) -> object | None:
    """The first document that is not empty and not skipped; None if there is none. Counts nothing.

    Raises:
        DataError: a document on the way there cannot be read.
    """
    documents: Iterable[object]
    if has_random_access(source):
        documents = map(partial(take, source), range(len(source)))
    else:
        documents = source
    for document in documents:
        if isinstance(document, BadDocumentError):
            if not encoder.skips:
                raise document
        elif not hasattr(document, "__len__") or len(document):
            return document
    return None


def take(source: RandomAccess, index: int) -> object:
    """Document `index` of a random-access source; the error in its place if it is malformed."""
    try:
        return source[index]
    except BadDocumentError as error:
        return error
