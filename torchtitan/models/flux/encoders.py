"""The frozen models around FLUX.1, from a folder of its release: autoencoder, T5 and CLIP.

`diffusers` and `transformers` are imported here alone, and only when a folder is opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.errors import ConfigError, DataError

from .data import PATCH
from .shapes import ShapeEncoders

PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class Encoders:
    """Autoencoder and text encoders, on one device.

    Args:
        folder: with the subfolders `PARTS`, as that of FLUX.1 [dev] or [schnell].

    Raises:
        ConfigError: a package is missing.
        DataError: the folder or a part of it is missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        if missing := [part for part in PARTS if not (folder / part).is_dir()]:
            raise DataError(f"--encoders {folder}: it has no subfolder {', '.join(missing)}")
        try:
            from diffusers import AutoencoderKL
            from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel
        except ImportError as error:
            raise ConfigError(
                f"encoders need the packages diffusers, transformers and Pillow ({error}): "
                "pip install diffusers transformers pillow"
            ) from error

        def load(kind: Any, part: str) -> Any:
            try:
                return kind.from_pretrained(folder / part)
            except Exception as error:  # from either library
                raise DataError(f"{folder / part} cannot be read: {error}") from error

        self._device, self._dtype = device, dtype
        models = (AutoencoderKL, "vae"), (CLIPTextModel, "text_encoder"), (T5EncoderModel, PARTS[2])
        self._vae, self._clip, self._t5 = (
            load(kind, part).to(device, dtype).eval() for kind, part in models
        )
        self._clip_tokenizer = load(AutoTokenizer, "tokenizer")
        self._t5_tokenizer = load(AutoTokenizer, "tokenizer_2")

    @torch.no_grad()
    def text(self, captions: list[str], text_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return T5 states `[captions, text_len, _]` and CLIP vectors `[captions, _]`, float32.

        As in the release, T5 also reads the padding.
        """
        length = self._clip_tokenizer.model_max_length
        ids = self._ids(self._clip_tokenizer, captions, min(length, 77))
        clip = self._clip(ids).pooler_output
        t5 = self._t5(self._ids(self._t5_tokenizer, captions, text_len)).last_hidden_state
        return t5.float().cpu(), clip.float().cpu()

    def _ids(self, tokenizer: Any, captions: list[str], length: int) -> torch.Tensor:
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(captions, max_length=length, **options).input_ids.to(self._device)

    @torch.no_grad()
    def latents(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[batch, 3, height, width]` from -1 to 1 -> `[batch, 16, height / 8, width / 8]`."""
        encoded = self._vae.encode(pixels.to(self._device, self._dtype)).latent_dist.mode()
        config = self._vae.config
        return ((encoded - config.shift_factor) * config.scaling_factor).float().cpu()

    @torch.no_grad()
    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """Invert `latents`."""
        config = self._vae.config
        encoded = latents / config.scaling_factor + config.shift_factor
        return self._vae.decode(encoded.to(self._device, self._dtype)).sample.float().cpu()

    @property
    def scale(self) -> int:
        """Pixels of an image along each side of a place of the latents."""
        return 2 ** (len(self._vae.config.block_out_channels) - 1)


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
