"""Compute the loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from torchtitan.components.data_loader import Batch
from torchtitan.components.loss import count_of
from torchtitan.components.validator import Evaluate, sum_over_data
from torchtitan.config.batch import batch_shape
from torchtitan.data import DataLoader, build_validation_dataloader
from torchtitan.errors import refuse_incomplete
from torchtitan.runtime.device import device
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.components.tokenizer import Tokenizer
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims


_MOST_KEPT = 2**28
"""Maximum size in bytes of the validation batches that a process keeps in memory."""
_BYTES_OF_A_TOKEN = 16
"""Bytes per token of the four arrays of `packing.to_batch`, as int32."""


class TextValidator:
    """Evaluates the same sequences each time and on every layout.

    They are `validation.steps` batches of each dataset, which the data ranks share.
    """

    def __init__(
        self,
        job_config: JobConfig,
        tokenizer: Tokenizer,
        loss_fn: Loss,
        parallel_dims: ParallelDims,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self._count = count_of(loss_fn)
        self._parallel_dims = parallel_dims
        self._sources = job_config.validation.sources
        build = partial(build_validation_dataloader, job_config, tokenizer, dp_rank, dp_world_size)
        loaders = [build(source) for source in self._sources] or [build()]
        batches = sum(loader.gradient_accumulation_steps for loader in loaders)
        size = batches * math.prod(batch_shape(job_config, "validation")) * _BYTES_OF_A_TOKEN
        # Best-fit packing reads a pool of documents for each row and uses one sequence of it, so
        # its batches are kept rather than read again.
        self._keeps = job_config.data.packing == "best_fit" and size <= _MOST_KEPT
        self._kept: dict[DataLoader, list[Batch]] = {}
        self._loaders = loaders
        self._losses: list[float] = []

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """Return the mean loss, see `Validator`."""
        sums = [self._summed(self._batches(loader), evaluate) for loader in self._loaders]
        own = torch.tensor([[loss.item(), tokens] for loss, tokens in sums], dtype=torch.float64)
        loss_sums, token_counts = sum_over_data(own, self._parallel_dims).unbind(1)
        if not token_counts.all():
            names = [source.name or source.dataset for source in self._sources]
            without = [n for n, count in zip(names, token_counts, strict=False) if not count]
            rank0.warning(
                "validation: no label counts%s, so the loss is NaN",
                f" of {', '.join(without)}" if without else "",
            )
        self._losses = (loss_sums / token_counts).tolist()
        weights = [source.weight for source in self._sources] or [1.0]
        weighted = zip(weights, self._losses, strict=True)
        return sum(weight * loss for weight, loss in weighted if weight) / sum(weights)

    def _summed(self, batches: Iterator[Batch], evaluate: Evaluate) -> tuple[torch.Tensor, int]:
        """Return this rank's summed loss, a number on the device, and number of labels that count.

        The host does not wait for the device.
        """
        total, tokens = torch.zeros((), dtype=torch.float64, device=device()), 0
        for batch in batches:
            total += evaluate(batch)
            tokens += int(self._count(batch["labels"]))
        return total, tokens

    def _batches(self, loader: DataLoader) -> Iterator[Batch]:
        """Yield the batches of a dataset, always the same."""
        if loader in self._kept:
            for batch in self._kept[loader]:
                yield {name: tensor.long() for name, tensor in batch.items()}
            return
        kept = []
        loader.reset()
        for _ in range(loader.gradient_accumulation_steps):
            batch = next(loader)
            if self._keeps:
                kept.append({name: tensor.int() for name, tensor in batch.items()})
            yield batch
        loader.close()  # stop reading ahead until the next validation
        if self._keeps:
            self._kept[loader] = kept

    def metrics(self) -> dict[str, float]:
        """Return the loss of each of `validation.sources`."""
        names = [f"loss/{source.name or source.dataset}" for source in self._sources]
        return dict(zip(names, self._losses, strict=False))

    def close(self) -> None:
        for loader in self._loaders:
            loader.close()


build_validator = TextValidator
"""The default of `TrainSpec.build_validator_fn`."""


def check_validator(validator: Any, dataloader: Any, job_config: JobConfig) -> None:
    """Raise `ConfigError` if a method is missing; warn if the task may differ from training's."""
    missing = [n for n in ("validate", "close") if not callable(getattr(validator, n, None))]
    maker = f"build_validator_fn of {job_config.model.name}"
    refuse_incomplete(validator, maker, missing, "; see torchtitan.components.Validator")
    usual = isinstance(validator, TextValidator)
    if usual and not isinstance(dataloader, DataLoader):
        rank0.warning(
            "validation predicts the next tokens of texts (validation.dataset), but %s is trained "
            "on the batches of its own build_dataloader_fn. If that is another task, write a "
            "build_validator_fn",
            job_config.model.name,
        )


@contextmanager
def evaluating(model_parts: list[nn.Module], fsdp_modules: list[FSDPModule]) -> Iterator[None]:
    """Put the parts in eval mode; at the end, reshard them, as checkpoints need."""
    for part in model_parts:
        part.eval()
    yield
    for part in model_parts:
        part.train()
    for module in fsdp_modules:
        module.reshard()
