"""The inputs of checks: random tokens, or batches of the model's own data loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
import torch.nn as nn

from torchtitan.components.data_loader import Batch, describe_batch, open_loader, why_no_batch
from torchtitan.components.loss import IGNORE_INDEX, attach_loss, count_of
from torchtitan.components.model_inputs import USUAL_KEYS, ModelInputs, in_precision, own_inputs
from torchtitan.config import JobConfig
from torchtitan.data.packing import to_batch
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.models.common.attention import places_in_documents
from torchtitan.protocols.train_spec import TrainSpec

from .probe import loss_of

BATCH = 8
"""Rows of a batch, over all ranks."""


@dataclass(frozen=True)
class Example:
    """A batch, with how to run a model on it and compute its loss."""

    tokens: torch.Tensor
    labels: torch.Tensor
    inputs: Batch
    """Inputs of `forward` by name."""
    own_loss: OwnLoss | None = None
    """None: the cross entropy of each next token."""

    def run(self, model: nn.Module) -> Any:
        if self.own_loss is not None:
            self.own_loss.prepare(model)
        return model(self.tokens, **self.inputs)

    def loss(self, output: Any) -> torch.Tensor:
        """Return the mean loss of an output of `run`, a float32 scalar."""
        if self.own_loss is None:
            return loss_of(output, self.tokens)
        return self.own_loss.mean(output, self.labels)

    def rows(self, rows: slice) -> Example:
        inputs = {name: tensor[rows] for name, tensor in self.inputs.items()}
        return replace(self, tokens=self.tokens[rows], labels=self.labels[rows], inputs=inputs)

    def cast(self, dtype: torch.dtype) -> Example:
        """Return the example with floating-point inputs in `dtype`, as the trainer casts them."""
        inputs = {name: in_precision(tensor, dtype) for name, tensor in self.inputs.items()}
        return replace(self, tokens=in_precision(self.tokens, dtype), inputs=inputs)

    def in_float64(self) -> Example:
        """Return the example with all floating-point tensors in float64, also labels."""
        labels = in_precision(self.labels, torch.float64)
        return replace(self.cast(torch.float64), labels=labels)


class OwnLoss:
    """The mean of an author's loss, prepared and divided as the trainer does.

    Args:
        build: creates the loss when it is first needed.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build
        self._loss_fn: Any = None
        self._prepared: WeakSet[nn.Module] = WeakSet()

    def prepare(self, model: nn.Module) -> None:
        torch.manual_seed(0)  # so that random draws in forward() do not differ between two runs
        if self._loss_fn is None:
            self._loss_fn = self._build()
        if model not in self._prepared:
            attach_loss(self._loss_fn, [model])
            self._prepared.add(model)

    def mean(self, output: Any, labels: torch.Tensor) -> torch.Tensor:
        return self._loss_fn(output, labels) / count_of(self._loss_fn)(labels).clamp(min=1)


def random_example(tokens: torch.Tensor, own_loss: OwnLoss | None = None) -> Example:
    """Make an example of tokens `[batch, seq]` that predict the next."""
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORE_INDEX
    return Example(tokens, labels, {}, own_loss)


def batch_of_texts(
    stream: torch.Tensor, later_tokens: int, document_ids: torch.Tensor | None = None
) -> Batch:
    """Return the batch that torchtitan's loader makes of a stream.

    Args:
        stream: `[rows, seq + 1]`; of a token that is no label, its complement.
        later_tokens: see `to_batch`.
        document_ids: of the stream; None: each row is one document, and the mask is off.
    """
    ids = torch.zeros_like(stream) if document_ids is None else document_ids
    places = places_in_documents(ids)
    packed = document_ids is not None
    batch = to_batch(stream.numpy(), places.numpy(), ids.numpy(), packed, later_tokens)
    if not packed:
        del batch["positions"], batch["document_ids"]
    return batch


class OwnBatches:
    """Batches of a model's own loader, each `[BATCH, ...]`, as one process gets them.

    So every layout can get its share of the same rows, however the loader would divide them.

    Args:
        job: makes the job from options.
        seq_len: of the job, unless the loader's labels have another length.
    """

    def __init__(
        self, spec: TrainSpec, job: Callable[..., JobConfig], seq_len: int, *options: str
    ) -> None:
        self.seq_len = seq_len
        self.error = ""
        """Why there are no batches; "" if there are."""
        self._spec, self._job, self._options = spec, job, options
        self._loader: Any = None
        self._given: list[Batch] = []
        self._loss = OwnLoss(lambda: spec.build_loss_fn(self.config))
        try:
            length = self._length()
            if length != seq_len:
                self.close()
                self.seq_len = length
            self._refuse_unknown_ids(self.batch(1))
        except Exception as error:  # the loader may need options or files of a job
            self.error = why_no_batch(error)

    def _length(self) -> int:
        """Return the length of the first batch's labels; the job's length if it is a text."""
        self._open()
        batch = next(self._loader)
        found = [batch.get(name) for name in USUAL_KEYS[:2]] if isinstance(batch, dict) else []
        tensors = [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
        if len(tensors) == 2 and tensors[1].ndim > 1 and not _is_text(*tensors):
            length = int(tensors[1].shape[1])
            if length != self.seq_len:
                return length
        self._keep(batch)
        return self.seq_len

    def _refuse_unknown_ids(self, batch: Batch) -> None:
        size = getattr(self._spec.model_args, "vocab_size", None)
        if isinstance(size, int) and _are_ids(batch["tokens"]) and batch["tokens"].max() >= size:
            largest = int(batch["tokens"].max())
            raise ConfigError(f"a batch has the token {largest}, but vocab_size is {size}")

    @property
    def config(self) -> JobConfig:
        size = f"--training.global_batch_size={BATCH}", f"--training.local_batch_size={BATCH}"
        return self._job(*size, f"--training.seq_len={self.seq_len}", *self._options)

    def _open(self) -> None:
        if self._loader is None:
            config = self.config
            self._loader = open_loader(self._spec, config)
            model = self._spec.meta_model(self._spec.updated_args(config))
            dims = ParallelDims.from_config(config.parallelism, 1)
            self._expected = ModelInputs(model, dims, config)

    def _keep(self, batch: Batch) -> None:
        batch = self._expected.checked(batch)
        self._given.append({name: tensor.clone() for name, tensor in batch.items()})

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 1."""
        self._open()
        while len(self._given) < step:
            self._keep(next(self._loader))
        return dict(self._given[step - 1])

    def again(self) -> OwnBatches:
        """Return the same batches from a new loader."""
        return OwnBatches(self._spec, self._job, self.seq_len, *self._options)

    def close(self) -> None:
        if self._loader is not None:
            getattr(self._loader, "close", lambda: None)()
        self._loader, self._given = None, []

    @property
    def is_text(self) -> bool:
        """Whether a batch is only token ids and labels `[batch, seq]`, or also `later_tokens`."""
        batch = self.batch(1)
        if self.later_tokens:
            return set(batch) <= {*USUAL_KEYS, "next_tokens"}
        return set(batch) <= set(USUAL_KEYS) and _is_text(batch["tokens"], batch["labels"])

    @property
    def later_tokens(self) -> int:
        """The number n of tokens after each one that a batch of texts has, too; see `to_batch`."""
        tokens, labels, later = map(self.batch(1).get, ("tokens", "labels", "next_tokens"))
        if tokens is None or labels is None or later is None or later.ndim != 3:
            return 0
        depth = later.shape[2]
        shapes = (*tokens.shape, depth), (*tokens.shape, 1 + depth)
        same = (later.shape, labels.shape) == shapes and _are_ids(tokens)
        return depth if same and torch.equal(later[:, :-1, 0], tokens[:, 1:]) else 0

    @property
    def has_ids(self) -> bool:
        """Whether tokens are ids `[batch, seq]`, whatever else a batch has."""
        return _are_ids(self.batch(1)["tokens"])

    @property
    def keys(self) -> list[str]:
        """Keys of a batch besides tokens and labels; none if there is no batch."""
        return [] if self.error else [n for n in self.batch(1) if n not in USUAL_KEYS[:2]]

    def describe(self) -> str:
        """See `describe_batch`."""
        if self.error:
            return f"nothing ({self.error})"
        return describe_batch(self.batch(1))

    def example(self, rows: int, step: int) -> Example:
        batch = self.batch(step)
        whole = Example(batch["tokens"], batch["labels"], own_inputs(batch), self._loss)
        return whole.rows(slice(rows))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of batches are equal; missing labels, which are NaN, are equal."""
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_text(tokens: torch.Tensor, labels: torch.Tensor) -> bool:
    """Whether each token id has a label, so that the job chooses the length."""
    return _are_ids(tokens) and _are_ids(labels) and tokens.shape == labels.shape


def _are_ids(tokens: torch.Tensor) -> bool:
    """Whether tokens have the form `[batch, seq]` of texts."""
    return tokens.dtype == torch.int64 and tokens.ndim == 2
