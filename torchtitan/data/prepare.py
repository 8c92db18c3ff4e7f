"""Tokenizes a dataset into memory-mapped shards, by several processes, and resumes after a kill.

The documents are cut into ranges, one for each shard, regardless of the number of processes. A
shard's record is written last, and a shard is done once its record exists; unfinished shards of a
killed process are written again. docs/data.md describes the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtitan.config.options import require_at_least_one
from torchtitan.errors import ConfigError, DataError
from torchtitan.tools.foreign_files import exists, is_file, is_folder, parse_json, read_bytes
from torchtitan.tools.logging import logger

from .huggingface import Streams, opening_once
from .piece_ends import try_lock
from .prepare_work import Job, Prepare, write_shards
from .prepared_tokens import FORMAT, INDEX, VERSION, read_index
from .sources import Source, num_shards, size_of
from .whole_files import write_json, writing

SETTINGS = "prepare.json"
_NO_SETTINGS = ("out", "workers", "shards", "custom_import")
"""Options that may change when a preparation goes on; but the number of shards may not."""
_MOST_SHARDS = 1024
"""Each rank may map all of them, two files each, and a mapping keeps its file open: 2,048 open
files, half of the 4,096 that many systems allow a process at most: see `mapped.most_shards`. With
more shards, files would be reopened for documents again and again."""
_PATIENCE = 2.0
"""Seconds to wait for a lock: the workers of a killed process end after a moment."""


@dataclass(frozen=True)
class Progress:
    """Progress of a preparation."""

    shards_done: int
    documents: int
    tokens: int
    shards: int
    total_documents: int | None
    """None if the size of the dataset is unknown."""


def prepare(
    task: Prepare, show: Callable[[Progress], None] = lambda progress: None
) -> dict[str, Any]:
    """Write the missing parts of the folder `task.out`, or all of it. Return its index.

    `show` is called now and then.

    Raises:
        ConfigError: a number is below 1; or `out` holds something else, or cannot be written; or
            the dataset is a stream, whose files are the shards, and `shards` is not their number.
        DataError: the dataset is missing, empty or malformed, or does not fit `add_bos`, or a
            process died.
    """
    require_at_least_one(task, "workers", "shards")
    streams: Streams = {}
    with opening_once(streams):
        source, tokenizer = task.open()
    out, total = task.out, size_of(source).get("documents")
    parts = _count_parts(source, total, task.shards)
    settings = {
        **{key: value for key, value in asdict(task).items() if key not in _NO_SETTINGS},
        "tokenizer": {
            "path": task.tokenizer_path,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            **({"bos_id": tokenizer.bos_id} if task.add_bos else {}),
        },
        "source": _fingerprint(getattr(source, "files", []), total),
        "shards": parts,
    }
    encoder = task.encoder(tokenizer)
    if task.add_bos:
        encoder.check(source)  # otherwise each process would fail, after the folder is begun
    if _is_finished(out, settings):
        logger.info("%s is complete already", out)
        return read_index(out)
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    with _lock(out):
        if _is_finished(out, settings):  # by another process
            return read_index(out)
        records = [_record(out, part) for part in range(parts)]
        todo = [part for part, record in enumerate(records) if record is None]
        done = [record for record in records if record is not None]
        documents = sum(record["documents"] for record in done)
        tokens = sum(record["tokens"] for record in done)
        job = Job(task, streams, dtype, parts, todo, os.getpid())
        for shards, more, more_tokens in write_shards(job, min(task.workers, len(todo))):
            show(Progress(len(done) + shards, documents + more, tokens + more_tokens, parts, total))
        return _write_index(out, settings, dtype, parts)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Lock a folder and remove leftovers of killed processes. Raises `ConfigError` if it is locked.

    The lock is held until this process and its forked workers have ended, however they end. On a
    file system without locks, two processes may write the folder; each uses its own file names, and
    they write the same contents.
    """
    path, deadline = out / "prepare.lock", time.monotonic() + _PATIENCE
    with writing(path):
        file = path.open("wb")
    with file:
        try:
            while not (free := try_lock(file)) and time.monotonic() < deadline:
                time.sleep(0.05)
        except OSError:
            free = None
        if free is False:
            raise ConfigError(
                f"--out {out}: another `torchtitan data prepare` is writing it. Wait for it, or "
                "stop it first: this command then prepares the missing shards"
            )
        for partial in out.glob("*.partial") if free else ():
            partial.unlink(missing_ok=True)
        yield
        # Not after a failure: who waits for the file would hold one that others no longer find.
        path.unlink(missing_ok=True)


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` is complete. Creates `out` if it does not exist.

    Raises:
        ConfigError: `out` holds something other than a part of this preparation.
    """
    path = out / SETTINGS
    if is_file(path, ConfigError):
        try:
            found = parse_json(read_bytes(path, ConfigError))
        except ValueError as error:
            raise ConfigError(f"{path} is damaged; remove {out}") from error
        if not isinstance(found, dict):
            raise ConfigError(f"{path} is damaged; remove {out}")
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise ConfigError(
                f"--out {out}: was started with a different {key} ({found.get(key)}; now "
                f"{settings[key]}). Give another folder, or remove it"
            )
        return is_file(out / INDEX, ConfigError)
    is_new = not exists(out, ConfigError)
    if not is_new and not (is_folder(out, ConfigError) and all(map(_is_begun, out.iterdir()))):
        raise ConfigError(f"--out {out}: is neither empty nor a folder of prepared tokens")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
    return False


def _is_begun(path: Path) -> bool:
    """Whether a file may be in a folder that a preparation has just created."""
    return path.name.startswith("prepare.") and path.name.endswith((".partial", ".lock"))


def _record(out: Path, part: int) -> dict[str, Any] | None:
    """Return the record of a shard, None if it is not done."""
    path = out / f"shard-{part:05d}.json"
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def _write_index(out: Path, settings: dict[str, Any], dtype: str, parts: int) -> dict[str, Any]:
    shards: list[Any] = [_record(out, part) for part in range(parts)]  # all shards are done
    if None in shards and is_file(out / INDEX, ConfigError):
        return read_index(out)  # another process wrote the same, and removed the records
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


def _count_parts(source: Source, total: int | None, wanted: int | None) -> int:
    if total is None:  # its own files are the shards, or several files are one shard
        own = min(num_shards(source), _MOST_SHARDS)
        if wanted not in (None, own):
            raise ConfigError(
                f"--shards {wanted}: has no effect on a dataset that is read as a stream, which "
                f"gives one shard per file ({own}). Leave it out"
            )
        return own
    if total == 0:
        raise DataError("the dataset is empty: it has no document with text")
    return min(total, wanted or min(max(64, total // 100_000), _MOST_SHARDS))


def _fingerprint(files: list[str], total: int | None) -> str:
    """Digest names, sizes and times, so that no shard is added to shards of other data."""
    known = []
    for file in files:
        version = 0, 0
        with suppress(OSError):  # as of a URL
            status = os.stat(file)
            version = status.st_size, status.st_mtime_ns
        known.append((file, *version))
    return hashlib.sha256(repr((known, total)).encode()).hexdigest()[:16]
