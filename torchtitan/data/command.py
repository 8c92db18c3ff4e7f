"""`torchtitan data`: tokenize datasets, and inspect data."""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import Progress as ProgressBar

from torchtitan.config.options import parse_action, require_at_least_one, shown_as
from torchtitan.runtime.open_files import allow_open_files
from torchtitan.tools.logging import init_logger
from torchtitan.tools.text import duration, human

from .inspect import Inspect, inspect
from .kept_batch import show_batch
from .prepare import Prepare, Progress, prepare

DESCRIPTION = "Tokenize datasets, and inspect data."


@dataclass
class Batch:
    """Show a bad batch that a run kept."""

    folder: Annotated[tyro.conf.Positional[Path], shown_as("FOLDER")]
    """DUMP_FOLDER/bad_batches/batch-N."""
    tokenizer_path: Annotated[str | None, shown_as("PATH")] = None
    """Default: the run's tokenizer"""
    characters: Annotated[int, shown_as("N")] = 400
    """The most to show of a row."""


ACTIONS = {"prepare": Prepare, "inspect": Inspect, "batch": Batch}


def main(argv: list[str]) -> int:
    """Run the command with the arguments after `torchtitan data`; return the exit code."""
    options = parse_action(ACTIONS, argv, "torchtitan data", DESCRIPTION)
    init_logger()
    allow_open_files()  # the data may consist of thousands of memory-mapped files
    match options:
        case Prepare():
            return _prepare(options)
        case Inspect():
            inspect(options)
        case Batch(folder, tokenizer_path, characters):
            require_at_least_one(options, "characters")
            show_batch(folder, tokenizer_path, characters)
    return 0


def _prepare(options: Prepare) -> int:
    try:
        with _Bar() as bar:
            index = prepare(options, bar.show)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to prepare the missing shards\n")
        return 128 + signal.SIGINT
    skipped = f", {index['skipped']:,} documents skipped" if index["skipped"] else ""
    sys.stdout.write(
        f"{options.out}: {index['documents']:,} documents, {index['tokens']:,} tokens, "
        f"{len(index['shards'])} shards{skipped}\n"
    )
    return 0


class _Bar:
    """The progress of a preparation: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        columns = (BarColumn(30), "{task.percentage:4.0f}%", "{task.description}")
        self._bar = ProgressBar(*columns, console=console, auto_refresh=False)
        self._task = self._bar.add_task("", total=1.0)
        self._started = self._shown = time.monotonic()
        self._first_tokens: int | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._terminal:
            self._bar.stop()

    def show(self, progress: Progress) -> None:
        if self._first_tokens is None:
            self._first_tokens = progress.tokens
        now = time.monotonic()
        last = progress.shards_done == progress.shards
        if not (self._terminal or last or now - self._shown > 10):
            return
        self._shown = now
        total = progress.total_documents
        share = progress.documents / total if total else progress.shards_done / progress.shards
        share = 1.0 if last else min(share, 1.0)
        seconds = max(now - self._started, 1e-9)
        rate = (progress.tokens - self._first_tokens) / seconds
        text = (
            f"shard {progress.shards_done}/{progress.shards}  {human(progress.documents)} documents"
            f"  {human(progress.tokens)} tokens  {human(rate)} tok/s  {duration(seconds)}"
        )
        if self._terminal:
            self._bar.start()
            self._bar.update(self._task, completed=share, description=text, refresh=True)
        else:
            sys.stderr.write(f"{share:4.0%}  {text}\n")
