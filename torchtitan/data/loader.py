"""The data loader: batches as a function of the seed and the step, whatever the layout of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config.validate import resolve_batch
from torchtitan.errors import CheckpointError, DataError, begin_errors_with

from .order import Origin, ShuffledDocuments, StreamedDocuments
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

    It has the interface of torchdata's `StatefulDataLoader`, which is not used because that one's
    state belongs to a rank and its number of worker processes, so that a run could resume on the
    same layout only. Here the state is a table of rows, which any number of ranks shares out. One
    thread reads ahead, without worker processes, since tokenizers release the interpreter's lock.

    Each micro-batch is a dict of int64 tensors `[local_batch_size, seq_len]`: see `packing.pack`.

    Args:
        source: documents, of either kind that `sources` describes.
        tokenizer: its eos token ends every document.
        seq_len: tokens in a sequence.
        local_batch_size: sequences in a micro-batch.
        global_batch_size: sequences in a step of all ranks; a multiple of `local_batch_size *
            dp_world_size`, unless `pad` is set.
        dp_rank: number of this data rank.
        dp_world_size: data ranks.
        seed: of the order of documents.
        document_mask: predict nothing across the end of a document.
        pad: fill the last micro-batches of a step up to such a multiple, with rows whose labels are
            all `IGNORE_INDEX`.
        name: what errors begin with, such as the config key and its value.

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
        pad: bool = False,
        name: str = "the dataset",
    ) -> None:
        passes, remainder = divmod(global_batch_size, local_batch_size * dp_world_size)
        if remainder:
            if not pad:
                raise ValueError(
                    f"global_batch_size {global_batch_size} is no multiple of local_batch_size "
                    f"{local_batch_size} x dp_world_size {dp_world_size}"
                )
            passes += 1
        self._source = source
        self._encode = partial(encode_document, tokenizer)
        self._seq_len = seq_len
        self._local_batch_size = local_batch_size
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._document_mask = document_mask
        self._name = name
        self.global_batch_size = global_batch_size
        self.gradient_accumulation_steps = passes
        rows = passes * local_batch_size
        self._rows = np.arange(dp_rank * rows, (dp_rank + 1) * rows)

        if isinstance(source, Iterator):
            raise TypeError("source is an iterator; give something that starts anew each time")
        texts = (source[i] for i in range(len(source))) if _has_random_access(source) else source
        with begin_errors_with(name):
            if not any(texts):  # stops at the first text
                raise DataError("empty: it has no document with text")
        self._prefetcher: Prefetcher[tuple[Batch, np.ndarray]] | None = None
        self.reset()

    def reset(self) -> None:
        """Go back to the first batch."""
        self.close()
        self._places = np.array([(row, 0, *Origin()) for row in self._rows.tolist()])

    def close(self) -> None:
        """Stop reading ahead. Iterating on starts again after the last complete step."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with begin_errors_with(self._name):
            if self._prefetcher is None:
                batches = _batches(
                    self._open_rows(),
                    self._local_batch_size,
                    partial(pack, seq_len=self._seq_len, document_mask=self._document_mask),
                    padding=self._rows >= self.global_batch_size,
                )
                self._prefetcher = Prefetcher(batches, PREFETCHED_BATCHES)
            batch, self._places = next(self._prefetcher)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """`{"rows": [rows of this rank, 4] int64}`: `Row.place` of each row after the last complete
        step handed out.

        The rows of all ranks in order are the state of the run, for any number of ranks.
        """
        return {"rows": torch.from_numpy(self._places.copy())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`; `seq_len` and the number of ranks may differ.

        Raises:
            CheckpointError: the state is of another global batch size.
        """
        places = np.asarray(state_dict["rows"], dtype=np.int64)
        known = places.shape == self._places.shape
        if not known or ((places[:, 0] - self._rows) % self.global_batch_size).any():
            saved = len(places) * self._dp_world_size
            change = (
                f"global_batch_size changed from {saved} to {self.global_batch_size}"
                if len(places) != len(self._rows)
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
        stride, places = self.global_batch_size, self._places.tolist()
        documents: ShuffledDocuments | StreamedDocuments
        if _has_random_access(self._source):
            documents = ShuffledDocuments(self._source, self._encode, self._seed)
        else:
            first = [(document, Origin(*origin)) for document, _, *origin in places]
            documents = StreamedDocuments(self._source, self._encode, stride, first)
        return [Row(documents, stride, document, offset) for document, offset, *_ in places]


def _has_random_access(source: Source) -> bool:
    return hasattr(source, "__getitem__") and hasattr(source, "__len__")


def _batches(
    rows: list[Row],
    local_batch_size: int,
    pack_rows: Callable[[list[Row]], Batch],
    padding: np.ndarray,
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Micro-batches, each with the places of all rows after the last complete step.

    `padding` `[rows]` is true for rows that predict nothing. A function, not a method: the thread
    that runs it must not keep the loader alive.
    """
    places = np.array([row.place for row in rows])
    padding = torch.from_numpy(padding)
    while True:
        for first in range(0, len(rows), local_batch_size):
            part = slice(first, first + local_batch_size)
            batch = pack_rows(rows[part])
            batch["labels"][padding[part]] = IGNORE_INDEX
            if part.stop == len(rows):
                places = np.array([row.place for row in rows])
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
    evaluate the first sequence of each of `validation.steps * validation.local_batch_size` rows,
    the same ones on every layout. Where the ranks do not divide the steps, the last of them get
    batches without labels, since all must run the model equally often.

    Raises:
        ConfigError: the dataset is unknown.
        DataError: the data is missing, empty or malformed.
    """
    validation = job_config.validation
    return _build(
        "validation",
        job_config,
        tokenizer,
        global_batch_size=validation.steps * validation.local_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        pad=True,
    )


def _build(
    section: Literal["training", "validation"],
    job_config: JobConfig,
    tokenizer: Tokenizer,
    **batch: int,
) -> DataLoader:
    """The loader of the dataset that a config section names; errors begin with that key."""
    config = getattr(job_config, section)
    name = f"{section}.dataset = {config.dataset!r}"
    with begin_errors_with(name):
        source = open_dataset(config.dataset, config.dataset_path, job_config.training.text_key)
    return DataLoader(
        source,
        tokenizer,
        seq_len=config.seq_len,
        local_batch_size=config.local_batch_size,
        seed=job_config.debug.seed,
        document_mask=job_config.training.document_mask,
        name=name,
        **batch,
    )
