"""Loss on held-out data."""

from __future__ import annotations

import logging
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
from torchtitan.distributed.utils import rank
from torchtitan.errors import refuse_incomplete

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.components.tokenizer import Tokenizer
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims


logger = logging.getLogger("torchtitan")

_MOST_KEPT = 2**28
"""Bytes of the batches of a validation, in the memory of each process."""
_BYTES_OF_A_TOKEN = 16
"""In the four arrays of `packing.to_batch`, as int32."""


class TextValidator:
    """Evaluates the same sequences each time, and the same ones on every layout.

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
        # Best-fit packing reads a pool of documents for each row, of which one sequence is used.
        self._keeps = job_config.data.packing == "best_fit" and size <= _MOST_KEPT
        self._kept: list[dict[str, torch.Tensor]] | None = None

    def validate(self, model_parts: list[nn.Module], evaluate: Evaluate) -> float:
        """See `Validator`."""
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
        """The batches of one validation, always the same."""
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
        self._dataloader.close()  # it need not read ahead until the next validation
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
    """Raises `ConfigError` if the validator lacks a method; warns of one that may ask otherwise."""
    missing = [n for n in ("validate", "close") if not callable(getattr(validator, n, None))]
    maker = f"build_validator_fn of {job_config.model.name}"
    refuse_incomplete(validator, maker, missing, "; see torchtitan.components.Validator")
    usual = isinstance(validator, TextValidator)
    if usual and not isinstance(dataloader, DataLoader) and rank() == 0:
        logger.warning(
            "validation asks for the next tokens of texts (validation.dataset), but %s is trained "
            "on what its own build_dataloader_fn gives. If that is another task, write a "
            "build_validator_fn",
            job_config.model.name,
        )


@contextmanager
def evaluating(model_parts: list[nn.Module], fsdp_modules: list[FSDPModule]) -> Iterator[None]:
    """The parts in eval mode, and sharded again at the end, as checkpoints need them."""
    for part in model_parts:
        part.eval()
    yield
    for part in model_parts:
        part.train()
    for module in fsdp_modules:
        module.reshard()
