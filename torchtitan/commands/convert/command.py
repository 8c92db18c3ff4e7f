"""`torchtitan convert`: converts checkpoints from and to Hugging Face, and inspects both."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.storage import local_path
from torchtitan.components.run_folder import CONFIG_FILE
from torchtitan.config.options import parse_action, shown_as
from torchtitan.errors import ConfigError, begin_errors_with
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.plugins import load_plugins
from torchtitan.models.which_model import model_of_checkpoint, model_of_hf_folder, model_of_options
from torchtitan.tools.foreign_files import is_folder
from torchtitan.tools.text import human_bytes, three_digits

from .dequantize import dequantize
from .from_hf import convert_from_hf
from .inspect import show
from .output import refuse_existing
from .to_hf import convert_to_hf

DESCRIPTION = "Convert checkpoints from and to Hugging Face folders, and inspect both."


@dataclass
class _Conversion:
    source: str
    out: Annotated[tyro.conf.Positional[str], shown_as("OUT")]
    """Folder to make."""
    custom_import: Annotated[str, shown_as("MODULE", "--job.custom-import")] = ""
    """Python module to import first, to register a model."""
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, shown_as("DTYPE")] = None
    """float32, bfloat16 or float16. Default: each tensor keeps its dtype"""
    model: Annotated[str | None, shown_as("NAME")] = None
    """Model name, if not recorded there."""
    flavor: Annotated[str | None, shown_as("F")] = None
    """Flavor of --model."""


@dataclass
class FromHf(_Conversion):
    """Make a checkpoint from a Hugging Face folder."""

    source: Annotated[tyro.conf.Positional[str], shown_as("HF_DIR")]
    """Folder with safetensors and config.json."""


@dataclass
class ToHf(_Conversion):
    """Make a Hugging Face folder from a checkpoint (step-N)."""

    source: Annotated[tyro.conf.Positional[str], shown_as("CKPT")]
    """Checkpoint (step-N)."""
    custom_import: Annotated[str, shown_as("MODULE", "--job.custom-import")] = ""
    """Python module to import first, to register a model. Default: the run's"""
    tokenizer: Annotated[str | None, shown_as("bytes|FOLDER")] = None
    """Tokenizer to include. Default: the run's"""


@dataclass
class Dequantize:
    """Make a Hugging Face folder in bfloat16 of one in FP8 (DeepSeek-V3) or MXFP4 (gpt-oss)."""

    source: Annotated[tyro.conf.Positional[str], shown_as("HF_DIR")]
    """Folder with safetensors and config.json."""
    out: Annotated[tyro.conf.Positional[str], shown_as("OUT")]
    """Folder to make."""


@dataclass
class Inspect:
    """List the tensors of either kind."""

    path: Annotated[tyro.conf.Positional[str], shown_as("PATH")]
    """Checkpoint or Hugging Face folder."""
    custom_import: Annotated[str, shown_as("MODULE", "--job.custom-import")] = ""
    """Python module to import first, so that it can register a model."""


ACTIONS = {"from-hf": FromHf, "to-hf": ToHf, "dequantize": Dequantize, "inspect": Inspect}


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan convert`; return the exit code."""
    options = parse_action(ACTIONS, argv, "torchtitan convert", DESCRIPTION)
    if not isinstance(options, Dequantize):
        load_plugins(options.custom_import)
    if isinstance(options, Inspect):
        show(local_path(options.path))
        return 0
    source, out = local_path(options.source), local_path(options.out)
    if not is_folder(source, ConfigError):
        raise ConfigError(f"{source}: no such folder")
    refuse_existing(out)
    start = time.perf_counter()
    if isinstance(options, Dequantize):
        what, written = "bfloat16", dequantize(source, out)
    else:
        what, written = _convert(options, source, out)
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{out}: {what}, {human_bytes(written)} in {three_digits(seconds)} s\n")
    return 0


def _convert(options: FromHf | ToHf, source: Path, out: Path) -> tuple[str, int]:
    """Return the name of the model, and the bytes written."""
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    told = model_of_options(options.model, options.flavor)
    if isinstance(options, FromHf):
        known = model_of_hf_folder(source, told)
        return str(known), convert_from_hf(source, out, known, dtype).nbytes
    if told is None:
        _load_models_of_run(source)
    known = model_of_checkpoint(source, told)
    return str(known), convert_to_hf(source, out, known, dtype, options.tokenizer)


def _load_models_of_run(checkpoint: Path) -> None:
    """Import the modules that a checkpoint's run imported, if its model is not known yet."""
    manifest = Manifest.read(checkpoint)
    if manifest.model.get("name") not in MODEL_REGISTRY:
        job = manifest.read_config(checkpoint).get("job", {})
        with begin_errors_with(f"{checkpoint / CONFIG_FILE}"):
            load_plugins(job.get("custom_import", ""))
