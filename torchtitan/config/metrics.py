from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import NonNegative, Positive


@dataclass
class Metrics:
    """Metrics and where they are logged."""

    log_freq: Annotated[int, Positive] = 10
    """Steps between logged lines (the first and the last step are always logged)."""
    progress: Literal["auto", "bar", "plain"] = "auto"
    """`bar`: a live progress bar; `plain`: one line per logged step; `auto`: bar on a terminal."""
    enable_tensorboard: bool = False
    """Write TensorBoard events."""
    save_tb_folder: str = "tb"
    """Folder of the events, inside `job.dump_folder`."""
    enable_wandb: bool = False
    """Log to Weights & Biases (needs `pip install 'torchtitan[wandb]'`)."""
    block_norm_freq: Annotated[int, NonNegative] = 0
    """Every this many steps, log the norms of each block's gradients and weights; 0: never."""
    straggler_freq: Annotated[int, NonNegative] = 0
    """Every this many steps, time how long each rank works without waiting for others, and log the
    slowest; 0: never. Timed steps do not overlap communication and computation."""
