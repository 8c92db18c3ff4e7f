"""`tiny_llama` where the files called UNREADABLE cannot be read by the last rank."""

import errno
import os
from pathlib import Path

import tiny_llama

from torchtitan.components.checkpoint import retry
from torchtitan.protocols import register_train_spec

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS
_open = Path.open


def _open_or_fail(path, mode="r", *args, **kwargs):
    if path.name == os.environ.get("UNREADABLE") and "r" in mode:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    return _open(path, mode, *args, **kwargs)


if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
    Path.open = _open_or_fail
    retry.RETRY_AFTER = (0.1, 0.1)

register_train_spec("unreadable_llama", tiny_llama.get_train_spec)
