"""Takes the document from a row of a dataset: a text, or the messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torchtitan.errors import BadDocumentError, DataError, did_you_mean


def check_key(text_key: str, keys: Iterable[str]) -> None:
    """Raise `DataError`, which lists the existing keys, if `text_key` is not among them."""
    if text_key not in keys:
        raise DataError(f"text_key = {text_key!r}: no such field.{did_you_mean(text_key, keys)}")


def document_of(row: dict[str, Any], text_key: str) -> str | list[dict[str, Any]]:
    """Return the text of a row, or its list of messages. Raises `DataError`."""
    check_key(text_key, row)
    document = row[text_key]
    if isinstance(document, list):
        if not all(isinstance(message, dict) for message in document):
            raise DataError(f"the field {text_key!r} is a list, but not of messages")
        return document
    if not isinstance(document, str):
        kind = "missing" if document is None else f"{type(document).__name__}, not text"
        raise DataError(f"the field {text_key!r} is {kind}")
    return document


def read_line(line: bytes, text_key: str, path: str, number: int) -> object:
    """Return the text, or the list of messages, of one line. Raises `BadDocumentError`."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
        if type(row) is dict and type(text := row.get(text_key)) is str:
            if not text.isascii():
                text.encode()
            return text
        if not isinstance(row, dict):
            raise DataError(f"must be a JSON object, not {type(row).__name__}")
        return document_of(row, text_key)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text ({error.reason})"
    except UnicodeEncodeError as error:
        problem = f"not Unicode text ({error.reason})"
    except (ValueError, RecursionError) as error:
        problem = f"not valid JSON ({error})"
    except DataError as error:
        problem = str(error)
    raise BadDocumentError(f"{path}:{number}: {problem}")
