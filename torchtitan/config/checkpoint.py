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
    """Folder of the checkpoints, inside `job.dump_folder`; or a URL of a storage that fsspec knows,
    such as `s3://bucket/run` (install `torchtitan[s3]` or `[gcs]`)."""
    interval: Annotated[int, Positive] = 500
    """Steps between checkpoints; the last step is always saved."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """`async` writes in the background while training goes on."""
    keep_latest_k: Annotated[int, NonNegative] = 10
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every: Annotated[int, NonNegative] = 0
    """Besides the newest, keep those of every so many steps for good, to evaluate or to branch off
    from; a multiple of `interval`. 0: none."""
    load_step: Annotated[int, Range(ge=0, special=(-1,))] = -1
    """Step to resume from; -1: the newest complete one. It counts once: if the newest was saved
    with the same value, the run goes on from that, so that a restart does not go back again."""
    verify: bool = True
    """Read all files of a checkpoint and check their checksums before it is loaded; sizes are
    checked in any case."""
    initial_load_path: str = ""
    """Checkpoint (`.../checkpoint/step-N`) or Hugging Face folder whose weights start a new run;
    ignored on resume."""
    initial_load_in_hf: bool = False
    """Start a new run from a Hugging Face folder: `initial_load_path`, or that of
    `model.tokenizer_path` where it is empty."""
    initial_load_exclude: str = ""
    """Regular expression, searched in the names of parameters: those that begin with their initial
    values in a new run, and not with those of `initial_load_path`, which may lack them."""
    exclude_from_loading: list[ExcludablePart] = field(default_factory=list)
    """Parts of the state not to load on resume. It counts once: a checkpoint that was saved with
    the same value is loaded whole, so that a restart does not begin the parts anew again. Another
    value, such as a part named twice, counts anew."""
    last_save_model_only: bool = False
    """Save only the model at the last step (an export; such a checkpoint cannot resume)."""
    last_save_in_hf: bool = False
    """Save the model at the last step as a Hugging Face folder, `step-N-hf`, which
    `transformers` opens: besides the checkpoint, or in its place with `last_save_model_only`."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of a model-only save and of a Hugging Face folder. The bias of a router stays
    float32."""
