"""The inputs of a step: those of a batch, and of a stage those from the stage before.

They are tensors with the right shapes, whose values do not matter.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from torchtitan.components.data_loader import (
    Batch,
    builder,
    describe_batch,
    has_own_loader,
    may_add_inputs,
    open_loader,
    why_no_batch,
)
from torchtitan.components.model_inputs import (
    USUAL_KEYS,
    in_precision,
    own_inputs,
    refuse_lone_positions,
    sequence_shape,
    sequences,
    usual_inputs,
)
from torchtitan.config import JobConfig, origin
from torchtitan.config.data import Data
from torchtitan.config.training import Training
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.fsdp import fsdp_modules, mixed_precision
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.protocols.train_spec import train_spec_of


@dataclass(frozen=True)
class Inputs:
    """A batch of token ids and labels `[batch, seq]`, or one like the model's own loader gives."""

    rows: Batch | None = None
    """One row of each tensor of a batch, on the meta device; None: token ids."""
    own: bool = False
    """Whether the model has its own loader."""
    unknown: str = ""
    """Why the loader does not give a batch."""

    @classmethod
    def of(cls, job_config: JobConfig) -> Inputs:
        """Get the form of a batch from the model's own loader, if it has one.

        Raises:
            ConfigError: the loader gives no batch here, and a model without `vocab_size` reads no
                token ids; or the loader gives positions that the model would not get.
        """
        spec = train_spec_of(job_config)
        if not may_add_inputs(spec.build_dataloader_fn):
            return TOKEN_IDS
        unknown, batch = "", None
        # The data may be elsewhere; a loader that also has data of its own gives the same shapes.
        configs = [job_config, _without_files(job_config)]
        for config in configs if has_own_loader(spec.build_dataloader_fn) else configs[1:]:
            try:
                batch = _batch_of_one_row(spec, config)
                break
            except Exception as error:  # from the user's code, or because data is missing
                unknown = unknown or why_no_batch(error)
        if batch is not None:
            refuse_lone_positions(
                f"{builder(job_config)}: a batch of the loader", batch, job_config
            )
            if not job_config.training.document_mask:  # the model does not get these keys
                batch = {name: row for name, row in batch.items() if name not in USUAL_KEYS[2:]}
            return cls(None if _is_text(batch, job_config) else batch, own=True, unknown=unknown)
        if getattr(spec.updated_args(job_config), "vocab_size", None) is None:
            raise ConfigError(
                f"{origin(job_config, 'model.name')}: a plan needs the shapes of a batch of the "
                f"data loader of {job_config.model.name}, which gives none here: {unknown}. Give "
                "the options that it needs, or plan on a machine that has its data"
            )
        return cls(own=True, unknown=unknown)

    def batch(self, size: int, seq_len: int, device: str | None = None) -> Batch:
        """Return `size` rows of zeros. Args: seq_len: for token ids."""
        if self.rows is None:
            tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=device)
            return {"tokens": tokens, "labels": tokens.clone()}
        return {
            name: torch.zeros(size, *row.shape, dtype=row.dtype, device=device)
            for name, row in self.rows.items()
        }

    def describe(self, batch: Batch) -> str:
        return describe_batch(batch) + (
            f" (its data loader gives no batch of the data here: {self.unknown})"
            * bool(self.unknown)
        )


TOKEN_IDS = Inputs()
"""For a model that reads texts."""


def _without_files(job_config: JobConfig) -> JobConfig:
    """Return the job with the default of `training.dataset`, and with a tokenizer without files."""
    config, usual = copy.deepcopy(job_config), Training()
    config.data, config.model.tokenizer_path = Data(), "bytes"
    for key in ("dataset", "dataset_path", "split"):
        setattr(config.training, key, getattr(usual, key))
    return config


def _batch_of_one_row(spec: Any, job_config: JobConfig) -> Batch:
    """Return one row of each tensor, as one process of such a job reads it."""
    config = copy.deepcopy(job_config)
    config.training.local_batch_size = config.training.global_batch_size = 1
    config.training.batch_size_ramp = []
    loader = open_loader(spec, config)
    try:
        batch = next(loader)
    finally:
        getattr(loader, "close", lambda: None)()
    missing = [name for name in USUAL_KEYS[:2] if name not in batch]
    if missing:
        raise ConfigError(f"a batch has no {', '.join(missing)}")
    return {
        name: torch.empty(tensor.shape[1:], dtype=tensor.dtype, device="meta")
        for name, tensor in batch.items()
    }


def _is_text(batch: Batch, job_config: JobConfig) -> bool:
    return set(batch) <= set(USUAL_KEYS) and all(
        row.dtype == torch.int64 and list(row.shape) == [job_config.training.seq_len]
        for row in batch.values()
    )


def micro_batch(job_config: JobConfig, dims: ParallelDims, inputs: Inputs) -> Batch:
    """Return zeros for one forward pass of a rank, which has a part of each sequence."""
    size = job_config.training.local_batch_size
    if dims.pp_enabled:
        size = job_config.parallelism.pipeline_parallel_microbatch_size
    batch = inputs.batch(size, job_config.training.seq_len)
    if dims.cp_enabled:
        spec = train_spec_of(job_config)
        shared = sequences(batch, spec.model_cls.sequence_inputs)
        batch |= {name: t.chunk(dims.cp, 1)[0].contiguous() for name, t in shared.items()}
    # Floating-point inputs in the dtype that the trainer gives to a model.
    dtype = getattr(torch, job_config.training.mixed_precision_param)
    return {
        name: tensor if name == "labels" else in_precision(tensor, dtype)
        for name, tensor in batch.items()
    }


def step_inputs(
    part: nn.Module, dims: ParallelDims, job_config: JobConfig, batch: Batch
) -> dict[str, torch.Tensor]:
    """Return the inputs of `forward` besides tokens."""
    names = usual_inputs(part, dims, job_config)
    if shape := sequence_shape(batch):  # the model's own loader may give some of another shape
        batch = dict.fromkeys(names, torch.zeros(shape, dtype=torch.int64)) | batch
    return {name: batch[name].clone() for name in names if name in batch} | own_inputs(batch)


def tensors_of(out: Any) -> tuple[torch.Tensor, ...]:
    """Return a tensor as a tuple, or the tensors of a tuple."""
    return tuple(out) if isinstance(out, tuple | list) else (out,)


def handed_on(
    first: nn.Module, job_config: JobConfig, dims: ParallelDims, inputs: Inputs
) -> tuple[torch.Tensor, ...]:
    """Return the output of the parallelised first stage. Call within a `FakeTensorMode`."""
    batch = micro_batch(job_config, dims, inputs)
    autocast = mixed_precision(bool(fsdp_modules(first)), job_config, torch.device("cpu"))
    with autocast:
        out = first(batch["tokens"], **step_inputs(first, dims, job_config, batch))
    return tuple(map(local_tensor, tensors_of(out)))
