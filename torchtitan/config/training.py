from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .base import Amount, NonNegative, Positive, Range


@dataclass
class Training:
    """Data, batch and precision."""

    dataset: str = "stdlib"
    """Dataset name: `stdlib` (offline); `text`, `jsonl`, `parquet`, `arrow` (own files); `tokens`
    (prepared); `hf`, `c4`, `fineweb`, ... (hub). See docs/data.md; mixtures: `data.sources`."""
    dataset_path: str | None = None
    """File, glob, folder or URL of own files; `REPOSITORY[:CONFIGURATION]` for `hf`; a local copy
    for other hub datasets."""
    text_key: str = "text"
    """Field that holds the text, or a conversation's messages, in datasets that have fields."""
    split: str | None = None
    """Split of hub and `arrow` datasets; unset: `train`."""
    local_batch_size: Annotated[int, Amount] = 8
    """Sequences in one forward pass of one data rank."""
    global_batch_size: Annotated[int, Range(ge=1, le=2**31 - 1, special=(-1,))] = -1
    """Sequences in one optimizer step; gradients accumulate if this takes more than one pass per
    rank. -1: local_batch_size times the number of data ranks."""
    batch_size_ramp: list[str] = field(default_factory=list)
    """Smaller global batches at the start: `["512:2000", "1024:6000"]` has 512 sequences in each
    step to 2000, 1024 to 6000, then global_batch_size. See docs/data.md."""
    seq_len: Annotated[int, Amount] = 2048
    """Tokens in a sequence."""
    steps: Annotated[int, Positive] = 10000
    """Optimizer steps of the run."""
    max_norm: Annotated[float, Range(gt=0, special=(float("inf"),))] = 1.0
    """Global norm to which gradients are clipped (`inf` only measures the norm)."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights stay float32. Most CPUs are faster in
    float32."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the gradient reduction over data ranks."""
    document_mask: bool = False
    """Tokens attend only within their own document of a packed sequence."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP). The optimizer then runs
    on the CPU: set `OMP_NUM_THREADS`, which torchrun makes 1, to the cores of a rank."""
    gc_freq: Annotated[int, NonNegative] = 50
    """Steps between garbage collections, run on all ranks at once; 0: Python's own schedule."""
    on_nonfinite: Literal["error", "skip", "rollback"] = "error"
    """On a step with a NaN or infinite loss or gradient norm, `error` ends the run, `skip` leaves
    the batch out, and `rollback` goes back to the newest checkpoint and continues with later data.
    See docs/fault_tolerance.md."""
    on_spike: Literal["ignore", "warn", "skip", "rollback"] = "ignore"
    """The same for a step whose loss or gradient norm is far above those of earlier steps; `warn`
    only logs a warning. The check costs one host-device synchronization per step."""
    spike_sigmas: Annotated[float, Range(gt=0)] = 6.0
    """A spike is more than this many standard deviations above the mean of the window."""
    spike_window: Annotated[int, Range(ge=4)] = 128
    """Steps in the window; no step counts as a spike before half of the window is filled."""
    bad_step_limit: Annotated[int, Positive] = 5
    """The run ends after more than this many bad steps in a row, or rollbacks to the same
    checkpoint."""
    skip_batches: list[str] = field(default_factory=list)
    """Batches that are read but not trained on, such as `["1001-1250", "1300"]`. Step N trains on
    batch N, unless rollbacks left batches out (`batches_skipped` of the metrics)."""
    replay_freq: Annotated[int, NonNegative] = 0
    """Every this many steps, compute the gradients twice and compare them bitwise, to detect
    hardware that computes wrongly; 0: never. On CUDA this needs debug.deterministic."""
