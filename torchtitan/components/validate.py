"""Compute the loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from torchtitan.components.loss import count_labels
from torchtitan.components.validator import Evaluate
from torchtitan.config.batch import batch_shape
from torchtitan.data import DataLoader, build_validation_dataloader
from torchtitan.errors import refuse_incomplete
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

    They are `validation.steps` batches, which the data ranks share.
    """

    def __init__(
        self,
        job_config: JobConfig,
        tokenizer: Tokenizer,
        parallel_dims: ParallelDims,
        dp_rank: int,
        dp_world_size: int,
    ) -> None:
        self._parallel_dims = parallel_dims
        self._dataloader = build_validation_dataloader(
            job_config, tokenizer, dp_rank, dp_world_size
        )
        batches = self._dataloader.gradient_accumulation_steps
        size = batches * math.prod(batch_shape(job_config, "validation")) * _BYTES_OF_A_TOKEN
        # Best-fit packing reads a pool of documents for each row and uses one sequence of it, so
        # its batches are kept rather than read again.
        self._keeps = job_config.data.packing == "best_fit" and size <= _MOST_KEPT
        self._kept: list[dict[str, torch.Tensor]] | None = None

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """Return the mean loss, see `Validator`."""
        total: Any = None
        for batch in self._batches():
            loss = evaluate(batch)
            tokens = count_labels(batch["labels"]).to(loss.device)
            sums = torch.stack([loss.double(), tokens.double()])
            total = sums if total is None else total + sums
        dist.all_reduce(total)
        loss_sum = total[0] / self._parallel_dims.loss_copies
        token_count = total[1] / self._parallel_dims.non_data_parallel_size
        return (loss_sum / token_count).item()

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of one validation, always the same."""
        if self._kept is not None:
            for batch in self._kept:
                yield {name: tensor.long() for name, tensor in batch.items()}
            return
        kept = []
        self._dataloader.reset()
        for _ in range(self._dataloader.gradient_accumulation_steps):
            batch = next(self._dataloader)
            if self._keeps:
                kept.append({name: tensor.int() for name, tensor in batch.items()})
            yield batch
        self._dataloader.close()  # stop reading ahead until the next validation
        if self._keeps:
            self._kept = kept

    def close(self) -> None:
        self._dataloader.close()


def build_validator(
    job_config: JobConfig,
    tokenizer: Tokenizer,
    loss_fn: Loss,
    parallel_dims: ParallelDims,
    dp_rank: int,
    dp_world_size: int,
) -> TextValidator:
    return TextValidator(job_config, tokenizer, parallel_dims, dp_rank, dp_world_size)


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
