"""`torchtitan convert`: converts checkpoints from and to Hugging Face, and inspects both."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.resume import saved_config
from torchtitan.errors import ConfigError, begin_errors_with
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.plugins import load_plugins
from torchtitan.models.which_model import model_of_checkpoint, model_of_hf_folder, model_of_options
from torchtitan.tools.run_folder import CONFIG_FILE
from torchtitan.tools.text import human_bytes, three_digits

from .from_hf import convert_from_hf
from .inspect import show
from .output import refuse_existing
from .to_hf import convert_to_hf

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `torchtitan convert`; return the exit code.

    Raises:
        ConfigError: an unknown model, or a custom import that fails.
        CheckpointError: see `convert_from_hf`, `convert_to_hf` and `inspect`.
    """
    args = _parser().parse_args(argv)
    load_plugins(args.custom_import)
    if args.action == "inspect":
        show(args.path)
        return 0
    if not args.source.is_dir():
        raise ConfigError(f"{args.source}: no such folder")
    refuse_existing(args.out)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    told = model_of_options(args.model, args.flavor)
    start = time.perf_counter()
    if args.action == "from-hf":
        known = model_of_hf_folder(args.source, told)
        written = convert_from_hf(args.source, args.out, known, dtype).nbytes
    else:
        if told is None:
            _load_models_of_run(args.source)
        known = model_of_checkpoint(args.source, told)
        written = convert_to_hf(args.source, args.out, known, dtype, args.tokenizer)
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{args.out}: {known}, {human_bytes(written)} in {three_digits(seconds)} s\n")
    return 0


def _load_models_of_run(checkpoint: Path) -> None:
    """Import the modules that a checkpoint's run imported, if its model is not known yet."""
    manifest = Manifest.read(checkpoint)
    if manifest.model.get("name") not in MODEL_REGISTRY:
        job = saved_config(checkpoint, manifest).get("job", {})
        with begin_errors_with(f"{checkpoint / CONFIG_FILE}"):
            load_plugins(job.get("custom_import", ""))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchtitan convert",
        description="Convert checkpoints from and to Hugging Face folders, and inspect both.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    from_hf = actions.add_parser("from-hf", help="make a checkpoint from a Hugging Face folder")
    from_hf.add_argument("source", type=Path, metavar="HF_DIR")
    from_hf.add_argument("out", type=Path, metavar="OUT", help="folder to make")

    to_hf = actions.add_parser(
        "to-hf", help="make a Hugging Face folder from a checkpoint (step-N)"
    )
    to_hf.add_argument("source", type=Path, metavar="CKPT")
    to_hf.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    to_hf.add_argument(
        "--tokenizer",
        metavar="bytes|FOLDER",
        help="tokenizer to include (default: the run's)",
    )

    inspect = actions.add_parser("inspect", help="list the tensors of either kind")
    inspect.add_argument("path", type=Path, metavar="PATH")
    for action in (from_hf, to_hf, inspect):
        action.add_argument(
            "--custom-import",
            "--job.custom_import",
            default="",
            metavar="MODULE",
            help="Python module to import first, so that it can register a model (default for "
            "to-hf: the run's)",
        )
    for action in (from_hf, to_hf):
        action.add_argument("--dtype", choices=DTYPES, help="default: each tensor keeps its dtype")
        action.add_argument("--model", metavar="NAME", help="model name, if not recorded there")
        action.add_argument("--flavor", metavar="F", help="flavor of --model")
    return parser
