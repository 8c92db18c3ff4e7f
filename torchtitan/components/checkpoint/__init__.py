"""Save and resume runs, and load weights."""

from .load import load_model_weights
from .manager import CheckpointManager

__all__ = ["CheckpointManager", "load_model_weights"]
