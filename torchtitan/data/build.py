"""Builds the data loader of a config."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch.distributed as dist

from torchtitan.config.batch import UNSET_VALIDATION_BATCH, batch_shape, batch_sizes
from torchtitan.errors import begin_errors_with
from torchtitan.runtime.collective_calls import on_all_ranks, on_rank_zero
from torchtitan.runtime.process_group import patient_group

from .chat import load_template
from .encode import Encoder
from .huggingface import Streams, opening_once
from .loader import DataLoader
from .mixing import Blend, Phase
from .prepared_tokens import PreparedTokens
from .sources import HUB_DATASETS, Source, open_dataset

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
    job_config: JobConfig,
    tokenizer: Tokenizer,
    dp_rank: int,
    dp_world_size: int,
    later_tokens: int = 0,
) -> DataLoader:
    """Build the training data loader of one data rank.

    `later_tokens`: give also this many tokens after the next one, for multi-token prediction; see
    `packing.to_batch`. A `TrainSpec` sets it with `functools.partial`.
    """
    sizes = batch_sizes(job_config, dp_world_size)
    data, training = job_config.data, job_config.training
    name = "data.sources" if data.sources else f"training.dataset = {training.dataset!r}"
    datasets = [source.dataset for source in data.sources] or [training.dataset]
    open_source = partial(open_blend, data) if data.sources else partial(_open, training)
    return _build(
        "training",
        job_config,
        tokenizer,
        name,
        open_source,
        of_hub=any(name in HUB_DATASETS for name in datasets),
        seed=job_config.debug.seed,
        global_batch_size=sizes.largest,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        later_tokens=later_tokens,
        sizes=sizes,
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
    """
    validation = job_config.validation
    size = validation.local_batch_size or UNSET_VALIDATION_BATCH
    if source is None:
        name = f"validation.dataset = {validation.dataset!r}"
        text_key = validation.text_key or job_config.training.text_key
        open_source = partial(_open, validation, text_key)
    else:
        name = f"validation.sources: {source.name or source.dataset!r}"
        open_source = partial(_open, source)
    return _build(
        "validation",
        job_config,
        tokenizer,
        name,
        open_source,
        of_hub=(source or validation).dataset in HUB_DATASETS,
        seed=VALIDATION_SEED,
        global_batch_size=validation.steps * size,
        dp_rank=dp_rank,
        dp_world_size=dp_world_size,
        pad=True,
    )


def _open(config: Any, text_key: str | None = None) -> Source:
    """Open the dataset of a config section or table. `text_key` replaces its own."""
    text_key = config.text_key if text_key is None else text_key
    return open_dataset(config.dataset, config.dataset_path, text_key, config.split)


def _build(
    section: Literal["training", "validation"],
    job_config: JobConfig,
    tokenizer: Tokenizer,
    name: str,
    open_source: Callable[[], Source | Blend],
    of_hub: bool,
    **batch: Any,
) -> DataLoader:
    """Build the loader for a config section. Errors begin with `name`.

    `of_hub`: see `open_on_all_ranks`.
    """
    data = job_config.data
    local_batch_size, seq_len = batch_shape(job_config, section)
    load_chat = partial(load_template, data.chat_template, job_config.model.tokenizer_path)
    with begin_errors_with("data.add_bos = true"):
        encoder = Encoder(tokenizer, load_chat, data.on_error, data.add_bos)
    if data.chat_template and encoder.chat:
        encoder.chat()  # so that a bad template is found at once

    def open_loader() -> DataLoader:
        with begin_errors_with(name):
            opened = open_source()
            for source in opened.sources.values() if isinstance(opened, Blend) else [opened]:
                if data.verify_hashes and isinstance(source, PreparedTokens):
                    # Each rank checks its share of the token files.
                    source.verify(batch["dp_rank"], batch["dp_world_size"])
        return DataLoader(
            opened,
            encoder,
            seq_len=seq_len,
            local_batch_size=local_batch_size,
            document_mask=job_config.training.document_mask,
            name=name,
            packing=data.packing,
            workers=data.workers,
            **batch,
        )

    return open_on_all_ranks(open_loader, of_hub)


def open_on_all_ranks(open_it: Callable[[], T], of_hub: bool = False) -> T:
    """Return `open_it()`, for which all ranks wait. All raise the error of any.

    `of_hub`: rank 0 opens first, and the others take the streams that it has found. A stream costs
    tens of requests, and the hub refuses more than some hundreds within minutes.
    """
    group = patient_group(_TIMEOUT) if dist.is_initialized() else None
    open_it = cache(open_it)  # which rank 0 calls twice
    streams: Streams = {}

    def open_first() -> Streams:
        with opening_once(streams):
            open_it()
        return streams

    if of_hub:
        streams = on_rank_zero(open_first, group)
    with opening_once(streams):
        opened = on_all_ranks(lambda rank, ranks: open_it(), group)
    if group is not None:
        dist.destroy_process_group(group)
    return opened


def open_blend(data: Data) -> Blend:
    """Open the sources of `[[data.sources]]`. Raises `TitanError`, which names the source."""
    sources: dict[str, Source] = {}
    for part in data.sources:
        name = part.name or part.dataset
        with begin_errors_with(repr(name)):
            sources[name] = _open(part)
    phases = [Phase(phase.from_step, tuple(phase.weights)) for phase in data.phases]
    if not phases or phases[0].from_step > 1:
        phases.insert(0, Phase(1, tuple(part.weight for part in data.sources)))
    return Blend(sources, tuple(phases))
