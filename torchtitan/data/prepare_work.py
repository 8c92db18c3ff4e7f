"""The worker processes of `torchtitan data prepare`: each takes shards until none is left."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer, open_tokenizer
from torchtitan.config.options import shown_as
from torchtitan.errors import DataError, TitanError, begin_errors_with
from torchtitan.models.plugins import load_plugins
from torchtitan.tools.hardware import cores
from torchtitan.tools.text import is_unicode

from .encode import Encoder
from .huggingface import Streams, opening_once
from .sources import Source, has_random_access, num_shards, open_dataset, shard_of, take
from .whole_files import FileWriter, write_json

_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True)
class Prepare:
    """Tokenize a dataset into memory-mapped shards."""

    out: Annotated[Path, shown_as("FOLDER")]
    """For the shards and their index; created if it does not exist."""
    dataset: Annotated[str, shown_as("NAME")] = "text"
    """As in training.dataset."""
    dataset_path: Annotated[str | None, shown_as("PATH")] = None
    """As in training.dataset_path."""
    text_key: Annotated[str, shown_as("KEY")] = "text"
    """As in training.text_key."""
    split: Annotated[str | None, shown_as("NAME")] = None
    """As in training.split."""
    tokenizer_path: Annotated[str, shown_as("PATH")] = "bytes"
    """As in model.tokenizer_path."""
    add_bos: bool = False
    """As in data.add_bos."""
    workers: Annotated[int, shown_as("N")] = field(default_factory=cores)
    """Processes; by default one per core."""
    shards: Annotated[int | None, shown_as("N")] = None
    """Number of shards. Default: 64, up to 1024 for large data; for a stream, one per file"""
    on_error: Literal["stop", "skip"] = "stop"
    """On a malformed document, stop or skip it."""
    custom_import: Annotated[str, shown_as("MODULE")] = ""
    """Python module to import first, so that it can register a dataset."""

    def encoder(self, tokenizer: BytesTokenizer | HuggingFaceTokenizer) -> Encoder:
        """Create the encoder. Raises `DataError`, which names the option."""
        with begin_errors_with("--add-bos"):
            return Encoder(tokenizer, on_error=self.on_error, add_bos=self.add_bos)

    def open(self) -> tuple[Source, BytesTokenizer | HuggingFaceTokenizer]:
        """Open the source and the tokenizer. Raises `TitanError`, which names the option."""
        load_plugins(self.custom_import)
        with begin_errors_with("--tokenizer-path"):
            tokenizer = open_tokenizer(self.tokenizer_path)
        with begin_errors_with(f"--dataset {self.dataset}"):
            source = open_dataset(self.dataset, self.dataset_path, self.text_key, self.split)
        return source, tokenizer


@dataclass(frozen=True)
class Job:
    """The work that the processes divide among them."""

    task: Prepare
    streams: Streams
    """What the parent has opened of the hub, which refuses too many requests: see `build`."""
    dtype: str
    parts: int
    todo: list[int]
    """Shards to write."""
    parent: int
    """The process that began the job; when it is gone, the workers end."""


def write_shards(job: Job, workers: int) -> Iterator[tuple[int, int, int]]:
    """Write the shards by several processes. Yield shards, documents and tokens done, now and then.

    Raises:
        TitanError: a process raised it; the others are stopped.
    """
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    counters = context.Array("q", 3)  # shards begun, documents, tokens
    messages = context.Queue()
    processes = [
        context.Process(target=_work, args=(job, counters, messages), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    done = 0
    try:
        while done < len(job.todo):
            try:
                error = messages.get(timeout=0.2)
                if error is not None:
                    raise error
                done += 1
            except queue.Empty:
                if dead := [process for process in processes if process.exitcode]:
                    raise DataError(_how_it_died(dead[0].exitcode)) from None
            yield done, counters[1], counters[2]
    finally:
        for process in processes:
            if done < len(job.todo):
                process.terminate()
            process.join()


def _work(job: Job, counters: Any, messages: Any) -> None:
    """Run a worker process: write shards until none is left."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them
    try:
        with opening_once(job.streams):
            source, tokenizer = job.task.open()
        encoder = job.task.encoder(tokenizer)
        encoder.check(source)
        while True:
            with counters.get_lock():
                turn = counters[0]
                counters[0] += 1
            if turn >= len(job.todo):
                return
            _write_shard(job, job.todo[turn], source, encoder, counters)
            messages.put(None)
    except TitanError as error:
        messages.put(type(error)(str(error)))
    except Exception as error:
        traceback.print_exc()
        messages.put(DataError(f"a worker process failed: {error!r}; see above"))


def _how_it_died(code: int) -> str:
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
    else:
        how = f"ended with exit code {code}"
    return (
        f"a worker process {how}. Run the same command again to prepare the missing shards; "
        "--workers sets the number of processes"
    )


def _write_shard(job: Job, part: int, source: Source, encoder: Encoder, counters: Any) -> None:
    """Write tokens, then ends, then the record; each file is written atomically."""
    skipped, out = encoder.skipped, job.task.out
    name = f"shard-{part:05d}"
    ends, tokens = [], 0
    with FileWriter(out / f"{name}.bin") as file:
        for encoded in _encoded(_documents(source, part, job.parts), encoder):
            # the parent was killed; another run may own the shards by now
            if os.getppid() != job.parent:
                sys.exit(1)
            encoded = [ids for ids in encoded if len(ids)]
            for ids in encoded:
                encoder.require_bos(ids)
            if not encoded:
                continue
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
            ends.append(tokens + np.cumsum(lengths))
            tokens += int(lengths.sum())
            ids = np.concatenate(encoded)
            written = ids.astype(job.dtype)
            if (written != ids).any():
                raise DataError(
                    f"a document of the dataset has token ids from {ids.min()} to {ids.max()}. "
                    f"Prepared tokens are from 0 to {np.iinfo(job.dtype).max}"
                )
            file.write(written.tobytes())
            with counters.get_lock():
                counters[1] += len(encoded)
                counters[2] += int(lengths.sum())
    with FileWriter(out / f"{name}.idx") as index:
        all_ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
        index.write(all_ends.astype("<i8").tobytes())
    record = {
        "name": name,
        "documents": len(all_ends),
        "tokens": tokens,
        "skipped": encoder.skipped - skipped,
        "bin_sha256": file.sha256,
        "idx_sha256": index.sha256,
    }
    write_json(out / f"{name}.json", record)


def _documents(source: Source, part: int, parts: int) -> Iterator[object]:
    """Yield the documents of one shard."""
    if has_random_access(source):
        total = len(source)
        for index in range(part * total // parts, (part + 1) * total // parts):
            yield take(source, index)
    else:
        files = num_shards(source)
        for index in range(part * files // parts, (part + 1) * files // parts):
            yield from shard_of(source, index)


def _encoded(documents: Iterator[object], encoder: Encoder) -> Iterator[list[np.ndarray]]:
    """Yield batches of encoded documents, in order.

    The tokenizer gets many texts at a time, which avoids most of its overhead.
    """
    encode_batch = getattr(encoder.tokenizer, "encode_batch", None)
    batch: list[Any] = []
    characters = 0

    def encode() -> list[np.ndarray]:
        if encode_batch is None or not all(type(d) is str and is_unicode(d) for d in batch):
            return list(map(encoder, batch))
        texts = [text for text in batch if text]
        return [encoder.enclose(np.array(ids, np.int32)) for ids in encode_batch(texts)]

    for document in documents:
        batch.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield encode()
            batch, characters = [], 0
    if batch:
        yield encode()
