"""The frozen models around FLUX.1, from a folder of its release: autoencoder, T5 and CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.errors import ConfigError, DataError
from torchtitan.tools.foreign_files import is_folder
from torchtitan.tools.text import first_line

from .data import PATCH
from .shapes import ShapeEncoders


class Encoders:
    """Autoencoder and text encoders of diffusers' pipeline, on one device.

    Args:
        folder: of the pipeline, without the transformer.

    Raises:
        ConfigError: a package is missing.
        DataError: the folder or a part of it is missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        if not is_folder(folder, DataError):  # or diffusers would look for it on the Hub
            raise DataError(f"--encoders {folder}: there is no such folder")
        try:
            from diffusers import FluxPipeline
            from diffusers.utils.logging import set_verbosity_error
        except ImportError as error:
            raise ConfigError(
                f"encoders need the packages diffusers, transformers and Pillow ({error}): "
                "pip install diffusers transformers pillow"
            ) from error
        set_verbosity_error()  # it warns of each caption that is too long for CLIP
        try:
            loaded: Any = FluxPipeline.from_pretrained(folder, transformer=None)
        except Exception as error:  # from either library
            raise DataError(f"--encoders {folder} cannot be read: {error}") from error
        self._pipeline = loaded.to(device, dtype)
        self._vae = self._pipeline.vae
        self.scale: int = self._pipeline.vae_scale_factor
        """Pixels of an image along each side of a place of the latents."""

    @torch.no_grad()
    def text(self, captions: list[str], text_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5 states `[captions, text_len, _]` and CLIP vectors `[captions, _]`, float32."""
        t5, clip, _ = self._pipeline.encode_prompt(captions, None, max_sequence_length=text_len)
        return t5.float().cpu(), clip.float().cpu()

    @torch.no_grad()
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[batch, 3, height, width]` from -1 to 1 -> `[batch, 16, height / 8, width / 8]`."""
        encoded = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist.mode()
        config = self._vae.config
        return ((encoded - config.shift_factor) * config.scaling_factor).float().cpu()

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Invert `latents`."""
        config = self._vae.config
        encoded = latents / config.scaling_factor + config.shift_factor
        return self._vae.decode(encoded.to(self._vae.device, self._vae.dtype)).sample.float().cpu()


def device_of(name: str) -> torch.device:
    """Return the device of `--device`. Raise `ConfigError` if this machine has no such device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: {first_line(error)}") from error


def pixels_of_patch(encoders: Encoders | ShapeEncoders, width: int, height: int) -> int:
    """Return the pixels along a patch. Raise `ConfigError` if a size is no multiple of it."""
    unit = PATCH * encoders.scale
    for name, size in (("width", width), ("height", height)):
        if size % unit:
            raise ConfigError(f"--{name} {size}: must be a multiple of {unit}")
    return unit


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    """`[3, height, width]` from -1 to 1 -> `[height, width, 3]` uint8."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 0).numpy()
