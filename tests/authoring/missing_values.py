"""A right model of measurements with gaps, as in weather data, whose labels are NaN where there is
none; and two whose losses are wrong: `gaps_as_zeros`, `gaps_as_nan`.
"""

from __future__ import annotations

from dataclasses import replace

import tiny_diffusion
import torch

from torchtitan.protocols import TrainSpec, register_train_spec


class Loader(tiny_diffusion.NoisyImages):
    """The later the row, the more is missing."""

    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        sample = super().sample(step, row)
        random = torch.Generator().manual_seed(1_000 * step + row)
        missing = torch.rand(sample["labels"].shape, generator=random) < row / 8
        return sample | {"labels": sample["labels"].masked_fill(missing, torch.nan)}


def observed(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (pred.float() - labels).nan_to_num().square().sum()


def zeros(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (pred.float() - labels.nan_to_num()).square().sum()


def nan(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (pred.float() - labels).square().sum()


LOSSES = {"missing_values": observed, "gaps_as_zeros": zeros, "gaps_as_nan": nan}


def spec_of(name: str) -> TrainSpec:
    def build_loader(job_config, tokenizer, dp_rank, dp_world_size):
        return Loader(tiny_diffusion.MODEL_CONFIGS["tiny"], job_config, dp_rank, dp_world_size)

    return replace(
        tiny_diffusion.get_train_spec("tiny"),
        build_dataloader_fn=build_loader,
        build_loss_fn=lambda job_config: LOSSES[name],
    )


register_train_spec("missing_values", lambda flavor: spec_of("missing_values"))
register_train_spec("gaps_as_zeros", lambda flavor: spec_of("gaps_as_zeros"))
register_train_spec("gaps_as_nan", lambda flavor: spec_of("gaps_as_nan"))
