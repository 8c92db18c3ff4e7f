from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import Positive


@dataclass
class Metrics:
    """What is logged, and where."""

    log_freq: Annotated[int, Positive] = 10
    """Steps between logged lines (the first and the last step are always logged)."""
    progress: Literal["auto", "bar", "plain"] = "auto"
    """`bar`: a live progress bar; `plain`: a line a logged step; `auto`: bar on a terminal."""
    enable_tensorboard: bool = False
    """Write TensorBoard events."""
    save_tb_folder: str = "tb"
    """Folder of the events, inside `job.dump_folder`."""
    enable_wandb: bool = False
    """Log to Weights & Biases (needs `pip install wandb`)."""
