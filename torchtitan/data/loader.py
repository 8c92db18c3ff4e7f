"""The data loader: batches as a function of the seed and the step, whatever the layout of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config.validate import resolve_batch
from torchtitan.errors import CheckpointError, DataError

from .order import ShuffledDocuments, StreamedDocuments
from .packing import Row, pack
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

        if _is_random_access(source) and not any(source[i] for i in range(len(source))):
            raise DataError("the dataset is empty: it has no document with text")
        self._prefetcher: Prefetcher[tuple[Batch, np.ndarray]] | None = None
        self.reset()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._batches(), PREFETCHED_BATCHES)
        batch, self._places = next(self._prefetcher)
        return batch

    def reset(self) -> None:
        """Begin again with the first batch."""
        self._restart(np.stack([self._rows, np.zeros_like(self._rows)], axis=1))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`rows`: `[rows of this rank, 2]` int64, each row's place after the last batch returned.

        What is prefetched does not count: places travel with the batches.
        """
        return {"rows": torch.from_numpy(self._places.copy())}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Go on from the places of this rank's rows.

        Raises:
            CheckpointError: the state is of another number of rows.
        """
        rows = state_dict["rows"].numpy()
        if len(rows) != len(self._rows):
            raise CheckpointError(
                f"the data position was saved for {len(rows) * self._dp_world_size} sequences a "
                f"step, but training.global_batch_size is {self.global_batch_size} now. Restore "
                'it, or set checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'
            )
        self._restart(rows)

    def close(self) -> None:
        """Stop the background thread."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _restart(self, places: np.ndarray) -> None:
        self.close()
        self._places = places.copy()

    def _batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Micro-batches without end, each with the places of all rows after it."""
        places = self._places.copy()
        stride = self.global_batch_size
        documents: ShuffledDocuments | StreamedDocuments
        if _is_random_access(self._source):
            documents = ShuffledDocuments(self._source, self._encode, self._seed)
        else:
            first = dict(zip(self._rows.tolist(), places[:, 0].tolist(), strict=True))
            documents = StreamedDocuments(self._source, self._encode, stride, first)
        rows = [Row(documents, stride, document, offset) for document, offset in places.tolist()]
        size = self._local_batch_size
        while True:
            for start in range(0, len(rows), size):
                group = rows[start : start + size]
                batch = pack(group, self._seq_len, self._document_mask)
                places[start : start + size] = [(row.document, row.offset) for row in group]
                yield batch, places.copy()

    def _encode(self, text: str) -> np.ndarray:
        """Ids of a document and the eos token that ends it; an empty document has none."""
        if not text:
            return np.empty(0, dtype=np.int64)
        if isinstance(self._tokenizer, BytesTokenizer):  # without a list of a million integers
            ids = np.frombuffer(text.encode(), dtype=np.uint8)
        else:
            ids = np.asarray(self._tokenizer.encode(text))
        return np.append(ids.astype(np.int64), self._tokenizer.eos_id)


def _is_random_access(source: Source) -> bool:
    return hasattr(source, "__len__") and hasattr(source, "__getitem__")


def build_dataloader(
    job_config: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int
) -> DataLoader:
    """Training data by `[training]`.

    Raises:
        ConfigError, DataError: the dataset is unknown, missing, empty or malformed.
    """
    training = job_config.training
    return DataLoader(
        open_dataset(training.dataset, training.dataset_path, training.text_key),
        tokenizer,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        global_batch_size=resolve_batch(job_config, dp_world_size)[0],
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        seed=job_config.debug.seed,
        document_mask=training.document_mask,
    )


def build_validation_dataloader(
    job_config: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int
) -> DataLoader:
    """Held-out data by `[validation]`: `local_batch_size` sequences of each data rank at a time.

    Layouts whose local_batch_size times data ranks agree see the same sequences.
    """
    validation = job_config.validation
    return DataLoader(
        open_dataset(
            validation.dataset,
            validation.dataset_path,
            job_config.training.text_key,
            section="validation",
        ),
        tokenizer,
        seq_len=validation.seq_len,
        local_batch_size=validation.local_batch_size,
        global_batch_size=validation.local_batch_size * dp_world_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        seed=job_config.debug.seed,
        document_mask=job_config.training.document_mask,
    )
