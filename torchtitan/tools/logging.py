"""The run's log on stderr: all messages of rank 0, and warnings of the other ranks."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import TextIO

from .secrets import hide_secrets

logger = logging.getLogger("torchtitan")
rank0 = logging.getLogger("torchtitan.rank0")
"""For messages that all ranks have: rank 0 alone logs them."""


def _on_rank_0(record: logging.LogRecord) -> bool:
    # Not `dist.get_rank()`: the first warnings are logged before the ranks connect.
    return os.environ.get("RANK", "0") == "0"


rank0.addFilter(_on_rank_0)

# Warnings of PyTorch in ordinary runs that users cannot do anything about.
_HARMLESS = (
    # `world_mesh["dp"]` is the documented way to get a flattened mesh, and works in 2.11 to 2.13.
    "Slicing a flattened dim from root mesh will be deprecated",
    # Torch 2.13, on each rank under tensor parallelism: what changes this view in place removes a
    # hook that gathers the module's weights for its backward pass. That of embeddings needs none.
    r"FSDP2-wrapped module \(FSDP\w*Embedding\) returned a view tensor",
)


def init_logger() -> None:
    """Send the `torchtitan` logger to stderr: on rank 0 from INFO on, on the others warnings.

    The rank is torchrun's `RANK`. Calling it again replaces the earlier settings.
    """
    rank = os.environ.get("RANK", "0")
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message=message)
    # For selective checkpointing, it asks for blocks without in-place operations, on each rank.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_on_rank_0)

    for handler in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(_LineFormatter(rank))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)


class _StderrHandler(logging.StreamHandler):
    """Looks up `sys.stderr` for every message, so that lines go above a live progress bar.

    While a bar is shown, `rich` replaces `sys.stderr` by an object that prints above it.
    """

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


class _LineFormatter(logging.Formatter):
    """`2026-11-24 11:26:03 [rank 3] WARNING message`; rank 0 and the level INFO are omitted."""

    def __init__(self, rank: str) -> None:
        super().__init__(datefmt="%Y-%m-%d %H:%M:%S")
        self._rank = f"[rank {rank}] " if rank != "0" else ""

    def format(self, record: logging.LogRecord) -> str:
        return hide_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        time = self.formatTime(record, self.datefmt)
        return f"{time} {self._rank}{level}{record.message}"
