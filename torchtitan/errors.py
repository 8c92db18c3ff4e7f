"""Errors that end with one message and no traceback.

Most are mistakes that the user must fix, with exit code 2: automatic restarts would not help. An
`OutageError` may pass by itself, and has exit code 1, like a crash, after which a run is restarted.
Any other exception is a bug of ours (or of the model's author) and shows its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class TitanError(Exception):
    """Base class of the errors that end with one message."""

    exit_code = 2


class ConfigError(TitanError):
    """A key or value of the configuration is wrong."""


class WorldSizeError(ConfigError):
    """The configuration does not fit the number of processes, but may fit another number."""


class ContextParallelError(ConfigError):
    """Context parallelism cannot divide the sequences of this model or data loader."""


class CheckpointError(TitanError):
    """A checkpoint is missing, damaged, of another model, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing or has changed; another checkpoint may be intact."""


class DataError(TitanError):
    """A dataset or a tokenizer is missing, empty or malformed."""


class BadDocumentError(DataError):
    """One document of a dataset is malformed; `data.on_error` says whether it may be skipped."""


class TrainingError(TitanError):
    """The run cannot go on, for example because the loss is no longer finite."""


class OutageError(TitanError):
    """A network, a server or a disk failed, which may pass by itself."""

    exit_code = 1


_UNCHANGING = frozenset(
    {
        *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS),
        *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EMFILE, errno.EFBIG),
        *(errno.ENOSYS, errno.ENOTSUP),
    }
)
"""Errors of the operating system that recur on a retry."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_OF_NETWORKS = frozenset(
    {
        *("ConnectionError", "TimeoutError"),  # of Python and of requests
        *("ClientConnectionError", "ClientPayloadError"),  # aiohttp
        *("TransportError", "ProtocolError", "IncompleteRead"),  # httpx, urllib3, http.client
        *("Timeout", "ChunkedEncodingError"),  # requests
        *("HTTPClientError", "IncompleteReadError", "ResponseStreamingError"),  # botocore
        "CommError",  # wandb
    }
)
"""Names of base classes. Most are no `OSError`, and importing them would need their packages."""
_OF_USERS = frozenset({"OfflineModeIsEnabled", "AuthenticationError"})


def outage_or(mistake: type[TitanError], message: str, error: BaseException) -> TitanError:
    """Return the error to raise for `error`: `OutageError` if that may pass, else `mistake`.

    A full disk is no outage: somebody must free space, and until then each restart is in vain.
    """
    if disk_is_full(error):
        return mistake(f"{message}. Free some space, then try again")
    if not may_pass(error):
        return mistake(message)
    return OutageError(f"{message}. This may be temporary: try again")


@contextmanager
def os_errors_as(mistake: type[TitanError], problem: str) -> Iterator[None]:
    """Turn an `OSError` into what `outage_or` returns: `problem`, the reason, and the file unless
    `problem` names it.
    """
    try:
        yield
    except OSError as error:
        is_named = error.filename is None or str(error.filename) in problem
        reason = (error.strerror if is_named else None) or error
        raise outage_or(mistake, f"{problem}: {reason}", error) from error


def may_pass(error: BaseException) -> bool:
    """Return whether a retry may succeed: after an outage, but not if a file is missing.

    An error's cause, or the error that was being handled, is examined too.
    """
    chain = _chain(error)
    # Also by the text, since `datasets` removes the error of its offline mode from the chain.
    told = " ".join(f"{type(link).__mro__} {link}" for link in chain)
    if any(name in told for name in _OF_USERS):
        return False
    return any(map(_is_outage, chain))


def disk_is_full(error: BaseException) -> bool:
    """Return whether a disk or a quota is used up."""
    return any(isinstance(e, OSError) and e.errno in _FULL for e in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """Return the error, its cause or the error that was being handled, and so on."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _is_outage(error: BaseException) -> bool:
    status = getattr(error, "status", getattr(error, "code", None))
    status = getattr(getattr(error, "response", None), "status_code", status)
    if isinstance(status, int):  # a server's response: too many requests, or a server error
        return status == 429 or status >= 500
    if isinstance(error, ValueError):  # an invalid URL, a certificate that does not match
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _UNCHANGING
    # Not every other OSError: some that damaged files cause have no number.
    return any(cls.__name__ in _OF_NETWORKS for cls in type(error).__mro__)


@contextmanager
def begin_errors_with(where: str) -> Iterator[None]:
    """Prefix the message of a `TitanError` with its place: a key, or a file and line."""
    try:
        yield
    except TitanError as error:
        raise type(error)(f"{where}: {error}") from error


def refuse_incomplete(made: object, maker: str, missing: list[str], needed: str) -> None:
    """Raise `ConfigError` if the object that an author's function returned lacks something.

    Args:
        maker: the function.
        missing: names of the missing attributes.
        needed: end of the message, which says what the object should have.
    """
    if missing:
        name = type(made).__name__
        raise ConfigError(f"{maker} returns {name}, which has no {', '.join(missing)}{needed}")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return a hint for a message about an unknown name: the nearest name, then all allowed.

    It differs for several names with commas, as upstream's command line separates them.
    """
    allowed = sorted(allowed)
    if "," in name and set(name.split(",")) <= set(allowed):
        return " On the command line, separate names by spaces"
    lowered = {a.lower(): a for a in allowed}
    near = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    return f"{hint} Allowed: {', '.join(allowed) if allowed else '(none)'}."
