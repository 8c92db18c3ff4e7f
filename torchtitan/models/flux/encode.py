"""Encode images with captions for training: `python -m torchtitan.models.flux.encode`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from torchtitan.cli import exit_on_user_error, leave
from torchtitan.commands.convert.output import with_progress
from torchtitan.config.options import parse_options, require_at_least_one, shown_as
from torchtitan.errors import ConfigError, DataError, os_errors_as, outage_or
from torchtitan.tools.foreign_files import is_file, is_folder, read_text
from torchtitan.tools.result_file import make_folder

from .data import COLUMNS
from .encoders import Encoders, device_of, pixels_of_patch

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Options:
    images: Annotated[tyro.conf.Positional[Path], shown_as("IMAGES")]
    """Folder of images. The caption of NAME.jpg is in NAME.txt, or in metadata.jsonl as
    {"file_name": ..., "text": ...}."""
    encoders: Annotated[Path, shown_as("FOLDER")]
    """Local folder of a release of FLUX.1, with model_index.json; the transformer is not read."""
    out: Annotated[Path, shown_as("FOLDER")]
    """Folder for the parquet file."""
    width: Annotated[int, shown_as("PIXELS")] = 1024
    """Images are scaled to cover this size, and cut to it around their center."""
    height: Annotated[int, shown_as("PIXELS")] = 1024
    """As width."""
    text_len: Annotated[int, shown_as("N")] = 512
    """T5 states of a caption: 512 for flux-dev, 256 for flux-schnell."""
    batch_size: Annotated[int, shown_as("N")] = 8
    """Images that are encoded at once."""
    shard: Annotated[int, shown_as("I")] = 0
    """Which of the shards to encode, from 0; several GPUs can encode one each."""
    shards: Annotated[int, shown_as("N")] = 1
    """Number of shards, into which the images are divided."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the encoders."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the encoders."""


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Run the command with these arguments; return the exit code."""
    description = "Encode images with captions for the training of flux."
    options = parse_options(Options, argv, "encode", description)
    require_at_least_one(options, "width", "height", "text_len", "batch_size", "shards")
    if not 0 <= options.shard < options.shards:
        raise ConfigError(f"--shard {options.shard}: must be from 0 to {options.shards - 1}")
    device = device_of(options.device)
    every = captioned(options.images)
    chosen = every[options.shard :: options.shards]
    if not chosen:
        raise ConfigError(f"--shards {options.shards}: there are only {len(every)} images")
    make_folder(options.out, "--out")
    encoders = Encoders(options.encoders, device, getattr(torch, options.dtype))
    unit = pixels_of_patch(encoders, options.width, options.height)
    path = options.out / f"part-{options.shard:05}-of-{options.shards:05}.parquet"
    with os_errors_as(ConfigError, f"--out {path}: cannot write there"):
        write(path, chosen, encoders, options)
    patches = options.width * options.height // unit**2
    sys.stdout.write(f"{path}: {len(chosen)} images, training.seq_len = {patches}\n")
    return 0


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of a folder and their captions, sorted. Raises `DataError`."""
    if not is_folder(folder, DataError):
        raise DataError(f"{folder}: no such folder")
    captions: dict[Path, str] = {}
    if is_file(listed := folder / "metadata.jsonl", DataError):
        # str.splitlines would also split at U+2028 and others, which JSON text may contain.
        for number, line in enumerate(read_text(listed, DataError).split("\n"), start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
                captions[folder / fields["file_name"]] = str(fields["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{listed}:{number}: no file_name and text ({error})") from error
    else:
        for path in folder.rglob("*"):
            if path.suffix.lower() in IMAGES:
                captions[path] = _caption_beside(path)
    if not captions:
        raise DataError(f"{folder}: there are no images ({', '.join(IMAGES)})")
    return sorted(captions.items())


def _caption_beside(path: Path) -> str:
    try:
        return path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise outage_or(DataError, f"{path} has no caption: {error}", error) from error


def pixels_of(path: Path, width: int, height: int) -> torch.Tensor:
    """Return an image, scaled and cut, `[3, height, width]` from -1 to 1."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            array = np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS))
    except OSError as error:
        raise outage_or(DataError, f"{path} cannot be read: {error}", error) from error
    return torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1


def write(path: Path, images: list[tuple[Path, str]], encoders: Encoders, options: Options) -> None:
    """Write a row of each image. The file appears when it is complete."""
    import pyarrow as pa
    from pyarrow import parquet

    partial, writer = path.with_suffix(".partial"), None
    starts = range(0, len(images), options.batch_size)
    for start in with_progress(starts, len(starts)):
        files, captions = zip(*images[start : start + options.batch_size], strict=True)
        pixels = torch.stack([pixels_of(f, options.width, options.height) for f in files])
        values = encoders.latents(pixels), *encoders.text(list(captions), options.text_len)
        table = pa.table(dict(zip(COLUMNS, map(column, values), strict=True)))
        writer = writer or parquet.ParquetWriter(partial, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
        partial.rename(path)


def column(values: torch.Tensor) -> Any:
    """Return a column of Arrow, `[rows, ...]`, in float16."""
    import pyarrow as pa

    nested = pa.array(values.half().numpy().ravel())
    for size in reversed(values.shape[1:]):
        nested = pa.FixedSizeListArray.from_arrays(nested, size)
    return nested


if __name__ == "__main__":
    leave(main)
