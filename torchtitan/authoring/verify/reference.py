"""Runs a short training of the subject, by the real trainer.

Random tokens are a function of (seed, step), for any vocabulary: no tokenizer, no dataset. A model
that reads something else trains on batches of its own loader, and a text model with its own loader
on both. The recording of a run on one process is the reference that every layout must reproduce.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from torchtitan.components.checkpoint.model_tensors import model_state
from torchtitan.components.model_inputs import in_precision
from torchtitan.config.training import Training
from torchtitan.distributed.names import canonical_name
from torchtitan.errors import ConfigError
from torchtitan.protocols.train_spec import MODEL_REGISTRY
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

from .batches import BATCH, batch_of_texts
from .check import CheckFailedError, NotApplicableError
from .observe import Outputs, module_outputs
from .probe import packed_documents
from .subject import Subject

STEPS = 4
LEARNING_RATE = 1e-3
OPTIONS = (
    f"--training.global_batch_size={BATCH}",
    "--training.max_norm=inf",  # a wrong norm must not spoil the gradients that are compared
    f"--optimizer.lr={LEARNING_RATE}",
    # Adam turns the rounding error of a gradient that should be 0 into a whole step. With this
    # eps, a gradient below 1e-5 makes a smaller step.
    "--optimizer.eps=1e-5",
    "--lr_scheduler.warmup_steps=0",
    "--parallelism.pipeline_parallel_microbatch_size=2",
)

Tensors = dict[str, torch.Tensor]


@dataclass
class Recording:
    """A rank's recording of a run, in local tensors and DTensors, by their names in checkpoints."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: Tensors = field(default_factory=dict)
    """Parameters and buffers before the first step."""
    outputs: Outputs = field(default_factory=dict)
    """Outputs of each module in the first step, in order of completion; "" is the model."""
    recomputed: Outputs = field(default_factory=dict)
    """The same, as recomputed in the backward pass by activation checkpointing."""
    gradients: Tensors = field(default_factory=dict)
    """Gradient of each parameter that has one, after the first step's backward pass."""
    weights: Tensors = field(default_factory=dict)
    """Parameters and buffers after the last step."""

    def save(self, path: Path) -> None:
        torch.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> Recording:
        """Load a recording; its tensors are read when they are used."""
        return cls(**torch.load(path, mmap=True, weights_only=True))


class Batches:
    """Endless micro-batches in place of a data loader: shares of batches of all ranks.

    In random tokens, the beginning of a row has no labels, as after a prompt. Its share differs by
    row, so that ranks and micro-batches have different numbers of labels. Rows are packed documents
    if `training.document_mask` is on.
    """

    def __init__(self, subject: Subject, training: Training, dp_rank: int, dp_size: int) -> None:
        self.global_batch_size = BATCH
        self._subject = subject
        self._local_batch_size = training.local_batch_size
        self._documents = training.document_mask
        share = BATCH // dp_size
        self._rows = torch.arange(dp_rank * share, (dp_rank + 1) * share)
        self._step = 0
        self._waiting: list[Tensors] = []

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Tensors:
        if not self._waiting:
            self._step += 1
            batch = self._batch(self._step)
            dtype = torch.get_default_dtype()
            self._waiting = [
                {name: in_precision(tensor[rows], dtype) for name, tensor in batch.items()}
                for rows in self._rows.split(self._local_batch_size)
            ]
        return self._waiting.pop(0)

    def _batch(self, step: int) -> Tensors:
        """Return the batch of all ranks, each tensor `[BATCH, ...]`."""
        subject, own = self._subject, self._subject.own_batches
        if not subject.reads_text:
            own = subject.own_documents if self._documents else own
            assert own is not None  # otherwise it reads text
            return own.batch(step)
        if own and not own.error and not self._documents and step % 2 == 0:
            return own.batch(step)
        seq_len = subject.length
        stream = subject.tokens(BATCH, seq_len + 1, seed=step)
        prompts = torch.arange(BATCH)[:, None] * seq_len // (BATCH + 4)
        stream = stream.where(torch.arange(seq_len + 1) > prompts, ~stream)
        documents = packed_documents(BATCH, seq_len + 1, step) if self._documents else None
        return batch_of_texts(stream, subject.later_tokens, documents)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": torch.stack([self._rows, torch.full_like(self._rows, self._step)], dim=1)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = int(state_dict["rows"][0, 1])

    def close(self) -> None:
        """Do nothing: nothing runs in the background."""


def build_trainer(subject: Subject, *options: str) -> Trainer:
    """Build the trainer of a run that includes this rank. Raises `ConfigError` as the trainer does.

    Raises:
        NotApplicableError: the model needs its own loader, which cannot be built here.
    """
    subject.require_own()
    spec = subject.spec

    def build_dataloader(config: Any, tokenizer: Any, dp_rank: int, dp_size: int) -> Batches:
        return Batches(subject, config.training, dp_rank, dp_size)

    # Registered in this process alone, which ends with the check.
    MODEL_REGISTRY[subject.name] = lambda flavor: replace(
        spec, build_dataloader_fn=build_dataloader, build_tokenizer_fn=None
    )
    folder = subject.folder / f"run-{os.environ['MASTER_PORT']}"  # a dump folder has one run
    return Trainer(subject.config(*OPTIONS, f"--job.dump_folder={folder}", *options))


def trainer_or_skip(subject: Subject, *options: str) -> Trainer:
    """Build the trainer of a job that the model may refuse: then the check does not apply."""
    try:
        return build_trainer(subject, *options)
    except ConfigError as error:
        raise NotApplicableError(str(error)) from error


def train(
    trainer: Trainer, steps: int = STEPS, observe: bool = True, dropout: bool = False
) -> Recording:
    """Resume if there is a checkpoint, and train up to step `steps`.

    Args:
        observe: record more than losses, gradient norms and final weights.
        dropout: keep dropout; layouts draw different numbers, so they are compared without it.

    Raises:
        CheckFailedError: a loss or gradient norm is not finite.
    """
    recording = Recording()
    trainer.checkpointer.load()
    if observe:
        recording.initial = copies(tensors_of(trainer))
    with closing(StopRequest()) as stop, nullcontext() if dropout else without_dropout():
        while trainer.state.step < steps:
            trainer.state.step += 1
            if observe and trainer.state.step == 1:
                with module_outputs(trainer.model_parts, trainer.job_config) as seen:
                    trainer.train_step(stop)
                recording.outputs, recording.recomputed = seen
                recording.gradients = copies(gradients_of(trainer))
            else:
                trainer.train_step(stop)
            for step, loss, grad_norm in trainer.stats.read(trainer.parallel_dims):
                if not loss < float("inf") or not grad_norm < float("inf"):
                    raise CheckFailedError(
                        f"step {step}: the loss is {loss} and the gradient norm is {grad_norm}",
                        "See the checks of `numerics`.",
                    )
                recording.losses.append(loss)
                recording.grad_norms.append(grad_norm)
            trainer.checkpointer.save(trainer.state.step)
    recording.weights = copies(tensors_of(trainer))
    return recording


@contextmanager
def without_dropout() -> Iterator[None]:
    """Disable PyTorch's dropout, including attention's, within the context.

    Functions that a module has imported by name are not disabled.
    """
    attend = F.scaled_dot_product_attention

    def attend_to_all(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) > 4:  # query, key, value, attn_mask, dropout_p
            args = (*args[:4], 0.0, *args[5:])
        return attend(*args, **(kwargs | {"dropout_p": 0.0} if "dropout_p" in kwargs else kwargs))

    def keep(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return input

    instead: dict[str, Any] = {name: keep for name in dir(F) if "dropout" in name}
    with patch.multiple(F, **instead, scaled_dot_product_attention=attend_to_all):
        yield


def tensors_of(trainer: Trainer) -> Tensors:
    """Return this rank's tensors by their checkpoint names, including non-persistent buffers."""
    buffers = {
        canonical_name(name): buffer
        for part in trainer.model_parts
        for name, buffer in part.named_buffers()
    }
    return buffers | model_state(trainer.model_parts)


def gradients_of(trainer: Trainer) -> Tensors:
    return {
        canonical_name(name): param.grad
        for part in trainer.model_parts
        for name, param in part.named_parameters()
        if param.grad is not None
    }


def copies(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
