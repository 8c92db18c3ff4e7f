"""Fuse cross entropy with the output layer, without ever holding the logits of all tokens.

PyTorch's own `F.linear_cross_entropy` (2.13) works alike, but is not in 2.11, and has
neither a z-loss nor a vocabulary that tensor parallelism shards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from torchtitan.components.loss import IGNORE_INDEX, VocabShard, of_training
from torchtitan.distributed.parallel_styles import LOSS_NOT_ATTACHED
from torchtitan.errors import ConfigError


class ChunkedCrossEntropy:
    """`chunked_linear_cross_entropy` with the weight of the model's output layer.

    Once attached, the model returns the input of its output layer, hidden states
    `[batch, seq, dim]`, and this loss applies the layer. Parameters keep their names.
    """

    def __init__(self, chunk_size: int, z_loss_weight: float, backend: str | None = None) -> None:
        self._chunk_size = chunk_size
        self._z_loss_weight = z_loss_weight
        self._backend = backend
        self._output: nn.Linear | None = None
        self._name = ""
        self._hidden: torch.Tensor | None = None
        """The input of the output layer, in the first pass until the loss is called."""
        self._is_first_pass = True

    def attach(self, model_parts: list[nn.Module]) -> None:
        """Take over `model.output` in place. A pipeline stage without one is left unchanged.

        Raises:
            ConfigError: a part has no output layer that can be fused.
        """
        for part in model_parts:
            output = getattr(part, "output", part)
            if output is None:
                continue
            fits = isinstance(output, nn.Linear) and type(output).forward is nn.Linear.forward
            if not fits or output.bias is not None:
                raise ConfigError(
                    "loss.name = 'chunked_cross_entropy' needs a model whose logits are "
                    "`self.output(hidden)`, where `output` is an `nn.Linear` without bias, or a "
                    f"subclass that keeps its forward; {type(part).__name__} has none. Use "
                    "loss.name = 'cross_entropy'"
                )
            output.forward = self._pass_on
            if isinstance(output, FSDPModule):
                # The loss needs the gathered weight after the layer's forward.
                output.set_reshard_after_forward(False, recurse=False)
            self._output, self._name = output, type(part).__name__

    def _pass_on(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._is_first_pass and not torch.compiler.is_compiling():
            self._hidden = hidden
        return hidden

    def _refuse_other_logits(self, pred: torch.Tensor) -> None:
        """Refuse a model that changes the logits, since it has changed hidden states instead."""
        hidden, self._hidden, self._is_first_pass = self._hidden, None, False
        if hidden is None or pred is hidden or pred.shape != hidden.shape:
            return
        if isinstance(pred, FakeTensor):  # planning a run
            return
        if not torch.allclose(pred.to(hidden.dtype), hidden, rtol=0, atol=0, equal_nan=True):
            raise ConfigError(
                "loss.name = 'chunked_cross_entropy' applies the output layer itself, but "
                f"{self._name} changes what that layer returns, as a soft cap of the logits does. "
                "Use loss.name = 'cross_entropy'"
            )

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss.

        Raises:
            ConfigError: the last model part is not attached, or changes the logits.
        """
        if self._output is None:
            raise ConfigError(LOSS_NOT_ATTACHED)
        self._refuse_other_logits(pred)
        return chunked_linear_cross_entropy(
            pred.flatten(end_dim=-2),
            self._output.weight,
            labels.flatten(),
            self._chunk_size,
            of_training(self._z_loss_weight),
            self._backend,
        )


def chunked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int,
    z_loss_weight: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute `cross_entropy(hidden @ weight.T, labels, z_loss_weight)` in chunks of tokens.

    The forward pass also computes the gradients of `hidden` and `weight`, and turns a chunk's
    logits into their gradient in place, so at most one chunk of logits exists.

    Args:
        hidden: `[tokens, dim]`, plain tensor. Matrix products use its dtype, or autocast's under
            autocast.
        weight: `[vocab, dim]`. A DTensor on a one-dimensional mesh means tensor parallelism: each
            rank applies its part of the vocabulary to the same `hidden`. Then the gradient of
            `hidden` on each rank is a *partial* sum, which the caller must reduce over the mesh.
        labels: `[tokens]` int64.
        chunk_size: tokens whose logits are held at once.
        z_loss_weight: as in `cross_entropy`.
        backend: `torch.compile` backend of the operations between the matrix products. None, or
            tensor parallelism, runs them eagerly.

    Returns:
        The sum over valid tokens, a float32 scalar. It can be differentiated once.
    """
    shard = VocabShard()
    if isinstance(weight, DTensor):
        shard = VocabShard.of_dim(weight, 0)
        weight = weight.redistribute(placements=[Shard(0)]).to_local()
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # autocast ignores products with `out`
        hidden = hidden.to(torch.get_autocast_dtype(device))
    if shard.mesh is not None:  # the ranks communicate between the products
        backend = None
    # Gradients are always off inside the autograd function, so it gets this as an argument.
    training = torch.is_grad_enabled()
    return _ChunkedLinearCrossEntropy.apply(
        hidden, weight, labels, shard, chunk_size, z_loss_weight, training, backend
    )


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        shard: VocabShard,
        chunk_size: int,
        z_loss_weight: float,
        training: bool,
        backend: str | None,
    ) -> torch.Tensor:
        hidden_grad = weight_grad = None
        if training and ctx.needs_input_grad[0]:
            hidden_grad = torch.empty_like(hidden)
        if training and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        grad_dtype = None if hidden_grad is None and weight_grad is None else hidden.dtype
        # Cast here, so that autocast's rounding of the weight does not round its gradient too.
        weight_dtype, weight = weight.dtype, weight.to(hidden.dtype)

        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        rows = min(chunk_size, len(hidden))
        # Compiled code fuses the operations between the products, so it needs no float32 buffer.
        buffer = None
        if backend is None:
            buffer = torch.empty(rows, len(weight), dtype=torch.float32, device=hidden.device)
        between = _between_products if backend is None else _compiled_between_products(backend)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = _product(hidden[chunk], weight.T, buffer)
            chunk_loss, logits_grad = between(
                logits, labels[chunk], shard, z_loss_weight, grad_dtype
            )
            loss += chunk_loss
            if logits_grad is None:
                continue
            if hidden_grad is not None:
                torch.mm(logits_grad, weight, out=hidden_grad[chunk])
            if weight_grad is not None:
                add_product(logits_grad.T, hidden[chunk], to=weight_grad)

        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight_dtype
        return loss

    @staticmethod
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place, to avoid a second copy of the weight's gradient.
        if hidden_grad is not None:
            hidden_grad.mul_(loss_grad)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(loss_grad).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _between_products(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shard: VocabShard,
    z_loss_weight: float,
    grad_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the loss and the logits' gradient, between the forward and backward products.

    Args:
        logits: `[rows, vocab of this rank]`. Overwritten if float32, unless this is compiled.
        labels: `[rows]` int64.
        grad_dtype: dtype of the gradient; None if it is not needed.

    Returns:
        The sum of the loss, a float32 scalar, and the gradient, shaped like `logits`, if needed.
    """
    compiled = torch.compiler.is_compiling()
    logits = logits.to(torch.float32, copy=compiled)
    valid = labels != IGNORE_INDEX
    target_logit = shard.target_logit(logits, labels)
    peak, total = shard.exponentials_(logits)
    log_partition = peak + total.log()
    losses = log_partition - target_logit + z_loss_weight * log_partition.square()
    loss = losses.where(valid, 0).sum()
    if grad_dtype is None:
        return loss, None

    # d loss / d logits = softmax * (1 + 2 z log_partition) - one_hot(label)
    softmax_factor = (1 + 2 * z_loss_weight * log_partition).where(valid, 0)
    logits.mul_((softmax_factor / total)[:, None])
    index, mine = shard.local_labels(labels, logits.size(-1))
    if compiled:  # fused into the kernel that writes the gradient; a scatter would not be
        vocabulary = torch.arange(logits.size(-1), device=logits.device)
        logits -= ((vocabulary == index[:, None]) & mine[:, None]).float()
    else:
        logits.scatter_add_(-1, index[:, None], -mine.float()[:, None])
    return loss, logits.to(grad_dtype)


@cache
def _compiled_between_products(
    backend: str,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    return torch.compile(_between_products, backend=backend, fullgraph=True)


def _product(a: torch.Tensor, b: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    """Return `a @ b`, in the first rows of `buffer` if given.

    The buffer is float32 with at least the rows of `a` and the columns of `b`.
    """
    if buffer is None:
        return a @ b
    out = buffer[: len(a)]
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    return out.copy_(a @ b)  # `torch.mm` needs `out` in the dtype of its inputs


def add_product(a: torch.Tensor, b: torch.Tensor, to: torch.Tensor) -> None:
    """Compute `to += a @ b` in float32."""
    if a.dtype == torch.float32:
        to.addmm_(a, b)
    elif to.is_cuda and torch.version.hip is None:  # NVIDIA's kernels add unrounded products
        torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
    else:
        to += a @ b
