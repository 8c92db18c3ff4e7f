"""Save and resume runs, and load weights."""

from .load import load_model_weights
from .manager import CheckpointManager
from .run_state import RunState, TrainState

__all__ = ["CheckpointManager", "RunState", "TrainState", "load_model_weights"]
