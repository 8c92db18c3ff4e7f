"""The data loader: batches as a function of the seed and the step, whatever the layout of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

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
            steps = _steps(...)
            self._prefetcher = Prefetcher(steps, PREFETCHED_BATCHES)
        batch, self._places = next(self._prefetcher)
        return batch
