"""Warn of initial weights that were trained with another tokenizer than the run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.load import origin
from torchtitan.tools.foreign_files import parse_json
from torchtitan.tools.logging import logger

from .huggingface import TOKENIZER_FILES, initial_load_path
from .manifest import Manifest, is_hf_weights
from .model_identity import describe_tokenizer, tokenizer_difference


def warn_of_initial_weights(job_config: JobConfig, tokenizer: Any) -> None:
    """Warn if the initial weights of a new run do not go with its tokenizer."""
    path = initial_load_path(job_config)
    if path is None:
        return
    if not is_hf_weights(path):
        manifest = Manifest.read(path)
        if not manifest.is_converted:
            if other := tokenizer_difference(manifest.model, describe_tokenizer(tokenizer)):
                logger.warning(
                    "%s: the weights in %s were trained with the tokenizer %s, and this run uses "
                    "%s",
                    *(origin(job_config, "model.tokenizer_path"), path, *other),
                )
            return
        path = Path(manifest.model["tokenizer"])  # the Hugging Face folder that `convert` has read
    if isinstance(tokenizer, BytesTokenizer) and _has_other_tokenizer(path):
        logger.warning(
            "%s: the weights in %s were probably trained with the tokenizer in their folder, and "
            "are useless for bytes: set model.tokenizer_path to a local copy of that folder",
            *(origin(job_config, "model.tokenizer_path"), path),
        )
    if not job_config.data.add_bos and getattr(tokenizer, "adds_bos", False):
        logger.warning(
            "data.add_bos is false, but the tokenizer of %s begins texts with bos, so the weights "
            "in %s were probably trained with it: set data.add_bos = true",
            job_config.model.tokenizer_path,
            path,
        )


def _has_other_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer other than `bytes` as `last_save_in_hf` writes it."""
    try:
        theirs = parse_json((folder / TOKENIZER_FILES[0]).read_bytes())["model"]
        return len(theirs["vocab"]) != 256 or bool(theirs["merges"])
    except OSError:
        return False
    except (ValueError, LookupError, TypeError):  # not a file that we write
        return True
