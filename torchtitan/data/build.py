"""Builds the data loader of a config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch.distributed as dist

from torchtitan.config.batch import UNSET_VALIDATION_BATCH, batch_shape, resolve_batch
from torchtitan.errors import begin_errors_with
from torchtitan.runtime.collective_calls import on_all_ranks

from .chat import load_template
from .loader import DataLoader
from .mixing import Blend, Phase
from .prepared_tokens import PreparedTokens
from .sources import Source, open_dataset

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer
    from torchtitan.config import JobConfig
    from torchtitan.config.data import Data, DataSource

T = TypeVar("T")

VALIDATION_SEED = 42
"""Not `debug.seed`, so that runs with different seeds are compared on the same documents."""
_TIMEOUT = timedelta(hours=2)
"""Timeout while ranks open the data. A host that was replaced looks for the lines of large files,
or copies tables to its cache, which the other hosts did long ago; some have no hashes to verify."""


def build_dataloader(
    job_config: JobConfig, tokenizer: Tokenizer, dp_rank: int, dp_world_size: int
) -> DataLoader:
    """Build the training data loader of one data rank.

    Raises:
        ConfigError: the dataset is unknown, or the batch sizes do not fit the ranks.
        DataError: the data is missing, empty or malformed.
    """
    global_batch_size, _ = resolve_batch(job_config, dp_world_size)
    data, training = job_config.data, job_config.training
    name, open_source = f"training.dataset = {training.dataset!r}", opener(training)
    if data.sources:
        name, open_source = "data.sources", partial(open_blend, data)
    return _build(
        "training",
        job_config,
        tokenizer,
        name,
        open_source,
        seed=job_config.debug.seed,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
    )


def build_validation_dataloader(
    job_config: JobConfig,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_world_size: int,
    source: DataSource | None = None,
) -> DataLoader:
    """Build the validation data loader of one data rank: one validation is one global batch.

    It reads `validation.dataset`, or one of `validation.sources`.

    A validation calls `reset()` and takes `gradient_accumulation_steps` batches. All ranks together
    evaluate the first sequence of each of `validation.steps * validation.local_batch_size` rows:
    the same rows on every layout and for every `debug.seed`. If the number of rows is not divisible
    by the ranks' passes, the last rows have no labels, since all ranks must run the model equally
    often.

    Raises:
        ConfigError: the dataset is unknown.
        DataError: the data is missing, empty or malformed.
    """
    validation = job_config.validation
    size = validation.local_batch_size or UNSET_VALIDATION_BATCH
    if source is None:
        name = f"validation.dataset = {validation.dataset!r}"
        open_source = opener(validation, validation.text_key or job_config.training.text_key)
    else:
        name, open_source = f"validation.sources: {source.name or source.dataset!r}", opener(source)
    return _build(
        "validation",
        job_config,
        tokenizer,
        name,
        open_source,
        seed=VALIDATION_SEED,
        global_batch_size=validation.steps * size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        pad=True,
    )


def opener(config: Any, text_key: str | None = None) -> Callable[[], Source | Blend]:
    """Return a function that opens the dataset of a config section or table.

    Args:
        text_key: replaces the config's own.
    """
    text_key = config.text_key if text_key is None else text_key
    return partial(open_dataset, config.dataset, config.dataset_path, text_key, config.split)


def _build(
    section: Literal["training", "validation"],
    job_config: JobConfig,
    tokenizer: Tokenizer,
    name: str,
    open_source: Callable[[], Source | Blend],
    **batch: Any,
) -> DataLoader:
    """Build the loader for a config section; errors begin with `name`."""
    data = job_config.data

    def open_checked(rank: int, ranks: int) -> Source | Blend:
        source = open_source()
        if data.verify_hashes:
            verify_hashes(source, batch["dp_rank"], batch["dp_world_size"])
        return source

    local_batch_size, seq_len = batch_shape(job_config, section)
    source = open_on_all_ranks(open_checked, name)  # each checks its share of the token files
    chat_of = (data.chat_template, job_config.model.tokenizer_path)
    load_chat = functools.cache(partial(load_template, *chat_of))
    if data.chat_template:
        load_chat()  # so that a bad template is found at once
    return DataLoader(
        source,
        tokenizer,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        document_mask=job_config.training.document_mask,
        name=name,
        packing=data.packing,
        workers=data.workers,
        chat=load_chat,
        on_error=data.on_error,
        add_bos=data.add_bos,
        **batch,
    )


def open_on_all_ranks(open_source: Callable[[int, int], T], name: str) -> T:
    """Return `open_source(rank, ranks)`, for which all ranks wait. Errors begin with `name`."""
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if dist.is_initialized() else None
    with begin_errors_with(name):
        source = on_all_ranks(open_source, group)
    if group is not None:
        dist.destroy_process_group(group)
    return source


def open_blend(data: Data) -> Blend:
    """Open the sources of `[[data.sources]]`. Raises `TitanError`, which names the source."""
    sources: dict[str, Source] = {}
    for part in data.sources:
        name = part.name or part.dataset
        with begin_errors_with(repr(name)):
            sources[name] = open_dataset(part.dataset, part.dataset_path, part.text_key, part.split)
    phases = [Phase(phase.from_step, tuple(phase.weights)) for phase in data.phases]
    if not phases or phases[0].from_step > 1:
        phases.insert(0, Phase(1, tuple(part.weight for part in data.sources)))
    return Blend(sources, tuple(phases))


def verify_hashes(source: Source | Blend, part: int, parts: int) -> None:
    """Check the hashes of a part of the shards, for the sources that have hashes.

    Raises:
        DataError: a shard has changed.
        OutageError: a shard cannot be read now.
    """
    for one in source.sources.values() if isinstance(source, Blend) else [source]:
        if isinstance(one, PreparedTokens):
            one.verify(part, parts)
