"""The loader wants a file that is not there."""

from __future__ import annotations

from dataclasses import replace

import tiny_own_batches as own

from torchtitan.errors import ConfigError
from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("contract.forward",)
SAYS = r"the data loader of diffusion_without_data gives no batches here: data\.latents is not set"


def build_dataloader(job_config, tokenizer, dp_rank, dp_world_size):
    raise ConfigError("data.latents is not set")


register_train_spec(
    "diffusion_without_data",
    lambda flavor: replace(own.diffusion(), build_dataloader_fn=build_dataloader),
)
