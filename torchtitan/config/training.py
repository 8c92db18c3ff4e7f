from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import NonNegative, Positive, Range


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
    """Field that holds the text, or a conversation's messages, in datasets with fields."""
    split: str | None = None
    """Split of hub and `arrow` datasets; unset: `train`."""
    local_batch_size: Annotated[int, Positive] = 8
    """Sequences in one forward pass of one data rank."""
    global_batch_size: Annotated[int, Range(ge=1, special=(-1,))] = -1
    """Sequences in one optimizer step; more than one pass a rank is gradient accumulation.
    -1: local_batch_size times the data ranks."""
    seq_len: Annotated[int, Positive] = 2048
    """Tokens in a sequence."""
    steps: Annotated[int, Positive] = 10000
    """Optimizer steps of the run."""
    max_norm: Annotated[float, Range(gt=0, special=(float("inf"),))] = 1.0
    """Gradients are clipped to this global norm (`inf` only measures it)."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the forward and backward pass; master weights stay float32."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the gradient reduction over data ranks."""
    document_mask: bool = False
    """Tokens attend only within their own document of a packed sequence."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP)."""
    gc_freq: Annotated[int, NonNegative] = 50
    """Steps between garbage collections, done on all ranks at once; 0 leaves Python's own."""
