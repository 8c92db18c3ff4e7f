"""The data loader: batches as a function of the seed and the step, whatever the layout of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from torchtitan.config.validate import resolve_batch
from torchtitan.errors import CheckpointError, DataError, TitanError

from .order import ShuffledDocuments, StreamedDocuments
from .packing import Row, encode_document, pack
from .prefetch import Prefetcher
from .sources import Source, open_dataset

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer
    from torchtitan.config import JobConfig

Batch = dict[str, torch.Tensor]
PREFETCHED_BATCHES = 4


class DataLoader:
    """Endless micro-batches of packed documents for one data rank, with a state to resume from.

    A global batch has `global_batch_size` rows, each a token stream of its own (`packing.Row`).
    Rank `r` owns an equal share of consecutive rows, and its micro-batches are consecutive groups
    of `local_batch_size` of them. So it tokenizes only its own documents, and the global batch of a
    step is the same on every layout.

    Each micro-batch is a dict of int64 tensors `[local_batch_size, seq_len]`: see `packing.pack`.

    Args:
        source: documents, of either kind that `sources` describes.
        tokenizer: its eos token ends every document.
        seq_len: tokens in a sequence.
        local_batch_size: sequences in a micro-batch.
        global_batch_size: sequences in a step of all ranks; a multiple of `local_batch_size *
            dp_world_size`.
        dp_rank: number of this data rank.
        dp_world_size: data ranks.
        seed: of the order of documents.
        document_mask: predict nothing across the end of a document.

    Raises:
        DataError: the dataset is empty. Iterating raises it too, where data is malformed.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        seq_len: int,
        local_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        seed: int = 0,
        document_mask: bool = False,
    ) -> None:
        rows, remainder = divmod(global_batch_size, dp_world_size)
        if remainder or rows % local_batch_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is no multiple of local_batch_size "
                f"{local_batch_size} x dp_world_size {dp_world_size}"
            )
        self._source = source
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._local_batch_size = local_batch_size
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._document_mask = document_mask
        self.global_batch_size = global_batch_size
        self.gradient_accumulation_steps = rows // local_batch_size
        self._rows = np.arange(dp_rank * rows, (dp_rank + 1) * rows)

        if isinstance(source, Iterator):
            raise TypeError("source is an iterator; give something that starts anew each time")
        texts = (source[i] for i in range(len(source))) if _has_random_access(source) else source
        if not any(texts):
            raise DataError("the dataset is empty: it has no document with text")
        self._prefetcher: Prefetcher[tuple[Batch, np.ndarray]] | None = None
        self.reset()

    def reset(self) -> None:
        """Go back to the first batch."""
        self.close()
        self._places = np.stack([self._rows, np.zeros_like(self._rows)], axis=1)

    def close(self) -> None:
        """Stop reading ahead. Iterating on starts again after the last complete step."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            batches = _batches(
                self._open_rows(), self._seq_len, self._local_batch_size, self._document_mask
            )
            self._prefetcher = Prefetcher(batches, PREFETCHED_BATCHES)
        batch, self._places = next(self._prefetcher)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """`{"rows": [rows of this rank, 2] int64}`, the place of each row after the last complete
        step handed out: number of its document, and tokens of that document already used.

        The rows of all ranks in order are the state of the run, for any number of ranks.
        """
        return {"rows": torch.from_numpy(self._places.copy())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`; `seq_len` and the number of ranks may differ.

        Raises:
            CheckpointError: the state is of another global batch size.
        """
        places = np.asarray(state_dict["rows"], dtype=np.int64)
        rows = len(self._rows)
        if places.shape != (rows, 2) or (places[:, 0] % self.global_batch_size != self._rows).any():
            saved = len(places) * self._dp_world_size
            change = (
                f"global_batch_size changed from {saved} to {self.global_batch_size}"
                if len(places) != rows
                else "the rows are not those of this rank, as if global_batch_size had changed"
            )
            raise CheckpointError(
                f"the place in the data cannot be resumed: {change}. Restore "
                "training.global_batch_size, or begin the data anew with "
                'checkpoint.exclude_from_loading = ["dataloader"]'
            )
        self.close()
        self._places = places.copy()

    def _open_rows(self) -> list[Row]:
        stride = self.global_batch_size
        encode = partial(encode_document, self._tokenizer)
        documents: ShuffledDocuments | StreamedDocuments
        if _has_random_access(self._source):
            documents = ShuffledDocuments(self._source, encode, self._seed)
        else:
            first = dict(zip(self._rows.tolist(), self._places[:, 0].tolist(), strict=True))
            documents = StreamedDocuments(self._source, encode, stride, first)
        return [Row(documents, stride, *place) for place in self._places.tolist()]


def _has_random_access(source: Source) -> bool:
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _batches(
    rows: list[Row], seq_len: int, local_batch_size: int, document_mask: bool
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Micro-batches, each with the places of all rows after the last complete step.

    A function, not a method: the thread that runs it must not keep the loader alive.
    """
    places = np.array([(row.document, row.offset) for row in rows])
    while True:
        for first in range(0, len(rows), local_batch_size):
            batch = pack(rows[first : first + local_batch_size], seq_len, document_mask)
            if first + local_batch_size == len(rows):
                places = np.array([(row.document, row.offset) for row in rows])
            yield batch, places


def build_dataloader(
    job_config: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int
) -> DataLoader:
    """The training data of one data rank.

    Raises:
        ConfigError: the dataset is unknown, or the batch sizes do not fit the ranks.
        DataError: the data is missing, empty or malformed.
    """
    global_batch_size, _ = resolve_batch(job_config, dp_world_size)
    return _build(
        "training",
        job_config,
        tokenizer,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
    )


def build_validation_dataloader(
    job_config: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int
) -> DataLoader:
    """The validation data of one data rank: one validation is one global batch.

    A validation calls `reset()` and takes `gradient_accumulation_steps` batches. All ranks together
    evaluate the first sequence of each of `validation.steps * validation.local_batch_size` rows, so
    the sequences are the same on every layout where the ranks divide `validation.steps`; elsewhere
    the steps are rounded up to a multiple of the ranks.

    Raises:
        ConfigError: the dataset is unknown.
        DataError: the data is missing, empty or malformed.
    """
    validation = job_config.validation
    steps_per_rank = math.ceil(validation.steps / dp_world_size)
    return _build(
        "validation",
        job_config,
        tokenizer,
        global_batch_size=steps_per_rank * dp_world_size * validation.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
    )


def _build(
    section: Literal["training", "validation"],
    job_config: JobConfig,
    tokenizer: Tokenizer,
    **batch: int,
) -> DataLoader:
    """The loader of the dataset that a config section names; errors begin with that key."""
    config = getattr(job_config, section)
    try:
        return DataLoader(
            open_dataset(config.dataset, config.dataset_path, job_config.training.text_key),
            tokenizer,
            seq_len=config.seq_len,
            local_batch_size=config.local_batch_size,
            seed=job_config.debug.seed,
            document_mask=job_config.training.document_mask,
            **batch,
        )
    except TitanError as error:
        message = f"{section}.dataset = {config.dataset!r}: {error}"
        raise type(error)(message) from error
