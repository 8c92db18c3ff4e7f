"""Compare the batches of ranks: in names always, in contents where ranks share a batch; and the
states of loaders."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import get_rank

from torchtitan.components.data_loader import Batch, builder, some
from torchtitan.errors import ConfigError
from torchtitan.runtime.host_sum import all_alike, sum_over_ranks
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims


class BatchAgreement:
    """Refuses batches that do not go together, from a loader or a validator of an author's own.

    Args:
        dp_rank: of this rank; ranks with the same number share a batch.
    """

    def __init__(self, parallel_dims: ParallelDims, dp_rank: int, job_config: JobConfig) -> None:
        self._parallel_dims = parallel_dims
        self._dp_rank = dp_rank
        self._config = job_config
        self._step_is_first = self._validation_is_first = True

    def refuse_other_names(self, sums: list[int], batches: list[Batch]) -> None:
        """Raise `ConfigError` on all ranks if their batches of a step have different names.

        `forward` would call other blocks on some ranks, which then wait for each other.

        Args:
            sums: of the `digest_of_names` of all ranks.
            batches: those of this rank.
        """
        if not all_alike(sums, self._parallel_dims.world_size):
            names = "; ".join(dict.fromkeys(some(batch) for batch in batches))
            raise ConfigError(
                f"{builder(self._config)}: the ranks' batches of a step have different names. "
                f"Those of this rank have {names}. Give all batches the same names, such as zeros "
                "for a sample without an image"
            )

    def weighted_digest(self, batches: list[Batch]) -> int:
        """Return a number for the contents of the batches of a step. The sum over all ranks is 0 if
        those that share batches have the same, and else hardly ever.
        """
        dims = self._parallel_dims
        others = dims.non_data_parallel_size - 1
        if not others:
            return 0
        is_first = get_rank() == self._dp_rank * dims.cp * dims.tp
        return digest_of_contents(batches, self._dp_rank) * (others if is_first else -1)

    def refuse_different(self, weighted_sum: int, step: int) -> None:
        """Raise `ConfigError` on all ranks if ranks that share batches were given different ones.

        A pipeline, for example, takes tokens from the loader of its first stage and labels from
        that of its last.

        Args:
            weighted_sum: over all ranks, of `weighted_digest`.
        """
        if weighted_sum:
            raise self._different(f"step {step}: {builder(self._config)}")

    def check_first_step(self, batches: list[Batch], dataloader: Any) -> None:
        """In the first step, warn if all data ranks have the same batch, and compare the states
        that a checkpoint would join.

        Raises:
            ConfigError: on all ranks, if states do not go together.
        """
        if not self._step_is_first:
            return
        self._step_is_first = False
        contents = digest_of_contents(batches, self._dp_rank) & 0xFFFFFF
        if self._parallel_dims.dp > 1 and self._on_all_ranks(contents):
            rank0.warning(
                "%s: all data ranks were given the same batch. Rank dp_rank of dp_world_size must "
                "read its own share",
                builder(self._config),
            )
        if self._config.checkpoint.enable:
            self._check_states(dataloader.state_dict()["rows"])

    def _check_states(self, rows: torch.Tensor) -> None:
        """Refuse rows that a checkpoint cannot join, or whose differences it would lose."""
        who, shape = f"{builder(self._config)}: the loader's state_dict()", list(rows.shape)
        if not self._on_all_ranks(_digest(shape)):
            raise ConfigError(
                f"{who} has rows of other sizes on other ranks; on this rank, {shape}. A "
                "checkpoint joins them, so all ranks must have equally many rows, equally long"
            )
        if self._differ_where_shared([{"rows": rows}]):
            raise ConfigError(
                f"{who} has different rows on ranks of one data rank, which were given the same "
                "batch. A checkpoint keeps those of one, so let them depend on the step and on "
                "dp_rank alone"
            )

    def check_first_validation(self, batch: Batch) -> None:
        """Compare the first batch that a validator evaluates. Raises as `check_first_step`."""
        if self._validation_is_first:
            self._validation_is_first = False
            if self._differ_where_shared([batch]):
                raise self._different(f"build_validator_fn of {self._config.model.name}")

    def _different(self, who: str) -> ConfigError:
        return ConfigError(
            f"{who}: ranks of one data rank were given different batches. Tensor, context and "
            "pipeline parallelism divide one batch, so let it depend on the step and on dp_rank "
            "alone: draw random numbers by a torch.Generator that is seeded by the step and the "
            "row, and give each host the same files"
        )

    def _differ_where_shared(self, batches: list[Batch]) -> bool:
        weighted = torch.tensor([self.weighted_digest(batches)])
        sum_over_ranks(weighted)
        return bool(weighted)

    def _on_all_ranks(self, number: int) -> bool:
        """Return whether a number below 2^24 is that of all ranks."""
        sums = torch.tensor([number, number**2])
        sum_over_ranks(sums)
        return all_alike(sums.tolist(), self._parallel_dims.world_size)


def digest_of_names(batches: list[Batch]) -> tuple[int, int]:
    """Return a number below 2^16 for the names in the batches of a step, and its square."""
    digest = _digest([sorted(batch) for batch in batches])
    return digest, digest**2


def _digest(value: object) -> int:
    return zlib.crc32(repr(value).encode()) & 0xFFFF


def digest_of_contents(batches: list[Batch], dp_rank: int) -> int:
    """Return a number below 2^32 for the contents of the batches of a step."""
    digest = 0
    for name, tensor in (item for batch in batches for item in sorted(batch.items())):
        content = f"{name} of {dp_rank}".encode()  # on a GPU, bits may differ by rounding
        if tensor.device.type == "cpu":
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest = zlib.crc32(content, digest)
    return digest
