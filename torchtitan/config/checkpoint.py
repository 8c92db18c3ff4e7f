from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .base import NonNegative, Positive, Range

ExcludablePart = Literal["optimizer", "lr_scheduler", "dataloader", "train_state"]


@dataclass
class Checkpoint:
    """Saving and resuming."""

    enable: bool = False
    """Save checkpoints, and resume from the newest when the folder holds one."""
    folder: str = "checkpoint"
    """Folder of the checkpoints, inside `job.dump_folder`; or the URL of a storage that fsspec
    supports, such as `s3://bucket/run` (install `torchtitan[s3]` or `[gcs]`)."""
    interval: Annotated[int, Positive] = 500
    """Steps between checkpoints; the last step is always saved."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """`async` writes in the background while training continues."""
    keep_latest_k: Annotated[int, NonNegative] = 10
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Annotated[int, NonNegative] = 0
    """Also keep a checkpoint forever every this many steps, to evaluate or to branch from; a
    multiple of `interval`. 0: none."""
    keep_steps: list[int] = field(default_factory=list)
    """Also save after these steps, such as 1, 2, 4 and 8, whatever `interval` is, and keep those
    checkpoints forever."""
    load_step: Annotated[int, Range(ge=0, special=(-1,))] = -1
    """Step to resume from; -1: the newest complete checkpoint. Applies once: if the newest
    checkpoint was saved with the same `load_step`, the run resumes from the newest, so that a
    restart does not go back again."""
    verify: bool = True
    """Read all files of a checkpoint and verify their checksums before loading it. File sizes are
    always checked."""
    initial_load_path: str = ""
    """Checkpoint (`.../checkpoint/step-N`) or Hugging Face folder with the initial weights of a new
    run; ignored on resume."""
    initial_load_model_only: bool = True
    """Start a new run with the weights of `initial_load_path` alone, at step 0. With false, it
    branches: it goes on from that checkpoint with all of its state, as on resume, but saves into
    its own folder."""
    initial_load_in_hf: bool = False
    """Start a new run from a Hugging Face folder: `initial_load_path`, or `model.tokenizer_path` if
    that is empty."""
    initial_load_exclude: str = ""
    """Regular expression searched in parameter names. A new run initializes matching parameters
    itself instead of loading them from `initial_load_path`, which may lack them."""
    exclude_from_loading: list[ExcludablePart] = field(default_factory=list)
    """Parts of the state not to load on resume, or when a run branches. Applies once: a checkpoint
    that this run saved with the same value is loaded in full, so that a restart does not reset the
    parts again. A different value, such as a part named twice, applies again."""
    last_save_model_only: bool = False
    """Save only the model at the last step (an export; training cannot resume from it)."""
    last_save_in_hf: bool = False
    """Save the model at the last step as a Hugging Face folder `step-N-hf`, which `transformers`
    opens: in addition to the checkpoint, or in its place with `last_save_model_only`."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of a model-only save and of a Hugging Face folder. Router biases stay float32."""
