"""Save and resume runs, and load weights.

* Files: `storage` (local or remote), `retry` (is it an outage or damage?), `manifest`, `folder` (a
  checkpoint appears and disappears as a whole), `owner` (one run at a time saves into a folder),
  `series` (what a run knows of its checkpoints).
* Saving: `manager` (when, and what if it fails), `run_state` (what), `save_planner` (who writes
  what), `writer`, `background` (while training goes on).
* Resuming: `resume` (from which checkpoint), `opened` and `shard_table` (where its tensors are),
  `reader`, `data_fit` (the position in the data), `model_identity` (is it the same model?).
* Weights alone: `load`, `model_tensors` (their names), `saved_tensors` (in pieces, for commands).
* Hugging Face: `huggingface` (`config.json` and other files), `tokenizer_files`,
  `safetensors_files`, `converted` (by the model's adapter), `huggingface_save`, `final_export`.
"""

from .load import load_model_weights
from .manager import CheckpointManager
from .run_state import RunState, TrainState

__all__ = ["CheckpointManager", "RunState", "TrainState", "load_model_weights"]
