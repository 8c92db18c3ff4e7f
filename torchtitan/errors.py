"""Errors that a user can cause and mend: one message, no traceback, exit code 2.

A `StorageError` is one message too, with exit code 1. Any other exception is a bug of ours (or of
the model's author) and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class TitanError(Exception):
    """Base class of the errors a user can mend."""


class ConfigError(TitanError):
    """A key or value of the configuration is wrong."""


class CheckpointError(TitanError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, or not as it was written; another checkpoint may do."""


class StorageError(OSError):
    """A storage cannot be read, which may pass: the run ends, and may be started again as it is."""


class DataError(TitanError):
    """A dataset or a tokenizer is missing, empty or malformed."""


class BadDocumentError(DataError):
    """One document of a dataset is malformed; `data.on_error` says whether it may be skipped."""


class TrainingError(TitanError):
    """The run cannot go on, for example because the loss is no longer finite."""


@contextmanager
def begin_errors_with(where: str) -> Iterator[None]:
    """Have the message of a user's error say where it belongs: a key, or a file and line."""
    try:
        yield
    except TitanError as error:
        raise type(error)(f"{where}: {error}") from error


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest name, then all allowed ones."""
    allowed = sorted(allowed)
    lowered = {a.lower(): a for a in allowed}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return f"{hint} Allowed: {', '.join(allowed) if allowed else '(none)'}."
