from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from torchtitan.components.chunked_loss import ChunkedCrossEntropy, chunked_linear_cross_entropy
from torchtitan.components.loss import IGNORE_INDEX, build_loss, cross_entropy
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(37, (50,), generator=generator)
    labels[::7] = IGNORE_INDEX
    return hidden, weight, labels


def test_cross_entropy_is_the_sum_over_valid_tokens() -> None:
    hidden, weight, labels = example()
    logits = hidden @ weight.T
    valid = labels != IGNORE_INDEX
    expected = F.cross_entropy(logits[valid], labels[valid], reduction="sum")
    torch.testing.assert_close(cross_entropy(logits.view(5, 10, 37), labels.view(5, 10)), expected)


def test_z_loss_adds_the_squared_log_partition() -> None:
    hidden, weight, labels = example()
    logits = hidden @ weight.T
    valid = labels != IGNORE_INDEX
    extra = cross_entropy(logits, labels, 0.01) - cross_entropy(logits, labels)
    torch.testing.assert_close(extra, 0.01 * logits[valid].logsumexp(-1).square().sum())


@pytest.mark.parametrize("name", ["cross_entropy", "chunked_cross_entropy"])
def test_the_loss_of_validation_has_no_z_loss(name: str) -> None:
    config = JobConfig()
    config.loss.name, config.loss.z_loss_weight = name, 0.01
    model = nn.Module()
    model.output = nn.Linear(16, 37, bias=False)
    plain, loss = config.loss, build_loss(config)
    loss.attach([model])
    hidden, weight, labels = example()
    model.output.weight = nn.Parameter(weight.detach())
    logits = hidden @ weight.T
    pred = (hidden if name == "chunked_cross_entropy" else logits)[None]
    assert plain.z_loss_weight and loss(pred, labels[None]) > cross_entropy(logits, labels)
    with torch.no_grad():
        torch.testing.assert_close(loss(pred, labels[None]), cross_entropy(logits, labels))


@pytest.mark.parametrize("chunk_size", [1, 13, 50, 1000])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
def test_chunked_loss_and_gradients_equal_the_plain_ones(
    chunk_size: int, z_loss_weight: float
) -> None:
    hidden, weight, labels = example()
    plain = cross_entropy(hidden @ weight.T, labels, z_loss_weight) / 7
    expected = torch.autograd.grad(plain, (hidden, weight))
    chunked = chunked_linear_cross_entropy(hidden, weight, labels, chunk_size, z_loss_weight) / 7
    actual = torch.autograd.grad(chunked, (hidden, weight))
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_chunked_loss_in_bfloat16_is_close() -> None:
    hidden, weight, labels = example(torch.bfloat16)
    plain = cross_entropy(hidden @ weight.T, labels)
    chunked = chunked_linear_cross_entropy(hidden, weight, labels, 8)
    torch.testing.assert_close(chunked, plain, rtol=1e-2, atol=0)
    expected, actual = (torch.autograd.grad(loss, weight)[0] for loss in (plain, chunked))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_chunked_loss_under_autocast_computes_products_in_bfloat16() -> None:
    hidden, weight, labels = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chunked_linear_cross_entropy(hidden, weight, labels, 8)
    actual.backward()
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    expected = chunked_linear_cross_entropy(*low, labels, 8)
    expected.backward()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for ours, theirs in zip((hidden, weight), low, strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=0, atol=0)


def test_chunked_loss_needs_an_output_layer_that_it_can_fuse() -> None:
    model = nn.Module()
    model.output = nn.Linear(4, 4, bias=True)
    with pytest.raises(ConfigError, match=r"loss\.name = 'chunked_cross_entropy'"):
        ChunkedCrossEntropy(8, 0.0).attach([model])
