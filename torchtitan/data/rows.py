"""Takes the document from a row of a dataset: a text, or the messages of a conversation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

from torchtitan.errors import BadDocumentError, DataError, did_you_mean

TOOLS = "tools"
"""Field of a row with the tools of its conversation, as for `trl`."""


class Conversation(list[dict[str, Any]]):
    """Messages, and the JSON schemas of the tools that they may call."""

    def __init__(self, messages: Iterable[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
        super().__init__(messages)
        self.tools = tools


def check_key(text_key: str, keys: Iterable[str]) -> None:
    """Raise `DataError`, which lists the existing keys, if `text_key` is not among them."""
    if text_key not in keys:
        raise DataError(f"text_key = {text_key!r}: no such field.{did_you_mean(text_key, keys)}")


def document_columns(text_key: str, names: Iterable[str]) -> list[str]:
    """Return the columns that `document_of` reads, of a table. Raises as `check_key`."""
    check_key(text_key, names)
    return [text_key, TOOLS] if TOOLS in names and text_key != TOOLS else [text_key]


def document_of(row: dict[str, Any], text_key: str) -> str | list[dict[str, Any]]:
    """Return the text of a row, or its list of messages, a `Conversation` if the row has tools.

    Raises:
        DataError: there is neither, or the tools are malformed.
    """
    check_key(text_key, row)
    document = row[text_key]
    if isinstance(document, list):
        if not all(isinstance(message, dict) for message in document):
            raise DataError(f"the field {text_key!r} is a list, but not of messages")
        tools = _tools_of(row)
        return Conversation(document, tools) if tools else document
    if not isinstance(document, str):
        kind = "missing" if document is None else f"{type(document).__name__}, not text"
        raise DataError(f"the field {text_key!r} is {kind}")
    return document


def document_of_table(row: dict[str, Any], text_key: str) -> str | list[dict[str, Any]]:
    """Return the document of a table's row; see `document_of`.

    A tool call of a message lacks the arguments that are null, since other calls have them.
    """
    document = row.get(text_key)
    return document_of(row | {text_key: _without_nulls(document)} if document else row, text_key)


def _tools_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a row, which are a list, or its JSON text, since schemas differ."""
    tools = row.get(TOOLS) or []
    with contextlib.suppress(ValueError, RecursionError):
        tools = json.loads(tools) if isinstance(tools, str) else _without_nulls(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        problem = "must be a list of JSON schemas, or the JSON text of one, for the chat template"
        raise DataError(f"the field {TOOLS!r} {problem}")
    return tools


def _without_nulls(value: Any) -> Any:
    """Leave out fields that are null, as a table has them for those that other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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
