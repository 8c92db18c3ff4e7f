"""Tokenizes a dataset into memory-mapped shards, by several processes, and goes on after a kill.

The documents are cut into ranges, a shard each, which does not depend on the number of processes.
A shard counts as done once its record is there, which is written last; what a killed process left
is written again. docs/data.md describes the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer, open_tokenizer
from torchtitan.errors import ConfigError, DataError, TitanError, begin_errors_with
from torchtitan.models.plugins import load_plugins

from .encode import Encoder, enclose, take
from .prepared_tokens import FORMAT, INDEX, VERSION, read_index
from .sources import RandomAccess, Sequential, Sharded, Source, has_random_access, open_dataset
from .whole_files import FileWriter, write_json, writing

SETTINGS = "prepare.json"
_BATCH_CHARACTERS = 2**20
_BATCH_DOCUMENTS = 1024
_MOST_SHARDS = 1024
"""Each rank may come to map all of them, two files each, and a mapping keeps its file open: 2,048
open files, half of the 4,096 that many systems allow a process at most: see `mapped.most_shards`.
With more, documents would open files anew again and again."""

logger = logging.getLogger("torchtitan")


@dataclass(frozen=True)
class Task:
    """What is prepared, and how."""

    dataset: str
    dataset_path: str | None
    text_key: str
    split: str | None
    tokenizer_path: str
    on_error: Literal["stop", "skip"]
    custom_import: str = ""
    add_bos: bool = False

    def encoder(self, tokenizer: BytesTokenizer | HuggingFaceTokenizer) -> Encoder:
        """Raises `DataError`, which names the option."""
        with begin_errors_with("--add-bos"):
            return Encoder(tokenizer, on_error=self.on_error, add_bos=self.add_bos)

    def open(self) -> tuple[Source, BytesTokenizer | HuggingFaceTokenizer]:
        """Raises `TitanError`, which names the option."""
        if self.custom_import:
            load_plugins(self.custom_import)
        with begin_errors_with("--tokenizer-path"):
            tokenizer = open_tokenizer(self.tokenizer_path)
        with begin_errors_with(f"--dataset {self.dataset}"):
            source = open_dataset(self.dataset, self.dataset_path, self.text_key, self.split)
        return source, tokenizer


@dataclass(frozen=True)
class Progress:
    """How far the preparation is."""

    shards_done: int
    shards: int
    documents: int
    tokens: int
    total_documents: int | None
    """None where a dataset does not know."""


def prepare(
    task: Task,
    out: Path,
    workers: int,
    shards: int | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the folder `out`, or what is missing of it. Returns its index.

    Args:
        task: what to prepare.
        out: folder; made if it is not there.
        workers: processes.
        shards: number of shards; None for one that suits the dataset, `_MOST_SHARDS` at most.
        show: called now and then.

    Raises:
        ConfigError: `out` holds something else, or cannot be written; or the dataset is a stream,
            whose files are the shards, and `shards` is another number.
        DataError: the dataset is missing, empty or malformed, or does not fit `add_bos`, or a
            process died.
    """
    source, tokenizer = task.open()
    total = _length(source)
    parts = _count_parts(source, total, shards)
    settings = {
        **{key: value for key, value in asdict(task).items() if key != "custom_import"},
        "tokenizer": _tokenizer_record(task, tokenizer),
        "source": _fingerprint(getattr(source, "files", []), total),
        "shards": parts,
    }
    encoder = task.encoder(tokenizer)
    if task.add_bos:
        encoder.check(source)  # else each process does so, but the folder is then begun
    if _is_finished(out, settings, old_source=_fingerprint([], total)):
        logger.info("%s is complete already", out)
        return read_index(out)
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"

    todo = [part for part in range(parts) if _record(out, part) is None]
    done = [record for part in range(parts) if (record := _record(out, part))]
    documents = sum(record["documents"] for record in done)
    tokens = sum(record["tokens"] for record in done)
    job = _Job(task, out, dtype, parts, todo, os.getpid())
    for new_shards, new_documents, new_tokens in _run(job, max(1, min(workers, len(todo)))):
        shards_done = len(done) + new_shards
        show(Progress(shards_done, parts, documents + new_documents, tokens + new_tokens, total))
    return _write_index(out, settings, dtype, parts)


@dataclass(frozen=True)
class _Job:
    """What the processes share out."""

    task: Task
    out: Path
    dtype: str
    parts: int
    todo: list[int]
    """Shards to write."""
    parent: int
    """The process that began it; without it the others end."""


def _run(job: _Job, workers: int) -> Iterator[tuple[int, int, int]]:
    """Have processes write the shards. Yields shards, documents and tokens done, now and then.

    Raises:
        TitanError: of a process; the others are stopped.
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
                if any(process.exitcode for process in processes):
                    raise DataError(
                        "a process of the preparation died (memory used up?). The same command "
                        "goes on with what is missing; --workers sets the number of processes"
                    ) from None
            yield done, counters[1], counters[2]
    finally:
        for process in processes:
            if done < len(job.todo):
                process.terminate()
            process.join()


def _work(job: _Job, counters: Any, messages: Any) -> None:
    """What a process does: write shards until none is left."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share out the cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends them
    try:
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


def _write_shard(job: _Job, part: int, source: Source, encoder: Encoder, counters: Any) -> None:
    """Write tokens, then ends, then the record; each file is there whole or not at all."""
    skipped, out = encoder.skipped, job.out
    name = f"shard-{part:05d}"
    ends, tokens = [], 0
    with FileWriter(out / f"{name}.bin") as file:
        for encoded in _encoded(_documents(source, part, job.parts), encoder):
            if os.getppid() != job.parent:  # killed; its shards may be another run's by now
                sys.exit(1)
            encoded = [ids for ids in encoded if len(ids)]
            for ids in encoded:
                encoder.require_bos(ids)
            if not encoded:
                continue
            lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
            ends.append(tokens + np.cumsum(lengths))
            tokens += int(lengths.sum())
            file.write(np.concatenate(encoded).astype(job.dtype))
            with counters.get_lock():
                counters[1] += len(encoded)
                counters[2] += int(lengths.sum())
    with FileWriter(out / f"{name}.idx") as index:
        all_ends = np.concatenate(ends) if ends else np.empty(0, np.int64)
        index.write(all_ends.astype("<i8"))
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
    """Those of one shard."""
    total = _length(source)
    if total is not None:
        for index in range(part * total // parts, (part + 1) * total // parts):
            yield take(cast(RandomAccess, source), index)
        return
    files = getattr(source, "num_shards", 1)
    if files == 1:
        yield from cast(Sequential, source)
        return
    for index in range(part * files // parts, (part + 1) * files // parts):
        yield from cast(Sharded, source).shard(index)


def _encoded(documents: Iterator[object], encoder: Encoder) -> Iterator[list[np.ndarray]]:
    """Batches of encoded documents, in order.

    Texts are handed to the tokenizer many at a time, which spares it most of its overhead.
    """
    encode_batch = getattr(encoder.tokenizer, "encode_batch", None)
    batch: list[Any] = []
    characters = 0

    def encode() -> list[np.ndarray]:
        if encode_batch is None or not all(type(d) is str and _is_unicode(d) for d in batch):
            return list(map(encoder, batch))
        texts = [text for text in batch if text]
        return [
            enclose(encoder.tokenizer, np.array(ids, np.int32), encoder.add_bos)
            for ids in encode_batch(texts)
        ]

    for document in documents:
        batch.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield encode()
            batch, characters = [], 0
    if batch:
        yield encode()


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finished(out: Path, settings: dict[str, Any], old_source: str) -> bool:
    """Whether `out` is complete. Makes it if it is not there.

    Args:
        out: folder.
        settings: of this preparation.
        old_source: the fingerprint that a folder of an earlier version may have instead, which did
            not look at the files of parquet, arrow, compressed lines and streams.

    Raises:
        ConfigError: it holds something else than a part of this preparation.
    """
    path = out / SETTINGS
    if path.is_file():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ConfigError(f"{path} is damaged; remove {out}") from error
        found.setdefault("add_bos", False)  # of a folder that was begun before there was the option
        if found.get("source") == old_source:
            found["source"] = settings["source"]
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"--out {out}: was begun with another {key} ({found.get(key)}; now "
                f"{settings[key]}). Give another folder, or remove it"
            )
        return (out / INDEX).is_file()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is not empty, and not a folder of prepared tokens")
    writing(lambda: out.mkdir(parents=True, exist_ok=True))
    write_json(path, settings)
    return False


def _record(out: Path, part: int) -> dict[str, Any] | None:
    """The record of a shard that is done."""
    path = out / f"shard-{part:05d}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write_index(out: Path, settings: dict[str, Any], dtype: str, parts: int) -> dict[str, Any]:
    shards: list[Any] = [_record(out, part) for part in range(parts)]  # all of them are done
    documents = sum(shard["documents"] for shard in shards)
    if documents == 0:
        raise DataError(f"--dataset {settings['dataset']}: empty: it has no document with text")
    index = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "documents": documents,
        "tokens": sum(shard["tokens"] for shard in shards),
        "skipped": sum(shard["skipped"] for shard in shards),
        "tokenizer": settings["tokenizer"],
        "add_bos": settings["add_bos"],
        "source": {key: settings[key] for key in ("dataset", "dataset_path", "text_key", "split")},
        "shards": shards,
    }
    write_json(out / INDEX, index)
    for part in range(parts):
        (out / f"shard-{part:05d}.json").unlink(missing_ok=True)
    return index


def _length(source: Source) -> int | None:
    return len(source) if has_random_access(source) else None


def _count_parts(source: Source, total: int | None, wanted: int | None) -> int:
    if total is None:  # its own files are the shards, or several of them are one
        own = min(getattr(source, "num_shards", 1), _MOST_SHARDS)
        if wanted not in (None, own):
            raise ConfigError(
                f"--shards {wanted}: has no effect here, as the dataset is read as a stream, which "
                f"gives as many shards as it has files ({own}). Leave it out"
            )
        return own
    if total == 0:
        raise DataError("the dataset is empty: it has no document with text")
    return min(total, wanted or min(max(64, total // 100_000), _MOST_SHARDS))


def _tokenizer_record(
    task: Task, tokenizer: BytesTokenizer | HuggingFaceTokenizer
) -> dict[str, Any]:
    return {
        "path": task.tokenizer_path,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        **({"bos_id": tokenizer.bos_id} if task.add_bos else {}),
    }


def _fingerprint(files: list[str], total: int | None) -> str:
    """Of the files' names, sizes and times, so that no shard is added to those of other data."""
    known = [(file, *_size_and_time(file)) for file in files]
    return hashlib.sha256(repr((known, total)).encode()).hexdigest()[:16]


def _size_and_time(file: str) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError:  # a URL
        return 0, 0
    return status.st_size, status.st_mtime_ns
