"""Pipeline parallelism: spread a model's layers over groups of ranks, by PyTorch's schedules.

A stage is a copy of the model with the modules of other stages deleted, so every stage is an
instance of the same class, and names in checkpoints do not change. `split_model` assigns modules to
stages; `Pipeline` runs a batch through the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh
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

from torchtitan.config.batch import batch_shape
from torchtitan.config.load import origin
from torchtitan.distributed.block_calls import warn_of_repeated_layers
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.expert_parallel import mesh_of_experts
from torchtitan.distributed.pipeline_split import (
    schedule_splits_backward,
    split_model,
    splits_backward,
    stages_of_rank,
)
from torchtitan.distributed.pipeline_stage import Stage, prepare_stage
from torchtitan.distributed.stage_copies import copy_sharing, sharing_of
from torchtitan.errors import ConfigError, refuse_incomplete
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


def pipeline_of(built: Any, job_config: JobConfig) -> Any:
    """Return the `Pipeline`, or the like, that a `pipeline_fn` has built.

    Raises:
        ConfigError: the trainer cannot use it, such as a schedule with its stages in a tuple.
    """
    wanted = ("model_parts", "forward_backward", "evaluate")
    missing = [name for name in wanted if not hasattr(built, name)]
    needed = ". Return what torchtitan.distributed.pipeline_parallel.build_pipeline returns"
    refuse_incomplete(built, f"pipeline_fn of {job_config.model.name}", missing, needed)
    return built


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
            if 0 in pp_mesh.mesh:  # one of the ranks that have this stage
                warn_of_repeated_layers(number, part)
            prepare_stage(part, number, self._num_stages, job_config)
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

    def _loss(self, outputs: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        # Taken out of the list, so that the logits are gone before the backward pass.
        return self._loss_fn(outputs.pop(), labels) / self._divisor

    def _build_schedule(self, local_batch_size: int) -> Any:
        parallelism, group = self._config.parallelism, self._pp_mesh.get_group()
        stages = [
            Stage(part, number, self._num_stages, device(), group=group, dw_builder=self._weights)
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
        if isinstance(whole, DTensor) and grad.shape != local.shape:
            # Split, of a whole weight, such as a factor of low rank beside a row-wise matrix.
            param.grad = whole = whole.redistribute(placements=cast(Any, param).placements)
            grad = whole.to_local()
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
