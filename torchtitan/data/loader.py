"""The data loader: batches depend on the seed and the step, not on the layout of ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from torchtitan.components.data_loader import Batch
from torchtitan.config.batch import BatchSizes
from torchtitan.errors import CheckpointError, DataError, begin_errors_with
from torchtitan.tools.logging import rank0

from .best_fit import BestFitRow
from .collect import Counts, RowSequence, collect, naming, read_rows
from .encode import Encoder
from .mixing import Blend, Mixture, MixtureState, Phase, Steps, join_rows, split_rows
from .order import (
    Documents,
    Place,
    ShuffledDocuments,
    StreamedDocuments,
    count_lanes,
    epochs,
)
from .packing import PaddingRow, Row, to_batch
from .prefetch import PREFETCHED_BATCHES, Prefetcher
from .prepared_tokens import PreparedTokens
from .sources import (
    Source,
    first_document,
    has_random_access,
    num_shards,
    sample_of,
    size_of,
)
from .token_shards import TokenFiles


class DataLoader:
    """Endless micro-batches of packed documents for one data rank, with a state to resume from.

    A global batch has `global_batch_size` rows, each a token stream of its own (`packing.Row`).
    Rank `r` owns an equal share of consecutive rows, and its micro-batches are consecutive groups
    of `local_batch_size` of them. So each rank tokenizes only its own documents, and the global
    batch of a step is the same on every layout.

    The batches of a run may grow (`sizes`). Then the rows are divided into slices of
    `BatchSizes.unit` rows, of which a step takes the next ones: slice `j` of `m` has rows `j`,
    `j + m`, `j + 2 m`, ..., so that each rank has an equal share of it. Each row goes on with its
    own documents, so none is left out or read twice where the batch grows.

    The loader has the interface of torchdata's `StatefulDataLoader`. That class is not used because
    its state belongs to a rank and its number of worker processes, so that a run could resume only
    on the same layout. Here the state is a table of rows, which can be divided among any number of
    ranks. Threads read ahead instead of worker processes, since tokenizers release the
    interpreter's lock.

    Each micro-batch is a dict of int64 tensors `[local_batch_size, seq_len, ...]`: see
    `packing.to_batch`.

    Args:
        source: documents, of either kind described in `sources`, or several sources to mix.
        encoder: encodes them; it counts what this loader reads.
        local_batch_size: sequences in a micro-batch.
        global_batch_size: sequences in a step of all ranks; a multiple of `local_batch_size *
            dp_world_size`, unless `pad` is set.
        seed: seed of the order of documents.
        document_mask: predict nothing across the end of a document.
        pad: round the rows of a step up to such a multiple, see `packing.PaddingRow`.
        name: prefix of errors, such as the config key and its value.
        packing: see `packing` and `best_fit`.
        workers: threads that read ahead; the data does not depend on their number.
        later_tokens: see `packing.to_batch`.
        sizes: sequences of each step, if they grow to `global_batch_size`.

    Raises:
        DataError: the dataset is empty, or was made with another tokenizer. Iterating raises it too
            if data is malformed.
    """

    takes_ramp = True

    def __init__(
        self,
        source: Source | Blend,
        encoder: Encoder,
        seq_len: int,
        local_batch_size: int,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_world_size: int = 1,
        seed: int = 0,
        document_mask: bool = False,
        pad: bool = False,
        name: str = "the dataset",
        packing: Literal["contiguous", "best_fit"] = "contiguous",
        workers: int = 1,
        later_tokens: int = 0,
        sizes: BatchSizes | None = None,
    ) -> None:
        passes, remainder = divmod(global_batch_size, local_batch_size * dp_world_size)
        if remainder:
            if not pad:
                raise ValueError(
                    f"global_batch_size {global_batch_size} is not a multiple of local_batch_size "
                    f"{local_batch_size} x dp_world_size {dp_world_size}"
                )
            passes += 1
        self._blend = source if isinstance(source, Blend) else Blend.of(source)
        self._encoder = encoder
        self._seq_len = seq_len
        self._local_batch_size = local_batch_size
        self._dp_world_size = dp_world_size
        self._seed = seed
        self._to_batch = partial(to_batch, document_mask=document_mask, later_tokens=later_tokens)
        self._packing = packing
        self._workers = min(workers, passes * local_batch_size)
        self._name = name
        self.global_batch_size = global_batch_size
        self.gradient_accumulation_steps = passes
        rows = passes * local_batch_size
        self._rows = np.arange(dp_rank * rows, (dp_rank + 1) * rows)
        self._steps = sizes or BatchSizes.of(global_batch_size)
        self._slices = np.arange(rows).reshape(-1, global_batch_size // self._steps.unit).T

        for key, part in self._blend.sources.items():
            with begin_errors_with(name), naming(key):
                encoder.check(part)
                first = first_document(part, encoder.skips)
                if first is None:
                    raise DataError("empty: it has no document with text")
                if isinstance(first, list):  # known before a batch is read
                    encoder.has_conversations = True
                if isinstance(part, PreparedTokens):
                    _warn_of_unsaid_bos(part, encoder)
                elif isinstance(first, np.ndarray) and not isinstance(part, TokenFiles):
                    encoder.require_bos(first)
        self._prefetcher: Prefetcher[tuple[Batch, np.ndarray, int, Counts]] | None = None
        self._counts = Counts()
        self.reset()

    def reset(self) -> None:
        """Go back to the first batch."""
        self.begin_at(0)

    def begin_at(self, step: int) -> None:
        """Go back to the first batch of a run that has done `step` steps.

        The phases of a mixture count these steps; its sources begin from the start.
        """
        self.close()
        shards = map(num_shards, self._blend.sources.values())
        self._lanes = [count_lanes(number, self.global_batch_size) for number in shards]
        size = 5 if self._packing == "best_fit" else 4  # numbers of a `Place`
        places = np.array([Place(row)[:size] for row in self._rows.tolist()])
        sources = len(self._blend.sources)
        state = MixtureState.at(self._steps.units(step), [0] * sources)
        self._places, self._slice = join_rows(state, [places] * sources), 0

    def close(self) -> None:
        """Stop reading ahead. Iterating again continues after the last complete slice."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with begin_errors_with(self._name):
            if self._prefetcher is None:
                self._prefetcher = Prefetcher(self._batches(), PREFETCHED_BATCHES)
            batch, self._places, self._slice, self._counts = next(self._prefetcher)
        return batch

    def metrics(self) -> dict[str, float]:
        """Return values whose means over the data ranks describe the batches handed out so far.

        `data_epoch`: number of times the dataset has been read. `data_epoch/NAME` and
        `data_tokens/NAME`: epochs and tokens so far of each source of a mixture.
        `data_padding_share`: share of padding in the tokens since this process began, under
        best-fit packing. `data_skipped_documents`: skipped documents since this process began,
        under `on_error = "skip"`.
        """
        found: dict[str, float] = {}
        sources = self._blend.sources
        schedule, places_in = split_rows(self._places, len(sources))
        read = self._counts.read
        for number, (name, source) in enumerate(sources.items()):
            ending = f"/{name}" if len(sources) > 1 else ""
            divided = self.global_batch_size, self._lanes[number]
            of_rows = [
                epochs(source, *divided, Place(*place), 0.0 if read is None else read[row, number])
                for row, place in enumerate(places_in[number].tolist())
            ]
            found[f"data_epoch{ending}"] = float(np.mean(of_rows))
            if ending:
                found[f"data_tokens{ending}"] = float(schedule.drawn[number] * self._seq_len)
        if self._packing == "best_fit":
            found["data_padding_share"] = self._counts.padding / max(self._counts.tokens, 1)
        if self._encoder.skips:
            found["data_skipped_documents"] = float(self._counts.skipped * self._dp_world_size)
        return found

    @property
    def has_conversations(self) -> bool:
        """Whether a source begins with a conversation, or this rank has read one."""
        return self._encoder.has_conversations

    def describe(self) -> dict[str, Any]:
        """Return `{"seed", "sources": [{"name", "documents" or "shards", ...}]}`.

        A checkpoint keeps this, since a state is a place in data of this size and order. A source
        with documents also has a `sample` of them, see `sample_of`; one with shards has `lanes`,
        see `order.count_lanes`. If batches grow, `ramp` has their sizes, and `slice` is the next.
        """
        sources = [{"name": name, **part} for name, part in self._sizes.items()]
        for source, lanes in zip(sources, self._lanes, strict=True):
            if "shards" in source:
                source["lanes"] = lanes
        ramp = {"ramp": self._ramp, "slice": self._slice} if self._ramp else {}
        return {"seed": self._seed, "sources": sources, **ramp}

    @property
    def _ramp(self) -> list[list[int]]:
        """The sizes of `BatchSizes.stages`; empty if there is one."""
        stages = self._steps.stages
        return [list(stage) for stage in stages] if len(stages) > 1 else []

    @functools.cached_property
    def _sizes(self) -> dict[str, dict[str, int]]:
        with begin_errors_with(self._name):
            return {
                name: size_of(part) | sample_of(part) for name, part in self._blend.sources.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """Return `{"rows": [rows of this rank, k] int64, "described": ...}`.

        `rows` holds each row's place after the last complete slice handed out. A place is
        `MixtureState.numbers`, then `Row.place` for each source; k is 4 for one source.

        The rows of all ranks in order are the state of the run, for any number of ranks.
        `described` is the result of `describe`, the same on each rank.
        """
        return {"rows": torch.from_numpy(self._places.copy()), "described": self.describe()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of `state_dict`; the number of ranks may differ.

        Under contiguous packing `seq_len` may differ too: if the state contains the saved run's
        `seq_len`, the token counts go on from that run's. If the state has `described`, the data
        keeps the order of that run's seed, and sources keep their number of lanes. If the ramp of
        the batch size is another one, phases go on by the `step` of the state.

        Raises:
            CheckpointError: the state is of another global batch size, mixture or packing.
        """
        rows = np.asarray(state_dict["rows"], dtype=np.int64)
        fits = rows.shape == self._places.shape
        if fits:
            schedule, places = split_rows(rows, len(self._blend.sources))
            others = [(part[:, 0] - self._rows) % self.global_batch_size for part in places]
            fits = not np.any(others)
        described = state_dict.get("described", {})
        # 7 contiguous sources have rows of the same shape as 6 of best fit.
        fits &= len(described.get("sources", self._lanes)) == len(self._lanes)
        if not fits:
            raise CheckpointError(
                f"the position in the data, rows of shape {list(rows.shape)}, is not that of the "
                f"rows of this rank, {list(self._places.shape)}: training.global_batch_size, "
                "data.sources or data.packing changed. Restore them, or restart the data with "
                'checkpoint.exclude_from_loading = ["dataloader"]'
            )
        self.close()
        self._seed = described.get("seed", self._seed)
        if sources := described.get("sources"):
            told = zip(sources, self._lanes, strict=True)
            self._lanes = [source.get("lanes", lanes) for source, lanes in told]
        self._slice = 0
        if described.get("ramp", []) == self._ramp:
            self._slice = described.get("slice", 0)
        elif "step" in state_dict:
            schedule.steps = self._steps.units(state_dict["step"])
        length, saved_length = self._seq_len, state_dict.get("seq_len") or self._seq_len
        # Converted to sequences of the new length, rounded to the nearest.
        schedule.drawn = [(n * saved_length + length // 2) // length for n in schedule.drawn]
        self._places = join_rows(schedule, places)

    def _batches(self) -> Iterator[tuple[Batch, np.ndarray, int, Counts]]:
        schedule, places_in = split_rows(self._places, len(self._blend.sources))
        by_source = [
            self._open_rows(name, source, lanes, places.tolist())
            for (name, source), lanes, places in zip(
                self._blend.sources.items(), self._lanes, places_in, strict=True
            )
        ]
        in_slice = (self._rows // len(self._slices)).tolist()  # of all ranks
        rows = list(zip(in_slice, zip(*by_source, strict=True), strict=True))
        read = np.array([[stream.read for stream in streams] for _, streams in rows])
        turns = np.arange(len(rows)).reshape(self._slices.shape)
        readers: list[Iterator[RowSequence]] = []
        units = self._steps.units
        phases = [Phase(units(p.from_step - 1) + 1, p.weights) for p in self._blend.phases]
        mixture = Mixture(phases, self._steps.unit, self._seed, schedule)
        steps = Steps(mixture, self._workers)
        rows_ahead = math.ceil(PREFETCHED_BATCHES * self._local_batch_size / self._workers)
        for worker in range(self._workers):
            of_worker = turns % self._workers == worker
            share = [
                [rows[row] for row in part[mask].tolist()]
                for part, mask in zip(self._slices, of_worker, strict=True)
            ]
            names, own = list(self._blend.sources), steps.of_reader(worker)
            reader = read_rows(share, self._slice, names, own, self._seq_len)
            if self._workers > 1:
                reader = Prefetcher(reader, rows_ahead)
            readers.append(reader)
        return collect(
            readers,
            self._slices,
            self._slice,
            self._local_batch_size,
            self._to_batch,
            places=self._places,
            read=read,
            encoder=self._encoder,
        )

    def _open_rows(
        self, name: str, source: Source, lanes: int, numbers: list[list[int]]
    ) -> list[Row | BestFitRow | PaddingRow]:
        """Open the rows of this rank in one source, at places `[rows, 4 or 5]`."""
        stride = self.global_batch_size
        real = int((self._rows < stride).sum())
        places = [Place(*place) for place in numbers[:real]]
        documents: Documents
        if has_random_access(source):
            documents = ShuffledDocuments(source, self._encoder, self._seed, stride)
        else:
            first = [(place.document, place.origin) for place in places]
            documents = StreamedDocuments(source, self._encoder, stride, lanes, first)
        rows: list[Row | BestFitRow | PaddingRow]
        with naming(name):
            if self._packing == "contiguous":
                rows = [Row(documents, place) for place in places]
            else:
                rows = [BestFitRow(documents, self._seq_len, place) for place in places]
        return rows + [PaddingRow(tuple(place)) for place in numbers[real:]]


def _warn_of_unsaid_bos(part: PreparedTokens, encoder: Encoder) -> None:
    if part.index.get("add_bos") and encoder.bos_id is None:
        rank0.warning(
            "%s was prepared with --add-bos: set data.add_bos = true, so that texts also begin "
            "with bos in validation, generate and eval",
            part.folder,
        )
