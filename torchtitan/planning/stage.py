"""Traces the micro-batches of one stage, or of a whole model if there is no pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from torchtitan.components.loss import Loss
from torchtitan.components.quantization.float8_gather import Float8Weight
from torchtitan.config import JobConfig, origin
from torchtitan.config.batch import batch_sizes
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.fsdp import fsdp_modules, mixed_precision, set_last_micro_batch
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.pipeline_split import stages_per_rank
from torchtitan.distributed.stage_copies import shared_parameters
from torchtitan.errors import ConfigError, TitanError
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.train_spec import problem_of

from .collectives import CollectiveRecorder
from .inputs import Inputs, micro_batch, step_inputs, tensors_of
from .memory import Memory, PeakMemory
from .operations import OperationRecorder
from .records import PassTrace, StageTrace


class StageTracer:
    """Traces stage `stage` of the pipeline, 0 without one; its gradients are left in place.

    Must run within `memory` and `recorder`, which must know the parameters and the optimizer's
    state.

    Args:
        inputs: form of a batch.
        handed: tensors like those from the stage before; none for the first.
        split: whether backward passes are split, see `splits_backward`.
    """

    def __init__(
        self,
        part: nn.Module,
        stage: int,
        job_config: JobConfig,
        dims: ParallelDims,
        loss_fn: Loss,
        memory: PeakMemory,
        recorder: CollectiveRecorder,
        inputs: Inputs,
        handed: tuple[torch.Tensor, ...],
        split: bool = False,
    ) -> None:
        self._part, self._config, self._dims, self._loss_fn = part, job_config, dims, loss_fn
        self._memory, self._recorder = memory, recorder
        stages = dims.pp * (stages_per_rank(job_config) if dims.pp_enabled else 1)
        self._is_first, self._is_last = stage == 0, stage == stages - 1
        self._handed, self._kinds, self._split = handed, inputs, split
        self._batch = micro_batch(job_config, dims, inputs)
        self._tokens, self._labels = self._batch["tokens"], self._batch["labels"]
        self._inputs = step_inputs(part, dims, job_config, self._batch)
        self._fsdp = fsdp_modules(part)
        self._autocast = mixed_precision(bool(self._fsdp), job_config, torch.device("cpu"))
        self._trace = StageTrace(
            parameters=sum(_local_bytes(t) for t in (*part.parameters(), *part.buffers()))
        )
        self._shared = [param for param in shared_parameters(part) if param.requires_grad]

    def run(self) -> StageTrace:
        self._trace_pipeline() if self._dims.pp_enabled else self._trace_whole()
        gradients = [param.grad for param in self._shared if param.grad is not None]
        self._trace.shared_gradients = sum(map(_local_bytes, gradients))
        return self._trace

    def kept(self) -> int:
        """Return the bytes that a forward pass keeps for its backward pass, without parameters.

        For a compiled part: `run` has recorders, under which the compiler does nothing.
        """
        entry = (self._tokens,) if self._is_first else self._hidden_states()
        saved: dict[int, torch.UntypedStorage] = {}

        def save(tensor: torch.Tensor) -> torch.Tensor:
            storage = _storage(tensor)
            saved[storage._cdata] = storage
            return tensor

        given = {_storage(tensor)._cdata for tensor in (*self._state(), *entry)}
        with saved_tensors_hooks(save, lambda tensor: tensor), self._autocast:
            out = self._part(*entry, **self._inputs)
            if self._is_last:
                out = self._loss_fn(out, self._labels)
        # Storages gathered by FSDP are parameters now, or empty.
        given |= {_storage(tensor)._cdata for tensor in self._state()}
        kept = sum(storage.nbytes() for key, storage in saved.items() if key not in given)
        return kept + (0 if self._is_last else sum(map(_local_bytes, tensors_of(out))))

    def _state(self) -> list[torch.Tensor]:
        return [*self._part.parameters(), *self._part.buffers()]

    def _trace_whole(self) -> None:
        """Trace F B, or under gradient accumulation F B F B.

        The second pair stands for all micro-batches, since it adds to gradients that are there; its
        additional collectives are those of the last micro-batch.
        """
        trace, memory = self._trace, self._memory
        base = memory.live()
        first = PassTrace(), PassTrace()
        accumulates = batch_sizes(self._config, self._dims.dp).most_passes > 1
        if accumulates:
            set_last_micro_batch(self._fsdp, False)
            self._backward(self._forward(first[0]), first[1])
        set_last_micro_batch(self._fsdp, True)
        peaks: list[dict[int, int]] = []

        def end_of_phase() -> None:
            peaks.append(memory.live_at_peak())
            memory.reset_peak()

        memory.reset_peak()
        before = memory.live()
        out = self._forward(trace.forward, end_of_phase)
        kept = memory.live().keys() - before.keys() - memory.resized
        trace.activations = sum(memory.live()[number] for number in kept)
        end_of_phase()
        self._backward(out, trace.backward)
        end_of_phase()
        gradients = memory.live().keys() - base.keys()
        if accumulates:
            for part, of_first in zip((trace.forward, trace.backward), first, strict=True):
                trace.finish.collectives += part.collectives - of_first.collectives
                part.collectives = of_first.collectives

        def purpose(number: int) -> str:
            if number in memory.resized:
                return "whole_parameters"
            if number in gradients:
                return "gradients"
            return "activations" if number in kept else "temporary"

        for sizes in peaks:
            shares: Counter[str] = Counter()
            for number in sizes.keys() - base.keys():
                shares[purpose(number)] += sizes[number]
            trace.moments.append(Memory(**shares))

    def _trace_pipeline(self) -> None:
        """Trace F0 F1 B0 B1; `PipelineStage` postpones the reduction of gradients to the end.

        F1 is like every forward pass except the first, which may gather parameters; B1 likewise.
        Where backward passes are split, F2 and both parts of its backward pass come before B1.
        """
        trace, memory = self._trace, self._memory
        base = memory.current
        first = PassTrace()
        peaks: list[int] = []

        def without_gathered(sizes: dict[int, int]) -> int:
            return sum(size for number, size in sizes.items() if number not in memory.resized)

        def end_of_phase() -> None:
            # The schedule counts whole parameters, also those that this pass gathers again.
            peaks.append(without_gathered(memory.live_at_peak()))
            memory.reset_peak()

        @contextmanager
        def backward_pass(moments: list[Memory]) -> Iterator[None]:
            start = without_gathered(memory.live())
            memory.reset_peak()
            peaks.clear()
            with torch.autocast("cpu", enabled=False):  # as in `Stage`
                yield
            end_of_phase()
            moments += [Memory(temporary=max(0, peak - start)) for peak in peaks]

        with self._autocast:  # the casts of weights serve all micro-batches
            outs = [self._forward(first, end_of_phase)]
            start = memory.current
            outs.append(self._forward(trace.forward, end_of_phase))
            trace.activations = memory.current - start
            trace.start.collectives = first.collectives - trace.forward.collectives
            for module in self._fsdp:
                # As `PipelineStage.backward_maybe_with_nosync` does.
                module.set_is_last_backward(False)
                module.set_reshard_after_backward(False)
                module.set_requires_gradient_sync(False)
            with backward_pass(trace.moments_first):
                self._backward(outs.pop(0), PassTrace())
            if self._split and not self._is_first:
                outs.append(self._forward(PassTrace(), end_of_phase))
                start = memory.current - trace.activations
                with backward_pass(trace.moments_inputs):
                    groups = self._backward_for_inputs(outs.pop())
                trace.kept_for_weights = memory.current - start
                with (
                    backward_pass(trace.moments_weights),
                    recording(self._recorder, trace.weights),
                ):
                    stage_backward_weight(self._part.parameters(), groups)
            with backward_pass(trace.moments):
                self._backward(outs.pop(0), trace.backward)
            held = memory.current
        if self._split and self._is_first:  # PyTorch has nothing to do for its inputs
            trace.weights, trace.moments_weights = trace.backward, trace.moments
            trace.kept_for_weights = trace.activations
        share = self._parameters_share() if self._fsdp else 1.0
        whole = memory.current - base
        casts = held - memory.current  # casts of weights, which were freed with autocast
        memory.reset_peak()
        with recording(self._recorder, trace.finish):
            self._reduce_gradients()
        if not self._fsdp:
            trace.between = Memory(whole_parameters=casts, gradients=whole)
            return
        gradients = memory.current - base
        reducing = memory.peak - base - whole
        parameters = whole * share
        trace.between = Memory(whole_parameters=parameters, whole_gradients=whole - parameters)
        trace.reducing = Memory(
            gradients=min(gradients, reducing), temporary=max(0, reducing - gradients)
        )

    def _parameters_share(self) -> float:
        """Return the parameters' share of FSDP's whole tensors: frozen ones have no gradients.

        The parameters must be gathered.
        """
        training = self._config.training
        sizes = [
            getattr(torch, dtype).itemsize
            for dtype in (training.mixed_precision_param, training.mixed_precision_reduce)
        ]
        params = list(self._part.parameters())
        in_float8 = [param for param in params if isinstance(local_tensor(param), Float8Weight)]
        weights = sizes[0] * sum(param.numel() for param in params)
        weights -= (sizes[0] - 1) * sum(param.numel() for param in in_float8)
        gradients = sizes[1] * sum(param.numel() for param in params if param.requires_grad)
        return weights / (weights + gradients)

    def _reduce_gradients(self) -> None:
        group = self._dims.world_mesh["pp"].get_group()
        PipelineStage(
            self._part, 0, group.size(), torch.device("cpu"), group=group
        ).perform_reduce_grad(1)

    def _forward(self, record: PassTrace, end_of_phase: Callable[[], None] | None = None) -> _Pass:
        """Run a forward pass.

        Args: end_of_phase: called around the last layer, and when backward reaches a layer.
        """
        part, trace = self._part, self._trace
        entry = (self._tokens,) if self._is_first else self._hidden_states()
        trace.hidden_in = sum(_local_bytes(tensor) for tensor in entry if tensor.requires_grad)
        handles = []
        if end_of_phase:
            layers = list(layers_of(part).values())
            handles = [
                layer.register_forward_hook(_when_gradient_comes(end_of_phase)) for layer in layers
            ]
            for last in layers[-1:]:  # a stage may have none
                handles.append(last.register_forward_pre_hook(lambda *_: end_of_phase()))
                handles.append(last.register_forward_hook(lambda *_: end_of_phase()))
        autocast = nullcontext() if self._dims.pp_enabled else self._autocast
        with recording(self._recorder, record), autocast, self._refusing_inputs(entry):
            out = part(*entry, **self._inputs)
            loss = self._loss_fn(out, self._labels) if self._is_last else None
        for handle in handles:
            handle.remove()
        trace.hidden_out = sum(map(_local_bytes, tensors_of(out))) if loss is None else 0
        return _Pass(entry, out if loss is None else None, loss)  # as in the trainer

    def _backward_for_inputs(self, done: _Pass) -> list[dict[str, Any]]:
        """Run the first part of a split backward pass; return what the second part needs."""
        outs = [done.loss] if self._is_last else list(tensors_of(done.out))
        gradients = None if self._is_last else [torch.zeros_like(out) for out in outs]
        with recording(self._recorder, self._trace.inputs):
            _, groups = stage_backward_input(
                outs, gradients, list(done.entry), self._part.parameters()
            )
        for tensor in done.entry:
            tensor.grad = None  # counted in the pipeline's buffers
        return groups

    def _backward(self, done: _Pass, record: PassTrace) -> None:
        with recording(self._recorder, record):
            if done.loss is None:
                outs = [tensor for tensor in tensors_of(done.out) if tensor.requires_grad]
                torch.autograd.backward(outs, [torch.zeros_like(out) for out in outs])
            else:
                done.loss.backward()
        for tensor in done.entry:
            tensor.grad = None  # counted in the pipeline's buffers

    def _hidden_states(self) -> tuple[torch.Tensor, ...]:
        return tuple(
            torch.zeros(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for t in self._handed
        )

    @contextmanager
    def _refusing_inputs(self, entry: tuple[torch.Tensor, ...]) -> Iterator[None]:
        """Raise `ConfigError` if a model with its own loader fails on its inputs."""
        try:
            yield
        except (TitanError, DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception as error:
            if not self._kinds.own:
                raise
            name = self._config.model.name
            given = self._kinds.describe(self._batch)
            if not self._is_first:
                given += f", and from the stage before {[list(t.shape) for t in entry]}"
            raise ConfigError(
                f"{origin(self._config, 'model.name')}: with the plan's input, {given}, "
                f"{problem_of(name, error)}"
            ) from error


class _Pass(NamedTuple):
    """A forward pass whose backward pass is still to come."""

    entry: tuple[torch.Tensor, ...]
    out: Any
    loss: Any


def _when_gradient_comes(function: Callable[[], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        for tensor in tensors_of(out):  # a frozen first layer gets no gradient
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: function())
                break

    return hook


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    local = local_tensor(tensor)
    return (local.float8 if isinstance(local, Float8Weight) else local).untyped_storage()


def _local_bytes(tensor: torch.Tensor) -> int:
    return local_tensor(tensor).nbytes


@contextmanager
def recording(recorder: CollectiveRecorder, record: PassTrace) -> Iterator[None]:
    """Add the operations and collectives within the context to `record`."""
    first = len(recorder.collectives)
    with OperationRecorder() as operations:
        yield
    record.operations.update(operations.operations)
    record.collectives.update(recorder.collectives[first:])
