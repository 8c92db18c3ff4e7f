"""`torchtitan download`: fetches weights, tokenizer and config from the Hugging Face hub."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import tyro

from torchtitan.config.options import parse_options, shown_as
from torchtitan.errors import ConfigError, DataError, outage_or
from torchtitan.tools.foreign_files import is_file
from torchtitan.tools.text import first_line, human_bytes

DESCRIPTION = """\
Download a model from the Hugging Face hub.

If the model needs a token, set HF_TOKEN in the environment.

After an interruption, the same command fetches the missing files."""

Part = Literal["weights", "tokenizer", "config"]
PARTS: dict[Part, tuple[str, ...]] = {
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "tokenizer": (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.*",
    ),
    "config": ("config.json", "generation_config.json"),
}
"""Part of a model -> patterns of its files."""


@dataclass
class Options:
    repo: Annotated[tyro.conf.Positional[str], shown_as("REPO")]
    """Such as HuggingFaceTB/SmolLM2-135M."""
    out: Annotated[Path | None, shown_as("DIR")] = None
    """Default: assets/NAME"""
    include: Annotated[tyro.conf.UseAppendAction[list[Part]], shown_as("PART")] = field(
        default_factory=list
    )
    """Fetch only this part: weights, tokenizer or config. Default: all three"""
    revision: Annotated[str | None, shown_as("R")] = None
    """Branch, tag or commit. Default: main"""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan download`; return the exit code."""
    options = parse_options(Options, argv, "torchtitan download", DESCRIPTION)
    out = options.out or Path("assets", options.repo.rpartition("/")[2])
    if is_file(out, ConfigError):
        raise ConfigError(f"--out {out} is a file, not a folder")
    patterns = [p for part in options.include or PARTS for p in PARTS[part]]
    _download(options.repo, options.revision, patterns, out)
    files = [path for pattern in patterns for path in out.glob(pattern) if path.is_file()]
    if not files:
        parts = ", ".join(options.include or PARTS)
        raise DataError(f"{options.repo} has no files for {parts} ({' '.join(patterns)})")
    size = human_bytes(sum(path.stat().st_size for path in files))
    sys.stdout.write(f"{out}: {len(files)} files, {size}\n")
    return 0


def _download(repo: str, revision: str | None, patterns: list[str], out: Path) -> None:
    """Fetch the files that are missing."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ConfigError(
            "torchtitan download needs huggingface_hub: pip install 'torchtitan[hub]'"
        ) from error
    try:
        huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"],  # patterns also match "/": skip other copies in subfolders
            local_dir=out,
        )
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} is not a model name of the form ORGANISATION/NAME") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{repo} has no revision {revision!r}") from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{repo} is open only to users who accepted its terms: accept them at "
            f"{_endpoint()}/{repo}, and {_token_hint()}"
        ) from error
    except errors.RepositoryNotFoundError as error:  # 404, and 401 for private ones
        raise DataError(
            f"{repo} does not exist at {_endpoint()}, or is private. Check the name; for a private "
            f"model, {_token_hint()}"
        ) from error
    except errors.HfHubHTTPError as error:
        _fail_with_status(repo, error)
    except (errors.LocalEntryNotFoundError, OSError) as error:
        _fail_unreachable(error)
    except Exception as error:
        # From the library that huggingface_hub uses: requests, httpx, httpx2, ...
        if type(error).__module__.startswith(("http", "requests", "urllib3")):
            _fail_unreachable(error)
        raise


def _fail_with_status(repo: str, error: Any) -> NoReturn:
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        problem = f"{_endpoint()} refuses access to {repo} (status {status}): {_token_hint()}"
        raise DataError(problem) from error
    problem = f"{_endpoint()} answers with status {status} for {repo}"
    raise outage_or(DataError, problem, error) from error


def _fail_unreachable(error: Exception) -> NoReturn:
    if isinstance(error, OSError) and error.filename:  # an error of the local disk
        problem = f"{error.filename} cannot be written: {error.strerror}"
        raise outage_or(DataError, problem, error) from error
    problem = (
        f"{_endpoint()} cannot be reached ({first_line(error.__cause__ or error)}). Is this "
        "machine online, and is HF_HUB_OFFLINE unset? HF_ENDPOINT selects another hub. Complete "
        "files are kept: the same command fetches the rest"
    )
    raise outage_or(DataError, problem, error) from error


def _token_hint() -> str:
    if os.environ.get("HF_TOKEN"):
        return "check the token in HF_TOKEN"
    return "set HF_TOKEN to your access token"


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
