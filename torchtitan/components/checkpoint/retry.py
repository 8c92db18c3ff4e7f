"""Retry reads from storage that fails for a while, and distinguish outages from damage.

Damage is a missing or short file, a wrong checksum, or bytes that cannot be parsed. The run then
falls back to an older checkpoint, so an outage must never be mistaken for damage.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchtitan.errors import CheckpointError, DamagedCheckpointError, OutageError, may_pass
from torchtitan.tools.logging import logger
from torchtitan.tools.text import first_line

T = TypeVar("T")

RETRY_AFTER = (0.5, 2.0, 5.0)
"""Seconds to wait after the first attempt to read, the second, and so on."""
NO_DAMAGE = (OutageError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""Errors that can occur while reading a good checkpoint."""
_IMPOSSIBLE = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that no file can have."""
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def read_again(path: Any, read: Callable[[], T]) -> T:
    """Return `read()`, which reads `path` from its beginning; retry after a delay if it fails.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: at once; there is no such file.
        CheckpointError: at once; the path cannot be that of a file.
        OutageError: each attempt failed with some other `OSError`.
    """
    for seconds in (*RETRY_AFTER, None):
        try:
            return read()
        except (*_MISSING, OutageError):
            raise
        except OSError as error:
            if error.errno in _IMPOSSIBLE:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if seconds is None or isinstance(error, PermissionError):
                raise OutageError(
                    f"{path} cannot be read: {first_line(error)}. The file itself may be intact, "
                    "so try again"
                ) from error
            # Not a warning, which a thousand ranks would show at once.
            logger.info(
                "%s cannot be read: %s. Trying again in %s s", path, first_line(error), seconds
            )
            time.sleep(seconds)
    raise AssertionError


def if_deleted(folder: Any) -> str:
    """Return a note for the message on a missing file if the whole checkpoint is gone."""
    if not isinstance(folder, Path) or folder.exists():
        return ""
    return ": its folder was deleted meanwhile, perhaps by its run (checkpoint.keep_latest_k)"


def parse_again(path: Any, parse: Callable[[], T]) -> T:
    """Return `parse()`, which reads and parses `path`; retry like `read_again`.

    Raises:
        DamagedCheckpointError: the file is missing or cannot be parsed.
        CheckpointError: raised by `parse` itself.
        OutageError, MemoryError, OutOfMemoryError, AcceleratorError: the file may be good.
    """

    def attempt() -> T:
        try:
            return parse()
        except OSError as error:
            if error.errno == errno.EINVAL or isinstance(error, io.UnsupportedOperation):
                # Damaged bytes led to an impossible file position.
                raise ValueError(str(error)) from error
            raise

    try:
        return read_again(path, attempt)
    except (CheckpointError, *NO_DAMAGE):
        raise
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing{if_deleted(path.parent)}") from error
    except Exception as error:  # damaged bytes may raise errors of any kind
        if "DefaultCPUAllocator" in str(error):  # PyTorch raises RuntimeError for lack of memory
            raise MemoryError(f"{path}: {first_line(error)}") from error
        if may_pass(error):  # PyTorch or an adapter hides the storage's error
            raise OutageError(f"{path} cannot be read: {first_line(error)}") from error
        raise DamagedCheckpointError(f"{path} is damaged: {first_line(error)}") from error
