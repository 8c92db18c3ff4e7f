"""Check a data loader's batches and turn them into the arguments of the model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from inspect import Parameter
from typing import TYPE_CHECKING

import torch

from torchtitan.components.data_loader import Batch, builder, some
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config.batch import batch_shape
from torchtitan.config.load import fail
from torchtitan.distributed.context_parallel import shard_batch
from torchtitan.errors import ConfigError, ContextParallelError, did_you_mean
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    import torch.nn as nn
    from torch.distributed.device_mesh import DeviceMesh

    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims

USUAL_KEYS = ("tokens", "labels", "positions", "document_ids")
"""Batch keys that the trainer knows; others are passed to the model by name."""

_OF_A_PIPELINE = ("target", "losses", "return_outputs")
"""Arguments of a pipeline's `step`, which also takes inputs of the model by name."""


def needed_inputs(parameters: list[Parameter]) -> list[str]:
    """Return which of `forward`'s inputs, beside the usual ones, it cannot be called without."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    own = [p for p in parameters if p.name not in USUAL_KEYS]
    return [p.name for p in own if p.kind in named and p.default is p.empty]


class ModelInputs:
    """Checks batches and turns them into the arguments of the model's `forward`.

    Args:
        model: the whole model, before it is parallelized.
        vocab_size: upper bound of token ids, if known.
    """

    def __init__(
        self,
        model: nn.Module,
        parallel_dims: ParallelDims,
        job_config: JobConfig,
        vocab_size: int | None = None,
    ) -> None:
        self._config = job_config
        self._vocab_size = vocab_size
        # Unknown for a head of another name: a model may predict more classes than it reads tokens.
        self._classes = getattr(getattr(model, "output", None), "out_features", sys.maxsize)
        self._usual = usual_inputs(model, parallel_dims, job_config)
        self._cp, self._pp = parallel_dims.cp, parallel_dims.pp_enabled
        self._sequences = getattr(model, "sequence_inputs", None)
        self._dtype = getattr(torch, job_config.training.mixed_precision_param)
        self._rounded: set[str] = set()
        parameters = list(inspect.signature(model.forward).parameters.values())
        if not parameters or parameters[0].kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD):
            raise ConfigError(
                f"{type(model).__name__}.forward() must take the tokens as its first argument, "
                "by position, whatever its name; other inputs are given by name"
            )
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        own = [p for p in parameters[1:] if p.name not in USUAL_KEYS]
        self._taken = {p.name for p in own}
        for name in self._sequences or ():
            if not self._takes_any and name not in self._taken:
                raise ConfigError(
                    f"{type(model).__name__}.sequence_inputs has {name!r}, but forward() takes "
                    f"no such input.{did_you_mean(name, self._taken)}"
                )
        self._needed = needed_inputs(own)
        if job_config.training.document_mask:  # else `on_device` creates the positions
            self._needed += self._usual

    def checked(self, batch: Batch) -> Batch:
        """Return a batch of the training loader unchanged, after checking it.

        Raises:
            ConfigError: the batch lacks a key, has one that nothing reads, or has another shape
                than the config, from which tokens are counted.
        """
        who = f"{builder(self._config)}: a batch of the loader"
        self._check_keys(who, batch)
        sizes = list(batch_shape(self._config, "training"))
        shape = list(batch["labels"].shape)
        if shape[:2] != sizes:
            raise ConfigError(
                f"{who} has labels of shape {shape}. It must begin with {sizes}, "
                "[training.local_batch_size, training.seq_len]: seq_len is the number of "
                "predictions per sample, from which tokens and FLOPs are counted"
            )
        self._check_shapes(who, batch, f"training.local_batch_size ({sizes[0]})")
        self._warn_of_rounding(who, batch)
        return batch

    def checked_for_validation(self, batch: Batch) -> Batch:
        """Return a batch that a validator gives to `evaluate` unchanged, after checking it.

        Raises:
            ConfigError: as `checked`, except that any size is allowed that fits the layout.
        """
        who = f"build_validator_fn of {self._config.model.name}: a batch of the validator"
        self._check_keys(who, batch)
        shape = list(batch["labels"].shape)
        if len(shape) < 2:
            raise ConfigError(
                f"{who} has labels of shape {shape}. It must begin with the number of samples and "
                "the number of predictions per sample"
            )
        rows = batch_shape(self._config, "validation")[0]
        if self._pp and shape[0] != rows:
            raise ConfigError(
                f"{who} has {shape[0]} samples. The pipeline schedule is built for "
                f"validation.local_batch_size, here {rows} (default: training's)"
            )
        if self._cp > 1 and shape[1] % (2 * self._cp):
            raise ConfigError(
                f"{who} has sequences of length {shape[1]}. It must be a multiple of "
                f"{2 * self._cp}, the number of chunks that parallelism.context_parallel_degree "
                f"({self._cp}) cuts them into"
            )
        self._check_shapes(who, batch, f"that of its labels ({shape[0]})")
        return batch

    def _check_keys(self, who: str, batch: Batch) -> None:
        """Check that a batch is a dict of tensors with the keys that forward() needs and takes."""
        if not isinstance(batch, dict):
            kind = type(batch).__name__
            raise ConfigError(f"{who} is {kind}, not a dict with 'tokens' and 'labels'")
        missing = [name for name in USUAL_KEYS[:2] if name not in batch]
        if missing:
            raise ConfigError(f"{who} has {some(batch)} but no {some(missing)}")
        others = [name for name, value in batch.items() if not isinstance(value, torch.Tensor)]
        if others:
            kind = type(batch[others[0]]).__name__
            raise ConfigError(f"{who} has {others[0]!r} of {kind}, which must be a torch.Tensor")
        model = self._config.model.name
        own = own_inputs(batch)
        reserved = [name for name in own if name in _OF_A_PIPELINE]
        if reserved:  # without a pipeline too, so that a run can later continue with one
            raise ConfigError(
                f"{who} has {some(reserved)}, but pipelines reserve {some(_OF_A_PIPELINE)}, so no "
                "input of forward() can have that name. Choose another name"
            )
        refuse_lone_positions(who, batch, self._config)
        unknown = [] if self._takes_any else [name for name in own if name not in self._taken]
        if unknown:
            raise ConfigError(
                f"{who} has {some(unknown)}, which forward() of {model} does not take: besides "
                f"tokens, it takes {some(sorted(self._taken))} from a loader"
            )
        absent = [name for name in self._needed if name not in batch]
        if absent:
            raise ConfigError(
                f"{who} has {some(batch)} but no {some(absent)}, which forward() of {model} needs"
            )

    def _check_shapes(self, who: str, batch: Batch, rows: str) -> None:
        """Check all tensors against the sizes of the labels. `rows` names the first size."""
        shape = list(batch["labels"].shape)
        sizes = shape[:2]
        for name, tensor in batch.items():
            if list(tensor.shape[:1]) != sizes[:1]:
                raise ConfigError(
                    f"{who} has {name!r} of shape {list(tensor.shape)}, whose first dimension "
                    f"must be {rows}"
                )
            # IGNORE_INDEX must fit into labels, and cross entropy takes no other integers.
            ids = name == "labels" or (name in USUAL_KEYS and list(tensor.shape) == sizes)
            if ids and tensor.dtype != torch.int64 and not tensor.is_floating_point():
                raise ConfigError(
                    f"{who} has {name!r} of {tensor.dtype}, which must be torch.int64, or "
                    "floating point if they are not ids"
                )
        self._check_ids(who, batch["tokens"], batch["labels"])
        if self._cp > 1:
            self._check_sequences(who, batch)

    def _check_sequences(self, who: str, batch: Batch) -> None:
        """Refuse inputs that context parallelism cannot divide, or does not know to."""
        divided = list(batch["tokens"].shape[:2]) == list(batch["labels"].shape[:2])
        own = own_inputs(batch)
        if self._sequences is None:
            divided &= all(tensor.ndim == 1 for tensor in own.values())
            problem = (
                "context parallelism divides only tokens and labels [batch, seq, ...], and other "
                "inputs must be [batch] if the model has no sequence_inputs (see ModelProtocol)"
            )
        else:
            own = {name: own[name] for name in self._sequences if name in own}
            divided &= all(t.ndim > 1 and t.shape[1] % (2 * self._cp) == 0 for t in own.values())
            problem = (
                f"context parallelism divides {some(['tokens', 'labels', *own])} [batch, n, ...] "
                f"into {2 * self._cp} chunks"
            )
        if not divided:
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in batch.items())
            key = "parallelism.context_parallel_degree"
            fail(self._config, key, f"{problem}, but {who} has {shapes}", ContextParallelError)

    def _warn_of_rounding(self, who: str, batch: Batch) -> None:
        """Warn once of a time step or weight of each sample that `in_precision` changes."""
        for name, tensor in own_inputs(batch).items():
            known = name in self._rounded or tensor.device.type != "cpu"
            if known or tensor.ndim != 1 or torch.equal(in_precision(tensor, self._dtype), tensor):
                continue
            self._rounded.add(name)
            rank0.warning(
                "%s has %r of %s, which forward() gets rounded to training.mixed_precision_param = "
                "'%s'. Pass a time step as an integer, and what only the loss needs in labels, "
                "which are not rounded",
                *(who, name, tensor.dtype, self._config.training.mixed_precision_param),
            )

    def _check_ids(self, who: str, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Refuse ids outside the embedding, which would be obscure index errors on the device.

        Refuse such labels of tokens too: some losses take them for tokens of other ranks.
        """
        size = self._vocab_size
        ids = tokens.dtype == torch.int64 and tokens.ndim == 2 and tokens.numel() > 0
        if size is None or not ids or tokens.device.type != "cpu":  # reading a GPU blocks the host
            return
        least, largest = (int(found) for found in tokens.aminmax())
        if least < 0 or largest >= size:
            wrong = least if least < 0 else largest
            raise ConfigError(
                f"{who} has the token {wrong}, but the vocab_size of {self._config.model} is "
                f"{size}: tokens must be from 0 to {size - 1}"
            )
        if labels.shape != tokens.shape or labels.dtype != torch.int64:
            return
        valid = (labels >= 0) & (labels < self._classes) | (labels == IGNORE_INDEX)
        if not valid.all():
            allowed = (
                "" if self._classes == sys.maxsize else f", here from 0 to {self._classes - 1}"
            )
            raise ConfigError(
                f"{who} has the label {labels[~valid][0]}. Labels are token ids{allowed}, or "
                f"IGNORE_INDEX ({IGNORE_INDEX}) where nothing is to be predicted"
            )

    def on_device(
        self, batch: Batch, device: torch.device, cp_mesh: DeviceMesh | None
    ) -> tuple[torch.Tensor, torch.Tensor, Batch]:
        """Return tokens, labels and the model's other inputs on `device`.

        Under context parallelism they are this rank's part of the sequence. Floating-point inputs
        are cast to `training.mixed_precision_param` on every layout, as FSDP would cast them;
        labels keep their dtype.
        """
        if not self._config.training.document_mask:
            # Without the mask, the sequence is one document to the model.
            # Do not change the batch itself: a validator may keep it and pass it again.
            batch = own_inputs(batch) | {name: batch[name] for name in USUAL_KEYS[:2]}
            if "positions" in self._usual and (shape := sequence_shape(batch)):
                batch["positions"] = torch.arange(shape[1]).expand(shape)
        if cp_mesh is not None:
            batch = batch | shard_batch(sequences(batch, self._sequences), cp_mesh, self._config)
        if device.type == "cuda":  # a copy from pageable memory waits for earlier queued work
            batch = {name: pinned(tensor) for name, tensor in batch.items()}
        batch = {name: t.to(device, non_blocking=True) for name, t in batch.items()}
        usual = {name: batch[name] for name in self._usual if name in batch}
        inputs = usual | own_inputs(batch)
        inputs = {name: in_precision(tensor, self._dtype) for name, tensor in inputs.items()}
        return in_precision(batch["tokens"], self._dtype), batch["labels"], inputs


def refuse_lone_positions(who: str, batch: Batch, job_config: JobConfig) -> None:
    """Raise `ConfigError` for positions that would not reach the model."""
    masked = job_config.training.document_mask
    if "positions" in batch and "document_ids" not in batch and not masked:
        # Positions with document_ids belong to packed documents whose mask is off.
        raise ConfigError(
            f"{who} has 'positions' without 'document_ids', but without training.document_mask "
            "the positions of a sequence are 0, 1, 2, ... Leave them out, give document_ids "
            "too and set training.document_mask, or choose another name, also in forward()"
        )


def own_inputs(batch: Batch) -> Batch:
    """Return the inputs that `forward` gets under the author's own names."""
    return {name: tensor for name, tensor in batch.items() if name not in USUAL_KEYS}


def sequences(batch: Batch, sequence_inputs: Iterable[str] | None) -> Batch:
    """Return the tensors of which context parallelism gives each rank a part of dimension 1.

    `sequence_inputs`: see `ModelProtocol`.
    """
    names = {*USUAL_KEYS, *(sequence_inputs or ())}
    return {name: tensor for name, tensor in batch.items() if name in names}


def sequence_shape(batch: Batch) -> torch.Size | None:
    """Return `[batch, seq]`; None if tokens are no sequences, such as images or pairs of texts.

    A text may have fewer labels than tokens, such as one in all.
    """
    tokens, labels = batch["tokens"], batch["labels"]
    is_text = tokens.ndim == 2 and not tokens.is_floating_point()
    return tokens.shape[:2] if is_text or tokens.shape[:2] == labels.shape[:2] else None


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a host tensor, of any shape, in pinned memory; loaders may use the device already."""
    return tensor.contiguous().pin_memory() if tensor.device.type == "cpu" else tensor


def in_precision(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a floating-point input of the model, of any shape, to `dtype`."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def usual_inputs(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> list[str]:
    """Return which of `positions` and `document_ids` the model gets, see `ModelProtocol`."""
    accepted = inspect.signature(model.forward).parameters
    wanted = []
    if job_config.training.document_mask:
        if "document_ids" not in accepted:
            fail(
                job_config,
                "training.document_mask",
                f"the forward() of {job_config.model.name} takes no document_ids",
            )
        wanted = ["positions", "document_ids"]
    elif parallel_dims.pp_enabled or parallel_dims.cp_enabled:
        # A stage cannot infer the sequence length from hidden states, nor a part of a sequence its
        # place in the whole.
        wanted = ["positions"]
    if parallel_dims.cp_enabled and "positions" not in accepted:
        fail(
            job_config,
            "parallelism.context_parallel_degree",
            f"the forward() of {job_config.model.name} takes no positions, so it cannot compute a "
            "part of a sequence",
        )
    return [name for name in wanted if name in accepted]
