"""Make images of captions: `python -m torchtitan.models.flux.sample`."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from torchtitan.cli import exit_on_user_error, leave
from torchtitan.components.checkpoint.manifest import is_hf_weights
from torchtitan.config.options import parse_options, require_at_least_one, shown_as
from torchtitan.errors import CheckpointError, ConfigError, os_errors_as
from torchtitan.models.which_model import model_of_checkpoint, model_of_hf_folder
from torchtitan.tools.result_file import make_folder

from .data import unpack
from .encoders import Encoders, as_bytes, device_of, pixels_of_patch
from .model.model import GUIDANCE_UNITS, TIME_UNITS, FluxModel
from .shapes import ShapeEncoders


@dataclass
class Options:
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], shown_as("CAPTION")]
    """Captions, of an image each."""
    checkpoint: Annotated[Path, shown_as("FOLDER")]
    """A checkpoint (step-N), or a Hugging Face folder, such as the subfolder transformer of a
    release."""
    encoders: Annotated[str, shown_as("FOLDER")]
    """Local folder of a release, see encode. Or: shapes, for a model of drawings."""
    out: Annotated[Path, shown_as("FOLDER")]
    """Folder for the images."""
    width: Annotated[int, shown_as("PIXELS")] = 1024
    """Size of the images."""
    height: Annotated[int, shown_as("PIXELS")] = 1024
    """As width."""
    steps: Annotated[int, shown_as("N")] = 50
    """Steps from noise to image: 4 for the released [schnell]."""
    guidance: float = 3.5
    """What a model with guidance (dev) is told."""
    cfg: float = 1.0
    """Classifier-free guidance: above 1, each step goes further away from an image of no text. For
    models that were trained with text_dropout, not for the released ones."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of all models."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of all models."""


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments; return the exit code."""
    options = parse_options(Options, argv, "sample", "Make images of captions.")
    require_at_least_one(options, "width", "height", "steps")
    if not options.prompts:
        raise ConfigError("there is no caption: sample 'a red square' --checkpoint ...")
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("images need the package Pillow: pip install pillow") from error
    device, dtype = device_of(options.device), getattr(torch, options.dtype)
    make_folder(options.out, "--out")
    model = load(options.checkpoint).to(device, dtype)
    encoders: Encoders | ShapeEncoders = ShapeEncoders(model.args)
    if options.encoders != "shapes":
        encoders = Encoders(Path(options.encoders), device, dtype)
    unit = pixels_of_patch(encoders, options.width, options.height)
    for number, prompt in enumerate(options.prompts):
        t5, clip = encoders.text([prompt], model.args.text_len)
        width, height = options.width // unit, options.height // unit
        random = torch.Generator().manual_seed(options.seed + number)
        noise = torch.randn(1, width * height, model.args.channels, generator=random)
        times = schedule(options.steps, width * height if model.args.guidance else None)
        inputs = {"guidance": options.guidance, "cfg": options.cfg}
        patches = denoise(model, noise.to(device), times, t5, clip, width, **inputs)
        (pixels,) = encoders.pixels(unpack(patches[0].cpu(), width)[None])
        path = options.out / f"{number:05}.png"
        with os_errors_as(ConfigError, f"--out {path}: cannot write there"):
            Image.fromarray(as_bytes(pixels)).save(path)
        sys.stdout.write(f"{path}: {prompt}\n")
    return 0


def load(folder: Path) -> FluxModel:
    """Return the model of a checkpoint, in eval mode. Raises `CheckpointError`."""
    known = model_of_hf_folder(folder) if is_hf_weights(folder) else model_of_checkpoint(folder)
    if not issubclass(known.spec.model_cls, FluxModel):
        raise CheckpointError(f"{folder} is of {known}, which makes no images")
    model: Any = known.build().load_checkpoint(folder)
    return model.eval()


def schedule(steps: int, patches: int | None = None) -> list[float]:
    """Return the times of `steps` steps, from 1 to 0.

    Args:
        patches: of an image, to shift the times as FLUX.1 [dev] does; None: evenly.
    """
    times = [1 - step / steps for step in range(steps)]
    if patches is not None:
        strength = math.exp(0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256))
        times = [strength / (strength + (1 / time - 1)) for time in times]
    return [*times, 0.0]


@torch.no_grad()
def denoise(
    model: FluxModel,
    noise: torch.Tensor,
    times: list[float],
    text: torch.Tensor,
    pooled: torch.Tensor,
    width: int,
    guidance: float = 3.5,
    cfg: float = 1.0,
) -> torch.Tensor:
    """Follow the model's velocity from noise to an image by Euler steps.

    Args:
        noise: `[batch, patches, channels]` float32.
        times: from 1 to 0.
        text: `[batch, text, text_dim]`.
        pooled: `[batch, pooled_dim]`.
        width: patches in a row.
        cfg: see `Options`.

    Returns:
        `[batch, patches, channels]`.
    """
    dtype, device = model.image_in.weight.dtype, noise.device
    text, pooled = text.to(device, dtype), pooled.to(device, dtype)

    def batch_of(number: float) -> torch.Tensor:
        return torch.full((len(noise),), round(number), device=device)

    def velocity(time: float, keeps: bool) -> Any:
        return model(
            image.to(dtype),
            text=text * keeps,
            pooled=pooled * keeps,
            times=batch_of(time * TIME_UNITS),
            widths=batch_of(width),
            guidance=batch_of(guidance * GUIDANCE_UNITS),
        ).float()

    image = noise
    for time, following in pairwise(times):
        change = velocity(time, True)
        if cfg != 1:
            without = velocity(time, False)
            change = without + cfg * (change - without)
        image = image + (following - time) * change
    return image


if __name__ == "__main__":
    leave(main)
