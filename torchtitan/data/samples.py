"""A data loader for models that do not read texts: rows of a table, each made into tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from torchtitan.components.data_loader import Batch
from torchtitan.config import JobConfig
from torchtitan.config.batch import batch_sizes
from torchtitan.errors import DataError, begin_errors_with
from torchtitan.tools.logging import logger

from .order import mix, permute
from .prefetch import PREFETCHED_BATCHES, Prefetcher
from .sources import RandomAccess

Sample = dict[str, torch.Tensor]
"""`tokens`, `labels` and other inputs of the model, without the dimension of the batch."""
MakeSample = Callable[[Any, torch.Generator], Sample]


class SampleLoader:
    """Endless micro-batches for one data rank, with a state to resume from.

    A sample depends on the seed, the step and its row of the global batch, and on nothing else, so
    every layout trains on the same samples. Each epoch has its own order of the rows.

    Args:
        source: the rows.
        make: makes a sample of a row. It draws random numbers from the generator alone, and may be
            called from another thread.
        job_config: sections `training` (sizes of batches) and `debug` (seed).
        name: prefix of errors, such as the config key and its value.

    Raises:
        ConfigError: the batch sizes do not fit the ranks.
        DataError: there are no rows.
    """

    takes_ramp = True

    def __init__(
        self,
        source: RandomAccess,
        make: MakeSample,
        job_config: JobConfig,
        dp_rank: int,
        dp_world_size: int,
        name: str = "training.dataset",
    ) -> None:
        sizes = batch_sizes(job_config, dp_world_size)
        self._batch_size = sizes.largest
        share = self._batch_size // dp_world_size
        self._rows = torch.arange(dp_rank * share, (dp_rank + 1) * share)
        # See `DataLoader`; a slice takes several passes.
        self._slices = self._rows.reshape(-1, sizes.largest // sizes.unit).T
        self._passes = sizes.unit // sizes.one_pass
        self._source, self._make, self._name = source, make, name
        self._seed = job_config.debug.seed
        self._taken = 0  # micro-batches
        self._prefetcher: Prefetcher[Batch] | None = None
        if len(source) == 0:
            raise DataError(f"{name}: it has no rows")

    def __next__(self) -> Batch:
        with begin_errors_with(self._name):
            if self._prefetcher is None:
                self._prefetcher = Prefetcher(self._batches(self._taken), PREFETCHED_BATCHES)
            batch = next(self._prefetcher)
        self._taken += 1
        return batch

    def _batches(self, taken: int) -> Iterator[Batch]:
        while True:
            turn, number = divmod(taken, self._passes)
            step, part = divmod(turn, len(self._slices))
            rows = self._slices[part].chunk(self._passes)[number].tolist()
            yield stacked([self._sample(step, row) for row in rows])
            taken += 1

    def _sample(self, step: int, row: int) -> Sample:
        number, size = step * self._batch_size + row, len(self._source)
        epoch, place = divmod(number, size)
        (index,) = permute(np.array([place]), size, mix(self._seed, epoch)).tolist()
        with begin_errors_with(f"row {index} (from 0)"):
            return self._make(self._source[index], generator_of(self._seed, number))

    def metrics(self) -> dict[str, float]:
        """Return `data_epoch`, the number of times the rows have been read."""
        read = self._taken / self._passes / len(self._slices) * self._batch_size
        return {"data_epoch": read / len(self._source)}

    def describe(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the data, to go on in the same order."""
        return {"seed": self._seed, "samples": len(self._source)}

    def state_dict(self) -> dict[str, Any]:
        """Return `{"rows": [rows of this rank, 2] int64, "described": ...}`: row and samples."""
        slices = len(self._slices)
        samples = (self._taken // self._passes + slices - 1 - self._rows % slices) // slices
        return {"rows": torch.stack([self._rows, samples], dim=1), "described": self.describe()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.close()
        described = state_dict.get("described", {})
        self._seed = described.get("seed", self._seed)
        if (saved := described.get("samples", len(self._source))) != len(self._source):
            logger.warning(
                "%s: %d rows, but %d when the checkpoint was saved: the order is another now",
                *(self._name, len(self._source), saved),
            )
        turns = int(state_dict["rows"][:, 1].sum()) // self._slices.shape[1]
        self._taken = turns * self._passes

    def close(self) -> None:
        """Stop reading ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


def stacked(samples: list[Sample]) -> Batch:
    """Join samples to a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def generator_of(seed: int, number: int) -> torch.Generator:
    """Return the generator for the random numbers of a sample."""
    return torch.Generator().manual_seed(mix(seed, number) & (2**63 - 1))
