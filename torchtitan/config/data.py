from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .base import NonNegative, Positive


@dataclass
class DataSource:
    """A table of `[[data.sources]]`, a dataset of a mixture, or of `[[validation.sources]]`."""

    name: str = ""
    """Name of the source in the metrics; unset: name of the dataset."""
    dataset: str = ""
    """As `training.dataset`."""
    dataset_path: str | None = None
    """As `training.dataset_path`."""
    text_key: str = "text"
    """As `training.text_key`."""
    split: str | None = None
    """As `training.split`."""
    weight: Annotated[float, NonNegative] = 1.0
    """Share of the tokens, or of the mean validation loss, relative to the other sources'
    weights."""


@dataclass
class DataPhase:
    """One `[[data.phases]]` table: a phase of a curriculum, which lasts until the next one."""

    from_step: Annotated[int, Positive] = 1
    """First training step of the phase."""
    weights: list[Annotated[float, NonNegative]] = field(default_factory=list)
    """Weights of `data.sources`, in the same order; they replace the sources' own."""


@dataclass
class Data:
    """How documents become batches, and mixtures of datasets."""

    sources: list[DataSource] = field(default_factory=list)
    """Datasets to mix, in place of `training.dataset` (`[[data.sources]]`). The command line can
    set fields of a source that the file has: `--data.sources.0.weight 0.5`."""
    phases: list[DataPhase] = field(default_factory=list)
    """Weights by training step (TOML only: `[[data.phases]]`)."""
    packing: Literal["contiguous", "best_fit"] = "contiguous"
    """`contiguous` joins documents and cuts them where a sequence ends. `best_fit` cuts only
    documents that are longer than a sequence, and fills sequences up with padding, which predicts
    nothing."""
    on_error: Literal["stop", "skip"] = "stop"
    """On a malformed document, `stop` ends the run; `skip` leaves the document out and counts
    it."""
    add_bos: bool = False
    """Begin each document with the tokenizer's BOS token, in training and validation, as Llama 3,
    Gemma 3 and others were trained. Prepared documents (`tokens`) must already begin with it."""
    workers: Annotated[int, Positive] = 1
    """Threads that read and tokenize ahead, per process. Their number does not change the data."""
    verify_hashes: bool = False
    """Check the content hashes of prepared tokens (`tokens`) before training."""
    chat_template: str | None = None
    """File with a Jinja chat template for conversations; unset: the tokenizer's own, or ChatML."""
