"""Compute cross entropy with an optional z-loss, on whole logits or vocabulary shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from torchtitan.errors import ConfigError
from torchtitan.tools.logging import rank0
from torchtitan.tools.text import few

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

IGNORE_INDEX = -100
"""Label of a position without a prediction target."""


class Loss(Protocol):
    """Interface that `build_loss_fn` returns; a plain function will do, as `attach` is optional.

    A loss may also have `count_labels(labels) -> torch.Tensor`, a scalar int64: the trainer divides
    the loss of a step by the sum of this over its batches, and so do validation on texts and
    `eval`. By default, it is the function below.

    A loss may also have `metrics() -> dict[str, tuple[float, float]]`, which all ranks call when a
    step is logged. It maps each name to a sum since the last call and the number of summands. The
    logged value is the total of the sums divided by the total of the numbers, over all ranks. Do
    not count evaluation, which runs without gradients.
    """

    def attach(self, model_parts: list[nn.Module]) -> None:
        """Prepare the parallelized model parts of this rank. Called once, before training.

        Raises:
            ConfigError: the loss cannot be used with this model.
        """

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the sum (not the mean) of the loss over valid tokens, a float32 scalar.

        Args:
            pred: output of the model, `[batch, seq, ...]`; under tensor parallelism it may be a
                DTensor sharded over the vocabulary.
            labels: `[batch, seq]` int64, `IGNORE_INDEX` at positions without a target; or other
                labels of the model's data loader, `[batch, seq, ...]`.
        """


def count_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the number of labels that count, a scalar int64: not `IGNORE_INDEX`, nor NaN."""
    missing = labels.isnan() if labels.is_floating_point() else labels == IGNORE_INDEX
    return labels.numel() - missing.sum()


def count_of(loss_fn: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return how a loss counts labels, see `Loss`."""
    return getattr(loss_fn, "count_labels", count_labels)


def warn_of_divided_samples(model: nn.Module, job_config: JobConfig, accumulated: int) -> None:
    """Warn on rank 0 if the loss compares samples, but those of a step are passed in parts.

    Args:
        accumulated: the number of batches of a rank in a step.
    """
    parallelism, samples = job_config.parallelism, job_config.training.local_batch_size
    micro = samples
    if parallelism.pipeline_parallel_degree > 1:
        micro = parallelism.pipeline_parallel_microbatch_size
    if getattr(model, "compares_samples", False) and micro < samples * accumulated:
        rank0.warning(
            "%s.compares_samples is True: the loss compares the %d samples of a micro-batch, not "
            "the %d that a rank has in a step, so losses differ from those of a step without "
            "gradient accumulation and pipeline",
            *(type(model).__name__, micro, samples * accumulated),
        )


def check_loss(loss_fn: Any, job_config: JobConfig) -> None:
    """Raise `ConfigError` if an author's loss is no function, or would have to be trained."""
    made = f"build_loss_fn of {job_config.model.name} returns {type(loss_fn).__name__}"
    if not callable(loss_fn):
        raise ConfigError(f"{made}, which cannot be called with (pred, labels)")
    is_module = isinstance(loss_fn, nn.Module)
    held = dict(loss_fn.named_parameters()) if is_module else getattr(loss_fn, "__dict__", {})
    if own := [n for n, v in held.items() if isinstance(v, nn.Parameter) and v.requires_grad]:
        raise ConfigError(
            f"{made} with the parameters {few(own)}, which no optimizer trains and no checkpoint "
            "has. Put them into a module of the model, which returns them beside its output in "
            "training"
        )


def attach_loss(loss_fn: Any, model_parts: list[nn.Module]) -> None:
    """Call `attach` of a loss, if it has one."""
    attach = getattr(loss_fn, "attach", None)
    if attach is not None:
        attach(model_parts)


def build_loss(job_config: JobConfig) -> Loss:
    """Return the loss named by `loss.name`, compiled if `compile` includes it."""
    # Imported here because that module imports this one.
    from torchtitan.components.chunked_loss import ChunkedCrossEntropy

    config, compile_config = job_config.loss, job_config.compile
    backend = compile_config.backend if compile_config.compiles("loss") else None
    if config.name == "chunked_cross_entropy":
        return ChunkedCrossEntropy(config.chunk_size, config.z_loss_weight, backend)
    return CrossEntropy(config.z_loss_weight, backend)


def of_training(z_loss_weight: float) -> float:
    """Return the weight, or 0 without gradients: validation reports cross entropy alone."""
    return z_loss_weight if torch.is_grad_enabled() else 0.0


class CrossEntropy:
    """Cross entropy of the logits that the model returns, `[batch, seq, vocab]`."""

    def __init__(self, z_loss_weight: float, backend: str | None = None) -> None:
        self._z_loss_weight = z_loss_weight
        self._function = cross_entropy
        if backend is not None:
            self._function = torch.compile(cross_entropy, backend=backend)

    def attach(self, model_parts: list[nn.Module]) -> None:
        """Do nothing."""

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._function(pred, labels, of_training(self._z_loss_weight))


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, z_loss_weight: float = 0.0
) -> torch.Tensor:
    """Return cross entropy plus `z_loss_weight` * squared log-partition, summed over valid tokens.

    The z-loss keeps the logits from drifting (PaLM, arXiv:2204.02311, section 5).

    Args:
        logits: `[..., vocab]` of any float dtype; the loss is computed in float32. A DTensor on a
            one-dimensional mesh stays sharded over the vocabulary: only per-token values are
            communicated (Megatron-LM, arXiv:1909.08053), and all ranks return the same loss.
        labels: `[...]` int64, the same on all ranks of the mesh.
        z_loss_weight: 0 turns the z-loss off.

    Returns:
        A float32 scalar, plain tensor.
    """
    labels = labels.flatten()
    shard = VocabShard()
    if isinstance(logits, DTensor):
        shard = VocabShard.of_dim(logits, logits.ndim - 1)
        logits = logits.redistribute(placements=[Shard(logits.ndim - 1)]).to_local()
    logits = logits.flatten(end_dim=-2).float()
    if shard.mesh is None and z_loss_weight == 0:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    log_partition, target_logit = shard.log_partition_and_target(logits, labels)
    loss = log_partition - target_logit + z_loss_weight * log_partition.square()
    return loss.where(labels != IGNORE_INDEX, 0).sum()


@dataclass(frozen=True)
class VocabShard:
    """The part of the vocabulary whose logits this rank holds; by default all of it."""

    mesh: DeviceMesh | None = None
    """One-dimensional mesh of the ranks that share the vocabulary."""
    start: int = 0
    """First token of this rank's part."""
    is_last: bool = True
    """Whether no other rank has tokens after this part."""

    @classmethod
    def of_dim(cls, tensor: DTensor, dim: int) -> VocabShard:
        """Return this rank's part of a tensor whose dimension `dim` is the vocabulary."""
        mesh = tensor.device_mesh
        part = -(-tensor.size(dim) // mesh.size())  # as `Shard` divides: the last part is smaller
        rank = mesh.get_local_rank()
        return cls(mesh, part * rank, rank == mesh.size() - 1)

    def log_partition_and_target(
        self, logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each token's log-partition over all ranks, and the logit of its label.

        Args:
            logits: `[tokens, vocab of this rank]` float32.
            labels: `[tokens]` int64; the target logit of ignored labels is 0.

        Returns:
            Two `[tokens]` float32 tensors, the same on all ranks of the mesh. Differentiable.
        """
        log_partition = logits.logsumexp(-1)
        if self.mesh is not None:
            peak = self._reduce(log_partition.detach(), "max")
            log_partition = peak + self._reduce((log_partition - peak).exp()).log()
        return log_partition, self.target_logit(logits, labels)

    def exponentials_(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace `logits` by `exp(logits - peak)` in place, to avoid a second tensor of that size.

        Returns:
            `peak` and the sum of the exponentials over all ranks, each `[tokens]` float32.
        """
        peak = self._reduce(logits.amax(-1), "max")
        total = self._reduce(logits.sub_(peak[:, None]).exp_().sum(-1))
        return peak, total

    def target_logit(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the logit of each label, `[tokens]` float32, alike on all ranks; 0 if ignored."""
        index, mine = self.local_labels(labels, logits.size(-1))
        return self._reduce(logits.gather(-1, index[:, None]).squeeze(-1).where(mine, 0))

    def local_labels(self, labels: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return labels as indices into this rank's `size` logits, and a mask of this rank's.

        Other labels get index 0, but those outside of the vocabulary one that is out of range, so
        that they are an error, as in PyTorch's cross entropy. Shapes: `[tokens]` int64 ->
        `[tokens]` int64 and bool.
        """
        index = labels - self.start
        mine = labels != IGNORE_INDEX
        if self.start > 0:
            mine = mine & (index >= 0)
        if not self.is_last:
            mine = mine & (index < size)
        return index.where(mine, 0), mine

    def _reduce(self, values: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """All-reduce `values`. All ranks compute the same from it, so its gradient is unchanged."""
        if self.mesh is None:
            return values
        return DTensor.from_local(values, self.mesh, [Partial(op)], run_check=False).full_tensor()
