"""The loader draws noise from PyTorch's own generator, each time another."""

from __future__ import annotations

import tiny_own_batches as own
import torch

from torchtitan.protocols import register_train_spec

CAUGHT_BY = ("layouts.one_device", "contract.dataloader")
SAYS = r"two data loaders of the same job give a different 'tokens'.*debug\.seed"


def noisy_latents(job_config, generator):
    row = own.noisy_latents(job_config, generator)
    return row | {"tokens": row["tokens"] + torch.randn(row["tokens"].shape)}


register_train_spec(
    "diffusion_noise_unseeded", lambda flavor: own.diffusion(make_row=noisy_latents)
)
