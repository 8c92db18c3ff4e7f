"""Loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.data import build_validation_dataloader
from torchtitan.distributed.fsdp import fsdp_modules

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.components.tokenizer import Tokenizer
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims


_MOST_KEPT = 2**28
"""Bytes of the batches of a validation, in the memory of each process."""
_BYTES_OF_A_TOKEN = 16
"""In the four arrays of `packing.to_batch`, as int32."""


class Validator:
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
        config, batches = job_config.validation, self._dataloader.gradient_accumulation_steps
        size = batches * config.local_batch_size * config.seq_len * _BYTES_OF_A_TOKEN
        # Best-fit packing reads a pool of documents for each row, of which one sequence is used.
        self._keeps = job_config.data.packing == "best_fit" and size <= _MOST_KEPT
        self._kept: list[dict[str, torch.Tensor]] | None = None

    @torch.no_grad()
    def validate(
        self,
        model_parts: list[nn.Module],
        evaluate: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    ) -> float:
        """Mean loss per valid token of all data ranks together.

        Args:
            model_parts: put into eval mode meanwhile.
            evaluate: the trainer's; gives the summed loss of one batch.
        """
        for part in model_parts:
            part.eval()
        total: Any = None
        for batch in self._batches():
            loss = evaluate(batch)
            tokens = (batch["labels"] != IGNORE_INDEX).sum().to(loss.device)
            sums = torch.stack([loss.double(), tokens.double()])
            total = sums if total is None else total + sums
        for part in model_parts:
            part.train()
            # A backward pass would have freed these; a checkpoint needs the parameters sharded.
            for module in fsdp_modules(part):
                module.reshard()
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
) -> Validator:
    return Validator(job_config, tokenizer, parallel_dims, dp_rank, dp_world_size)
