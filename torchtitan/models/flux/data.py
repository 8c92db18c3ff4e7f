"""Encoded images with captions, and what a training step makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from torchtitan.config import JobConfig
from torchtitan.config.batch import batch_shape
from torchtitan.config.load import fail
from torchtitan.config.training import Training
from torchtitan.data.build import open_on_all_ranks
from torchtitan.data.samples import Sample, SampleLoader
from torchtitan.data.sources import RandomAccess, open_columns
from torchtitan.errors import DataError, begin_errors_with
from torchtitan.tools.logging import rank0

from .config import flux_options
from .model.args import FluxModelArgs
from .model.model import GUIDANCE_UNITS, TIME_UNITS
from .shapes import Shapes

COLUMNS = ("latents", "t5", "clip")
"""Of a table: the latent image `[channels / 4, height, width]`, shifted and scaled as the model
sees it; the T5 states `[n, text_dim]` and the CLIP vector `[pooled_dim]` of its caption."""
PATCH = 2


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Cut latents `[channels, height, width]` into patches `[patches, 4 * channels]`, by rows."""
    return F.unfold(latents[None], PATCH, stride=PATCH)[0].T


def unpack(patches: torch.Tensor, width: int) -> torch.Tensor:
    """Invert `pack`. `width`: patches in a row."""
    size = PATCH * len(patches) // width, PATCH * width
    return F.fold(patches.T[None], size, PATCH, stride=PATCH)[0]


@dataclass
class NoisySample:
    """Makes a sample of an encoded image: the image with noise, and the velocity between both.

    Args:
        seq_len: patches of an image.
        text_dropout: see `Flux`.
        guidance: see `Flux`.
    """

    args: FluxModelArgs
    seq_len: int
    text_dropout: float
    guidance: float

    def __call__(
        self, row: Mapping[str, Any], random: torch.Generator, share: float | None = None
    ) -> Sample:
        """Draw the share of noise from a logit-normal distribution, if it is not given."""
        image, text, pooled, width = self._tensors(row)
        drawn = torch.sigmoid(torch.randn((), generator=random)).item()
        time = round((drawn if share is None else share) * TIME_UNITS)
        noise = torch.randn(image.shape, generator=random)
        keeps = torch.rand(2, generator=random) >= self.text_dropout
        sample = {
            "tokens": torch.lerp(image, noise, time / TIME_UNITS),
            "labels": noise - image,
            "text": text * keeps[0],
            "pooled": pooled * keeps[1],
            "times": torch.tensor(time),
            "widths": torch.tensor(width),
        }
        if self.args.guidance:
            sample["guidance"] = torch.tensor(round(self.guidance * GUIDANCE_UNITS))
        return sample

    def _tensors(
        self, row: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Return patches, T5 states with padding, CLIP vector and width. Raises `DataError`."""
        args = self.args
        latents, text, pooled = tensors = [_numbers(row, column) for column in COLUMNS]
        if not self._fit(*tensors):
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise DataError(
                f"{', '.join(COLUMNS)} of a row are {shapes}, but must be "
                f"[{args.channels // PATCH**2}, height, width] of training.seq_len = "
                f"{self.seq_len} patches of {PATCH} x {PATCH}, up to "
                f"[{args.text_len}, {args.text_dim}], and [{args.pooled_dim}]"
            )
        text = F.pad(text, (0, 0, 0, args.text_len - len(text)))
        return pack(latents), text, pooled, latents.shape[2] // PATCH

    def _fit(self, latents: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor) -> bool:
        args = self.args
        if (latents.ndim, text.ndim) != (3, 2):
            return False
        channels, height, width = latents.shape
        return (
            channels * PATCH**2 == args.channels
            and height % PATCH == width % PATCH == 0
            and height * width == self.seq_len * PATCH**2
            and len(text) <= args.text_len
            and text.shape[1] == args.text_dim
            and pooled.shape == (args.pooled_dim,)
        )


def _numbers(row: Mapping[str, Any], column: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(row[column], np.float32))
    except (ValueError, TypeError) as error:
        raise DataError(f"{column} of a row is no array of numbers: {error}") from error


def sample_maker(
    args: FluxModelArgs, job_config: JobConfig, section: Literal["training", "validation"]
) -> NoisySample:
    options = flux_options(job_config)
    dropout = options.text_dropout if section == "training" else 0.0
    return NoisySample(args, batch_shape(job_config, section)[1], dropout, options.guidance)


def open_images(
    args: FluxModelArgs, job_config: JobConfig, section: Literal["training", "validation"]
) -> RandomAccess:
    """Open the dataset of a config section.

    Raises:
        ConfigError: it is no dataset of encoded images.
        DataError: the data is missing, empty or malformed.
    """
    config = getattr(job_config, section)
    key, parts = f"{section}.dataset", "data" if section == "training" else "validation"
    if getattr(job_config, parts).sources:
        fail(job_config, f"{parts}.sources", f"images are read from a single dataset, {key}")
    if config.dataset == type(config)().dataset:
        if config.dataset_path is not None or job_config.training.dataset != Training().dataset:
            fail(job_config, key, "is unset: set it to 'parquet' or 'arrow'")
        seq_len = batch_shape(job_config, section)[1]
        if math.isqrt(seq_len) ** 2 != seq_len:
            problem = "the drawn shapes are square: set it to a square such as 64 or 256"
            fail(job_config, "training.seq_len", f"{problem}, or set {key}")
        rank0.info("%s is unset: drawings of coloured shapes", key)
        return Shapes(args, seq_len, held_out=section == "validation")
    if config.dataset not in ("parquet", "arrow"):
        fail(job_config, key, "images are read from 'parquet' or 'arrow'; unset: drawings")
    place = config.dataset, config.dataset_path, COLUMNS, config.split
    with begin_errors_with(f"{key} = {config.dataset!r}"):
        return open_on_all_ranks(partial(open_columns, *place))


def build_dataloader(
    args: FluxModelArgs, job_config: JobConfig, tokenizer: None, dp_rank: int, dp_world_size: int
) -> SampleLoader:
    """Build the loader of one data rank. Raises as `open_images`."""
    images = open_images(args, job_config, "training")
    make = sample_maker(args, job_config, "training")
    return SampleLoader(images, make, job_config, dp_rank, dp_world_size)
