"""`torchtitan data inspect`: shows statistics and samples of a dataset."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np
import tyro

from torchtitan.components.tokenizer import HuggingFaceTokenizer, Tokenizer, open_tokenizer
from torchtitan.config.options import require_at_least_one, shown_as
from torchtitan.errors import ConfigError, DataError, begin_errors_with
from torchtitan.models.plugins import load_plugins

from .chat import load_template
from .encode import Encoder
from .order import permute
from .prepared_tokens import PreparedTokens
from .sources import Source, has_random_access, open_dataset, take
from .token_shards import TokenFiles

_MEASURED = 20_000
_MEASURED_TOKENS = 20_000_000
"""The statistics of a large dataset are taken from this many documents or tokens."""


@dataclass
class Inspect:
    """Show statistics and decoded samples of data."""

    path: Annotated[tyro.conf.Positional[str], shown_as("[PATH]")] = ""
    """Prepared tokens, or the path of --dataset."""
    dataset: Annotated[str, shown_as("NAME")] = "tokens"
    """As in training.dataset."""
    text_key: Annotated[str, shown_as("KEY")] = "text"
    """As in training.text_key."""
    split: Annotated[str | None, shown_as("NAME")] = None
    """As in training.split."""
    tokenizer_path: Annotated[str | None, shown_as("PATH")] = None
    """Default: the one the tokens were prepared with"""
    samples: Annotated[int, shown_as("N")] = 3
    """Documents to show."""
    characters: Annotated[int, shown_as("N")] = 400
    """The most to show of each document."""
    verify: bool = False
    """Check the content hashes first."""
    chat_template: Annotated[str | None, shown_as("FILE")] = None
    """As in data.chat_template."""
    custom_import: Annotated[str, shown_as("MODULE")] = ""
    """Python module to import first, so that it can register a dataset."""


def inspect(options: Inspect) -> None:
    """Write statistics and decoded samples of a dataset to stdout.

    The documents are picked by a fixed pseudo-random permutation; of a dataset that can only be
    read in order, the first ones are taken.
    """
    require_at_least_one(options, "samples", "characters")
    load_plugins(options.custom_import)
    path, dataset = options.path, options.dataset
    with begin_errors_with(f"--dataset {dataset}"):
        source = open_dataset(dataset, path or None, options.text_key, options.split)
    tokenizer, tokenizer_path = _tokenizer(source, options.tokenizer_path)
    if options.verify:
        if not isinstance(source, PreparedTokens):
            raise ConfigError("--verify: only prepared tokens have content hashes")
        source.verify()
    encoder = Encoder(
        tokenizer, partial(load_template, options.chat_template, tokenizer_path), on_error="skip"
    )
    encoder.check(source)

    lengths, measured, counts = [], 0, np.zeros(tokenizer.vocab_size, np.int64)
    shown: list[tuple[str, np.ndarray]] = []
    for name, document in _documents(source):
        ids = encoder(document)
        if not len(ids):
            continue
        lengths.append(len(ids))
        measured += len(ids)
        unmasked = np.where(ids < 0, ~ids, ids)
        if unmasked.max() >= len(counts):
            raise DataError(
                f"{path}, {name}: token {unmasked.max()} is outside the tokenizer's vocabulary of "
                f"{len(counts)}: the data is damaged; --verify finds out where"
            )
        counts += np.bincount(unmasked, minlength=len(counts))
        if len(shown) < options.samples:
            shown.append((name, ids))
        elif measured > _MEASURED_TOKENS:
            break
    if not lengths:
        bad = f"all its documents, {encoder.skipped:,}, are malformed" if encoder.skipped else ""
        raise DataError(f"{path}: {bad or 'empty: it has no document with text'}")
    lines = [*_facts(source, path), f"tokenizer      {tokenizer_path}"]
    lines += _statistics(np.array(lengths), counts, tokenizer, encoder)
    for name, ids in shown:
        text = _text(ids, tokenizer, options.characters)
        lines += ["", f"--- {name}: {len(ids):,} tokens ---", text]
    sys.stdout.write("\n".join(lines) + "\n")


def _tokenizer(source: Source, path: str | None) -> tuple[Tokenizer, str]:
    if path is None:
        path = source.index["tokenizer"]["path"] if isinstance(source, PreparedTokens) else "bytes"
    with begin_errors_with("--tokenizer-path"):
        return open_tokenizer(path), path


def _documents(source: Source) -> Iterator[tuple[str, object]]:
    """Yield some documents, each with a name."""
    if has_random_access(source):
        size = len(source)
        for index in permute(np.arange(min(size, _MEASURED)), size, 0).tolist():
            yield f"document {index:,} of {size:,}", take(source, index)
    else:
        for number, document in enumerate(itertools.islice(source, _MEASURED)):
            yield f"document {number:,}", document


def _facts(source: Source, path: str) -> list[str]:
    """Return the lines that are known without reading documents."""
    lines = [f"data           {path}"]
    if isinstance(source, TokenFiles):
        lines += [
            f"documents      {len(source):,}",
            f"tokens         {source.num_tokens:,}",
            f"shards         {len(source.shards)}, of {source.shards[0].dtype.name}",
        ]
    elif isinstance(source, Sized):
        lines.append(f"documents      {len(source):,}")
    if isinstance(source, PreparedTokens):
        origin = source.index["source"]
        lines.append(f"made from      {origin['dataset']} {origin.get('dataset_path') or ''}")
        if source.index.get("add_bos"):
            lines.append("bos            begins each document")
        if source.index["skipped"]:
            lines.append(f"left out       {source.index['skipped']:,} malformed documents")
    return lines


def _statistics(
    lengths: np.ndarray, counts: np.ndarray, tokenizer: Tokenizer, encoder: Encoder
) -> list[str]:
    quantiles = np.quantile(lengths, (0, 0.1, 0.5, 0.9, 1)).astype(int)
    used = np.flatnonzero(counts)
    common = used[np.argsort(-counts[used], kind="stable")][:10]
    lines = [
        f"measured       {len(lengths):,} documents, {counts.sum():,} tokens",
        f"length         mean {lengths.mean():,.0f}; least, 10%, median, 90%, most: "
        + ", ".join(f"{n:,}" for n in quantiles),
        f"vocabulary     {len(used):,} of {len(counts):,} ids occur",
        "most frequent  "
        + ", ".join(
            f"{_decode([int(i)], tokenizer)!r} {counts[i] / counts.sum():.1%}" for i in common
        ),
    ]
    if encoder.skipped:
        lines.append(f"malformed      {encoder.skipped:,} documents")
    return lines


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    """Decode with special tokens, if they have a name: those of a chat show who speaks."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.decode_all(ids)
    return tokenizer.decode(ids)


def _text(ids: np.ndarray, tokenizer: Tokenizer, characters: int) -> str:
    """Decode the beginning, with untrained text in [[double brackets]]."""
    ids = ids[: 8 * characters]
    parts = []
    for trained, run in itertools.groupby(ids.tolist(), lambda i: i >= 0):
        text = _decode([i if trained else ~i for i in run], tokenizer)
        parts.append(text if trained else f"[[{text}]]")
    text = "".join(parts)
    return text if len(text) <= characters else f"{text[:characters]} ..."
