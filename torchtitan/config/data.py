from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .base import NonNegative, Positive


@dataclass
class DataSource:
    """One `[[data.sources]]` table: a dataset of a mixture."""

    name: str = ""
    """Its name in the metrics; unset: that of the dataset."""
    dataset: str = ""
    """As `training.dataset`."""
    dataset_path: str | None = None
    """As `training.dataset_path`."""
    text_key: str = "text"
    """As `training.text_key`."""
    split: str | None = None
    """As `training.split`."""
    weight: Annotated[float, NonNegative] = 1.0
    """Share of the tokens, relative to the other sources' weights."""


@dataclass
class DataPhase:
    """One `[[data.phases]]` table: a part of a curriculum, which lasts until the next one."""

    from_step: Annotated[int, Positive] = 1
    """Its first training step."""
    weights: list[Annotated[float, NonNegative]] = field(default_factory=list)
    """A weight for each of `data.sources`, in their order, in place of their own."""


@dataclass
class Data:
    """How documents become batches, and mixtures of datasets."""

    sources: list[DataSource] = field(default_factory=list)
    """Datasets to mix, in place of `training.dataset` (`[[data.sources]]`; a field of
    the first on the command line, where the file has it: `--data.sources.0.weight 0.5`)."""
    phases: list[DataPhase] = field(default_factory=list)
    """Weights by training step (TOML only: `[[data.phases]]`)."""
    packing: Literal["contiguous", "best_fit"] = "contiguous"
    """`contiguous` joins documents and cuts them where a sequence ends. `best_fit` cuts only those
    that are longer than a sequence, and fills up with padding, which predicts nothing."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a malformed document does: `stop` ends the run, `skip` leaves it out and counts it."""
    add_bos: bool = False
    """Begin each document with the tokenizer's bos, in training and validation, as Llama 3, Gemma 3
    and others were trained. Documents that are token ids (`tokens`) must begin with it already."""
    workers: Annotated[int, Positive] = 1
    """Threads that read and tokenize ahead, in each process. The data do not depend on it."""
    verify_hashes: bool = False
    """Check the content hashes of prepared tokens (`tokens`) before training."""
    chat_template: str | None = None
    """File with a Jinja chat template for conversations; unset: the tokenizer's own, or ChatML."""
