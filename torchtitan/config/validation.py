from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from .base import Amount, Positive
from .data import DataSource


@dataclass
class Validation:
    """Loss on held-out data during training."""

    enable: bool = False
    """Validate every `freq` steps and at the last step."""
    freq: Annotated[int, Positive] = 100
    """Training steps between validations."""
    steps: Annotated[int, Amount] = 10
    """Batches of `local_batch_size` sequences (unset: 8) in one validation, of each source if there
    are `sources`. They are always the same, whatever `debug.seed` is; `data.packing` and
    `training.document_mask` apply to them too. The data ranks share them, so that the loss does not
    depend on the number of ranks."""
    dataset: str = "stdlib_validation"
    """Dataset name, as `training.dataset`."""
    dataset_path: str | None = None
    """As `training.dataset_path`."""
    text_key: str | None = None
    """As `training.text_key`; unset: `training.text_key` itself, also with `data.sources`."""
    split: str | None = None
    """As `training.split`."""
    sources: list[DataSource] = field(default_factory=list)
    """Datasets with a loss of their own each, in place of `dataset` (`[[validation.sources]]`).
    The validation loss is then the mean of theirs by `weight`."""
    local_batch_size: Annotated[int, Amount] | None = None
    """Sequences in one forward pass of one data rank; unset: `training.local_batch_size`."""
    seq_len: Annotated[int, Amount] | None = None
    """Tokens in a sequence; unset: `training.seq_len`."""
