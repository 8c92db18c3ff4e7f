"""`torchtitan data`: tokenize datasets, and inspect data."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from torchtitan.runtime.open_files import allow_open_files
from torchtitan.tools.logging import init_logger
from torchtitan.tools.options import positive
from torchtitan.tools.text import duration, human

from .inspect import inspect
from .kept_batch import show_batch
from .prepare import Progress, Task, prepare


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments after `torchtitan data`; return the exit code.

    Raises:
        TitanError: an option, the data or the tokenizer is wrong.
    """
    options = vars(_parser().parse_args(argv))
    init_logger()
    allow_open_files()  # the data may consist of thousands of memory-mapped files
    command = options.pop("command")  # the other options are the arguments of its function
    if command == "prepare":
        return _prepare(**options)
    if command == "inspect":
        inspect(**options)
    else:
        show_batch(**options)
    return 0


def _prepare(out: Path, workers: int, shards: int | None, **task: Any) -> int:
    try:
        with _Bar() as bar:
            index = prepare(Task(**task), out, workers, shards, bar.show)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run the same command again to prepare the missing shards\n")
        return 128 + signal.SIGINT
    skipped = f", {index['skipped']:,} documents skipped" if index["skipped"] else ""
    sys.stdout.write(
        f"{out}: {index['documents']:,} documents, {index['tokens']:,} tokens, "
        f"{len(index['shards'])} shards{skipped}\n"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torchtitan data", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("prepare", help="tokenize a dataset into memory-mapped shards")
    one.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for the shards and their index"
    )
    one.add_argument("--dataset", default="text", help="as in training.dataset (default: text)")
    one.add_argument("--dataset-path", metavar="PATH", help="as in training.dataset_path")
    _add_fields(one)
    one.add_argument("--tokenizer-path", default="bytes", help="as in model.tokenizer_path")
    one.add_argument("--add-bos", action="store_true", help="as in data.add_bos")
    one.add_argument(
        "--workers", type=positive, default=_cores(), help="processes (default: one per core)"
    )
    one.add_argument(
        "--shards",
        type=positive,
        metavar="N",
        help="number of shards (default: 64, up to 1024 for large data; a stream gets one shard "
        "per file)",
    )
    one.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="on a malformed document, stop or skip it (default: stop)",
    )
    _add_import(one)

    two = commands.add_parser("inspect", help="show statistics and decoded samples of data")
    two.add_argument(
        "path",
        nargs="?",
        default="",
        metavar="PATH",
        help="prepared tokens, or the path of --dataset",
    )
    two.add_argument("--dataset", default="tokens", help="as in training.dataset (default: tokens)")
    _add_fields(two)
    two.add_argument("--tokenizer-path", help="default: the one the tokens were prepared with")
    two.add_argument(
        "--samples", type=positive, default=3, metavar="N", help="documents to show (default: 3)"
    )
    two.add_argument(
        "--characters", type=positive, default=400, metavar="N", help="per sample (default: 400)"
    )
    two.add_argument("--verify", action="store_true", help="check the content hashes first")
    two.add_argument("--chat-template", metavar="FILE", help="as in data.chat_template")
    _add_import(two)

    three = commands.add_parser("batch", help="show a bad batch that a run kept")
    three.add_argument(
        "folder", type=Path, metavar="FOLDER", help="DUMP_FOLDER/bad_batches/batch-N"
    )
    three.add_argument("--tokenizer-path", help="default: the run's tokenizer")
    three.add_argument(
        "--characters", type=positive, default=400, metavar="N", help="per row (default: 400)"
    )
    return parser


def _add_fields(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-key", default="text", help="as in training.text_key (default: text)"
    )
    parser.add_argument("--split", help="as in training.split")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--custom-import",
        default="",
        metavar="MODULE",
        help="Python module to import first, so that it can register a dataset",
    )


def _cores() -> int:
    """Count the cores that this process may use: a job often has a share of a large host."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Bar:
    """The progress of a preparation: a bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._terminal = self._console.is_terminal
        self._started = self._shown = time.monotonic()
        self._first_tokens: int | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._live.is_started:
            self._live.stop()

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
        if not self._terminal:
            sys.stderr.write(f"{share:4.0%}  {text}\n")
            return
        if not self._live.is_started:
            self._live.start()
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=1.0, completed=share, width=30), f"{share:4.0%}", text)
        self._live.update(grid, refresh=True)
