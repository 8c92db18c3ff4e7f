"""Pipeline parallelism: spread a model's layers over groups of ranks, by PyTorch's schedules.

A stage is a copy of the model with the modules of other stages deleted, so every stage is an
instance of the same class, and names in checkpoints do not change. `split_model` assigns modules to
stages; `Pipeline` runs a batch through the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FULL_BACKWARD,
    RECV_B,
    REDUCE_GRAD,
    SEND_B,
    PipelineScheduleSingle,
    _PipelineScheduleRuntime,
    get_schedule_class,
)
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torchtitan.config.batch import batch_shape
from torchtitan.config.load import fail, origin
from torchtitan.distributed.block_calls import warn_of_repeated_layers
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.expert_parallel import mesh_of_experts, without_exchange
from torchtitan.distributed.pipeline_split import (
    schedule_splits_backward,
    split_model,
    splits_backward,
    stages_of_rank,
)
from torchtitan.distributed.stage_copies import copy_sharing, sharing_of
from torchtitan.errors import ConfigError
from torchtitan.runtime.device import device
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.components.loss import Loss
    from torchtitan.config import JobConfig
    from torchtitan.distributed.parallel_dims import ParallelDims


FIRST_MODULES = ("tok_embeddings",)
LAST_MODULES = ("norm", "output")


def build_pipeline(
    model: nn.Module,
    world_mesh: DeviceMesh,
    parallel_dims: ParallelDims,
    job_config: JobConfig,
    parallelize_fn: Callable[..., nn.Module],
    loss_fn: Loss,
    first_modules: tuple[str, ...] = FIRST_MODULES,
    last_modules: tuple[str, ...] = LAST_MODULES,
) -> Pipeline:
    """Split `model`, parallelize this rank's stages, and prepare the schedule.

    This is a `TrainSpec.pipeline_fn`. Models whose modules have other names pass these with
    `functools.partial`.

    Args:
        model: on the meta device; its layers are in `model.layers`.
        parallelize_fn: applied to each stage.
        loss_fn: applied by the last stage.
        first_modules: modules and bare parameters before the layers, in the order of the forward
            pass. They stay together in the first stage, unless a split point is among them.
        last_modules: those after the layers; likewise in the last stage. Any module may be absent.
            Of all these modules, several stages may share weights: see `stage_copies`.

    Raises:
        ConfigError: the model has too few layers, cannot be cut at the split points, or shares
            weights of layers between stages; or the CSV of the schedule is malformed.
    """
    pp_mesh = world_mesh["pp"]
    mesh_of_experts(model, parallel_dims)  # made by all ranks, also those whose stages have none
    stages = stages_of_rank(job_config, pp_mesh.get_local_rank())
    parts = split_model(model, job_config, stages, first_modules, last_modules)
    parallel = [parallelize_fn(part, world_mesh, parallel_dims, job_config) for part in parts]
    for part, made in zip(parts, parallel, strict=True):
        copy_sharing(made, sharing_of(part))
    return Pipeline(parallel, stages, pp_mesh, job_config, loss_fn)


def modules_around_layers(
    pipeline_fn: Callable[..., Any] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return `first_modules` and `last_modules` of a `TrainSpec.pipeline_fn`, or the defaults."""
    chosen = getattr(pipeline_fn, "keywords", {})  # of a functools.partial
    first = chosen.get("first_modules", FIRST_MODULES)
    return first, chosen.get("last_modules", LAST_MODULES)


class Pipeline:
    """This rank's stages of the model, and the schedule that runs micro-batches through them.

    Args:
        model_parts: the stages, parallelized.
        stages: their numbers.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        stages: list[int],
        pp_mesh: DeviceMesh,
        job_config: JobConfig,
        loss_fn: Loss,
    ) -> None:
        self.model_parts = model_parts
        self._stages = stages
        self._pp_mesh = pp_mesh
        self._config = job_config
        self._loss_fn = loss_fn
        self._microbatch_size = job_config.parallelism.pipeline_parallel_microbatch_size
        self._num_stages = len(stages) * pp_mesh.size()
        self._is_first = 0 in stages
        self._is_last = self._num_stages - 1 in stages
        self._divisor: torch.Tensor | float = 1.0
        self._weights = None if splits_backward(job_config) else _nothing_left
        if self._weights and schedule_splits_backward(job_config):
            rank0.warning(
                "the pipeline schedule fills less of its bubble: with activation checkpointing or "
                "compilation, backward passes are not split into those for inputs and for weights"
            )
        for number, part in zip(stages, model_parts, strict=True):
            warn_of_repeated_layers(number, part)
            # Neither hidden states nor gradients may be views when they are sent.
            if number > 0:
                part.register_forward_pre_hook(_contiguous_gradients)
            part.register_forward_hook(partial(_refuse_all_but_tensors, number, job_config))
            if number < self._num_stages - 1:
                part.register_forward_hook(_contiguous_outputs)
                part.register_forward_hook(_SameNumberOfOutputs(number, job_config))
        # Training and evaluation have their own schedules: torch plans the communication anew
        # whenever one schedule switches between them.
        self._training = self._build_schedule(job_config.training.local_batch_size)
        self._evaluation: Any = None

    def forward_backward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        inputs: dict[str, torch.Tensor],
        divisor: torch.Tensor,
    ) -> torch.Tensor:
        """Train on `[local_batch_size, seq]` tokens; gradients accumulate in the parameters.

        Args:
            inputs: the other inputs of the model's forward, each `[local_batch_size, seq]`.
            divisor: what the summed loss is divided by.

        Returns:
            The loss divided by `divisor`, a scalar; 0 on ranks without the last stage.
        """
        self._divisor = divisor
        loss = self._run(self._training.step, tokens, labels, inputs)
        for part in self.model_parts:
            _lay_out_gradients_like_weights(part)
        return loss

    @torch.no_grad()
    def evaluate(
        self, tokens: torch.Tensor, labels: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Sum the loss of `[validation.local_batch_size, seq]` tokens; 0 without last stage."""
        if self._evaluation is None:
            self._evaluation = self._build_schedule(batch_shape(self._config, "validation")[0])
            _drop_backward(self._evaluation)
        self._divisor = 1.0
        return self._run(self._evaluation.eval, tokens, labels, inputs)

    def _run(
        self,
        run: Callable[..., Any],
        tokens: torch.Tensor,
        labels: torch.Tensor,
        inputs: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        losses: list[torch.Tensor] | None = [] if self._is_last else None
        try:
            run(
                *([tokens] if self._is_first else []),
                target=labels if self._is_last else None,
                losses=losses,
                return_outputs=False,
                **inputs,
            )
        except RuntimeError as error:
            if isinstance(error.__cause__, ConfigError):  # from a stage; PyTorch adds its arguments
                raise error.__cause__ from None
            if "'_input_metadata' is invalid" not in str(error):
                raise
            raise ConfigError(
                f"{origin(self._config, 'parallelism.pipeline_parallel_schedule')}: PyTorch "
                f"{torch.__version__} cannot split the backward pass of this model, which has a "
                "torch.autograd.Function with weights (float8 layers have). Use PyTorch 2.13, or a "
                "schedule that does not split it: '1F1B' or 'Interleaved1F1B'"
            ) from error
        if losses is None:
            return torch.zeros((), device=tokens.device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    def _loss(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._loss_fn(pred, labels) / self._divisor

    def _build_schedule(self, local_batch_size: int) -> Any:
        parallelism, group = self._config.parallelism, self._pp_mesh.get_group()
        stages = [
            _Stage(part, number, self._num_stages, device(), group=group, dw_builder=self._weights)
            for number, part in zip(self._stages, self.model_parts, strict=True)
        ]
        csv = parallelism.pipeline_parallel_schedule_csv
        usual = parallelism.pipeline_parallel_schedule
        schedule_class = _PipelineScheduleRuntime if csv else get_schedule_class(usual)
        single = issubclass(schedule_class, PipelineScheduleSingle)
        schedule = schedule_class(
            stages[0] if single else stages,
            n_microbatches=local_batch_size // self._microbatch_size,
            loss_fn=self._loss,
            scale_grads=False,  # the loss is divided by the tokens of the whole step
        )
        if csv:
            try:
                schedule._load_csv(csv)
            except (OSError, ValueError, RuntimeError, AssertionError, KeyError) as error:
                key = origin(self._config, "parallelism.pipeline_parallel_schedule_csv")
                raise ConfigError(f"{key}: not a schedule for this run: {error}") from error
        return schedule


def _nothing_left() -> Callable[..., None]:
    """Return what to do for the gradients of weights, after a whole backward pass."""
    return lambda: None


@torch.no_grad()
def _lay_out_gradients_like_weights(part: nn.Module) -> None:
    """Copy gradients whose strides are not their parameter's.

    `backward()` does so itself. Schedules that compute the gradients of weights separately store
    the results of `torch.autograd.grad`, and fused optimizers then silently pair the wrong numbers
    (seen with torch 2.13).
    """
    for param in part.parameters():
        if param.grad is None:
            continue
        whole = param.grad
        local, grad = (local_tensor(t) for t in (param, whole))
        if grad.stride() == local.stride():
            continue
        grad = torch.empty_like(local).copy_(grad)
        if isinstance(whole, DTensor):
            grad = DTensor.from_local(
                grad,
                whole.device_mesh,
                whole.placements,
                shape=param.shape,
                stride=param.stride(),
            )
        param.grad = grad


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


def _drop_backward(schedule: Any) -> None:
    """Leave only forward actions in a schedule; PyTorch's `eval` fails on those of V schedules."""
    if not isinstance(schedule, _PipelineScheduleRuntime):
        return
    backward = (FULL_BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, SEND_B, RECV_B, REDUCE_GRAD)
    for rank, actions in schedule.pipeline_order_with_comms.items():
        single = [part for action in actions for part in action.sub_actions or [action]]
        schedule.pipeline_order_with_comms[rank] = [
            action for action in single if action.computation_type not in backward
        ]


class _Stage(PipelineStage):
    """A stage that is in eval mode while PyTorch infers the shapes of its outputs.

    The inference is a forward pass with the first micro-batch, after the first stage with zeros
    (torch 2.13 adds a backward pass). It must not count as training, for example in the load
    statistics of experts, and it sends no rows to experts. The backward pass needs the same mode:
    activation checkpointing runs the forward pass again.
    """

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Return the operations that connect the stage to other ranks.

        The two stages in the middle of a V are on one rank, which torch 2.11 would have gloo
        connect to itself.
        """
        ops = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]

    _sent: list[torch.Size] | None = None
    """Shapes for which the next stage has buffers."""

    def backward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        """Run a backward pass outside of autocast, which has its dtypes from the forward pass.

        Within it, products that were computed in float32 would be differentiated in bfloat16.
        """
        with torch.autocast(self.device.type, enabled=False):
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
