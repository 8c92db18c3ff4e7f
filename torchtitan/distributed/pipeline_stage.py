"""A stage of a pipeline: what PyTorch's `PipelineStage` needs to run any model's part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage
from torch.utils._pytree import tree_leaves, tree_map_only

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.expert_parallel import without_exchange
from torchtitan.errors import ConfigError


class Stage(PipelineStage):
    """A stage that is in eval mode while PyTorch infers the shapes of its outputs.

    The inference is a forward pass with the first micro-batch, after the first stage with zeros
    (torch 2.13 adds a backward pass). It must not count as training, for example in the load
    statistics of experts, and it sends no rows to experts. The backward pass needs the same mode:
    activation checkpointing runs the forward pass again.
    """

    _sent: list[torch.Size] | None = None
    """Shapes for which the next stage has buffers."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Return the operations that connect the stage to other ranks.

        The two stages in the middle of a V are on one rank, which torch 2.11 would have gloo
        connect to itself.
        """
        ops = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass. The last stage returns what it outputs in a list, to be taken out.

        So nothing keeps the logits: the loss has what gradients need. PyTorch would keep them until
        the backward pass of their micro-batch is done, and without one until the next validation.
        """
        with _raising_as_is():
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            return output
        _, inputs = self.fwd_cache.pop(fwd_chunk_id)
        if self.has_backward:
            self.fwd_cache[fwd_chunk_id] = (), inputs
        return [output]

    def backward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass outside of autocast, which has its dtypes from the forward pass.

        Within it, products that were computed in float32 would be differentiated in bfloat16.
        """
        with torch.autocast(self.device.type, enabled=False), _raising_as_is():
            return super().backward_maybe_with_nosync(*args, **kwargs)

    # The last stage sends nothing, and may return more in training than when it was asked.
    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        shapes = [tensor.shape for tensor in self.fwd_cache[fwd_chunk_id][0]]
        self._sent = self._sent or shapes
        if shapes != self._sent:  # torch 2.13 would send them: into a part of the buffers, or never
            raise ConfigError(
                f"a pipeline stage hands on tensors of {[list(s) for s in shapes]}, but of "
                f"{[list(s) for s in self._sent]} in the first pass. Give batches that have equal "
                "shapes in all steps, or other stages that do not hand these on"
            )
        return super().get_fwd_send_ops(fwd_chunk_id)

    def _validate_fwd_outputs(self, outputs: Any) -> None:  # of torch 2.11; 2.13 does as this does
        if not self.is_last:
            cast(Any, super())._validate_fwd_outputs(outputs)

    def _to_tensor(self, arg: Any) -> torch.Tensor:
        """Return an input of the inference; `arg` is a tensor, or describes what is handed on."""
        tensor = cast(Any, super())._to_tensor(arg)
        with torch.no_grad():  # torch 2.13 would take memory as it is, as ids beyond any table
            return tensor if isinstance(arg, torch.Tensor) else tensor.zero_()

    def _forward_metadata_inference(self, *args: Any, **kwargs: Any) -> Any:
        with _asked_for_shapes(self.submod):
            return super()._forward_metadata_inference(*args, **kwargs)

    def _backward_metadata_inference(self, *args: Any, **kwargs: Any) -> Any:
        if "loss_fn" in kwargs:  # the real one may count its inputs
            kwargs["loss_fn"] = _any_loss
        with _asked_for_shapes(self.submod):
            return cast(Any, super())._backward_metadata_inference(*args, **kwargs)

    def _shape_inference(self, *args: Any, **kwargs: Any) -> Any:
        with _asked_for_shapes(self.submod):
            return cast(Any, super())._shape_inference(*args, **kwargs)


@contextmanager
def _raising_as_is() -> Iterator[None]:
    """Raise what a stage raises, which PyTorch puts into a RuntimeError.

    In that, the trainer would recognize neither a user's mistake nor a lack of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if (raised := error.__cause__) is None:
            raise
        raise raised from raised.__cause__  # not after `error`


def _any_loss(pred: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return a differentiable number: the shapes of gradients need nothing else of a loss."""
    return torch.stack([local_tensor(t).float().sum() for t in tree_leaves(pred)]).sum()


@contextmanager
def _asked_for_shapes(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        with without_exchange(module):
            yield
    finally:
        module.train(was_training)


def prepare_stage(part: nn.Module, number: int, num_stages: int, job_config: JobConfig) -> None:
    """Check and lay out what a stage receives and hands on, by hooks on its module."""
    # Neither hidden states nor gradients may be views when they are sent.
    if number > 0:
        part.register_forward_pre_hook(_contiguous_gradients)
    part.register_forward_hook(partial(_refuse_all_but_tensors, number, job_config))
    if number < num_stages - 1:
        part.register_forward_hook(_contiguous_outputs)
        part.register_forward_hook(differentiable_outputs)
        part.register_forward_hook(_SameNumberOfOutputs(number, job_config))


def _contiguous_gradients(part: nn.Module, inputs: Any) -> None:
    for received in inputs:
        if isinstance(received, torch.Tensor) and received.requires_grad:
            received.register_hook(torch.Tensor.contiguous)


def _refuse_all_but_tensors(
    stage: int, job_config: JobConfig, part: nn.Module, args: Any, outputs: Any
) -> None:
    members = outputs if isinstance(outputs, tuple | list) else [outputs]
    others = [type(member).__name__ for member in members if not isinstance(member, torch.Tensor)]
    if others:
        fail(
            job_config,
            "model.name",
            f"forward() of pipeline stage {stage} returns {others[0]}. A stage returns a tensor, "
            "or a tuple of tensors, which the next one gets as its first arguments",
        )


def _contiguous_outputs(part: nn.Module, args: Any, outputs: Any) -> Any:
    return tree_map_only(torch.Tensor, _contiguous, outputs)


def _contiguous(output: torch.Tensor) -> torch.Tensor:
    """Return a stage's output, of any shape, as no view: split backward passes detach it."""
    copied = output._is_view()  # also one that is contiguous
    return output.clone(memory_format=torch.contiguous_format) if copied else output.contiguous()


def differentiable_outputs(part: nn.Module, args: Any, outputs: Any) -> None:
    """Let a frozen first stage receive gradients, as PyTorch's schedules have every stage do."""
    tensors = tree_leaves(outputs)
    if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in tensors):
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())


class _SameNumberOfOutputs:
    """Checks that a stage outputs as many tensors as when PyTorch planned the pipeline.

    Runs after each forward pass. The planning has the stage in evaluation mode
    (`_asked_for_shapes`).

    Raises:
        ConfigError: it does not; PyTorch would look for a receiver and raise `KeyError: 1`.
    """

    def __init__(self, stage: int, job_config: JobConfig) -> None:
        self._stage = stage
        self._config = job_config
        self._in_evaluation: int | None = None

    def __call__(self, part: nn.Module, args: Any, outputs: Any) -> None:
        count = len(outputs) if isinstance(outputs, tuple | list) else 1
        if not part.training:
            self._in_evaluation = count
        elif self._in_evaluation not in (None, count):
            fail(
                self._config,
                "model.name",
                f"stage {self._stage} of the pipeline passes on {count} tensors in training, but "
                f"{self._in_evaluation} in evaluation. forward() must pass the same number to the "
                "next stage in both, whatever self.training is; only the last stage's result may "
                "differ",
            )
