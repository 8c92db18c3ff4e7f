"""The loss on ranks that share the vocabulary is that of one process, whatever the logits are."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
from harness import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from torchtitan.components.chunked_loss import ChunkedCrossEntropy
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy
from torchtitan.distributed.parallel_styles import DeferredOutputParallel


def compare(folder: Path) -> None:
    """Ranks have 4, 4 and 3 tokens of the vocabulary, and logits that differ by hundreds."""
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    hidden, weight = torch.randn(21, 8), torch.randn(11, 8)
    labels = torch.arange(21) % 11
    labels[::5] = IGNORE_INDEX
    hidden[:10] *= 100
    for z_loss_weight in (0.0, 0.01):
        tensors = [t.clone().requires_grad_() for t in (hidden, weight)]
        expected = cross_entropy(tensors[0] @ tensors[1].T, labels, z_loss_weight)
        expected.backward()
        grads = [t.grad for t in tensors]
        own = distribute_tensor(grads[1], mesh, [Shard(0)]).to_local()

        sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        whole = distribute_tensor(hidden, mesh).requires_grad_()
        plain = cross_entropy(whole @ sharded.T, labels, z_loss_weight)
        plain.backward()
        torch.testing.assert_close(plain, expected)
        torch.testing.assert_close(whole.grad.full_tensor(), grads[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(sharded.grad.to_local(), own, rtol=1e-4, atol=1e-3)

        model = nn.Module()
        model.output = nn.Linear(8, 11, bias=False)
        model.output.weight = nn.Parameter(weight.clone())
        parallelize_module(model.output, mesh, DeferredOutputParallel())
        loss = ChunkedCrossEntropy(5, z_loss_weight)
        loss.attach([model])
        part = hidden.chunk(3)[mesh.get_local_rank()][None].requires_grad_()  # of the sequence
        chunked = loss(model.output(part), labels[None])
        chunked.backward()
        torch.testing.assert_close(chunked, expected)
        own_tokens = grads[0].chunk(3)[mesh.get_local_rank()][None]
        torch.testing.assert_close(part.grad, own_tokens, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(model.output.weight.grad.to_local(), own, rtol=1e-4, atol=1e-3)


def test_the_loss_of_a_sharded_vocabulary_is_that_of_the_whole(tmp_path: Path) -> None:
    on_ranks(3, compare, tmp_path)
