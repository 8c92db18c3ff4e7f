from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.components.chunked_loss import ChunkedCrossEntropy, chunked_linear_cross_entropy
from torchtitan.components.loss import (
    IGNORE_INDEX,
    VocabShard,
    build_loss,
    check_loss,
    count_labels,
    count_of,
    cross_entropy,
    warn_of_divided_samples,
)
from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError
from torchtitan.runtime.fake_world import fake_world


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(37, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(37, (50,), generator=generator)
    labels[::7] = IGNORE_INDEX
    return hidden, weight, labels


def test_missing_labels_do_not_count() -> None:
    assert count_labels(torch.tensor([[3, IGNORE_INDEX], [-1, 0]])) == 3
    assert count_labels(torch.tensor([[0.5, torch.nan], [torch.nan, -100.0]])) == 2


def test_a_loss_may_keep_a_count_of_its_own() -> None:
    """As that of docs/own_parts.md does."""
    page = (Path(__file__).parents[3] / "docs" / "own_parts.md").read_text()
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n# loss\.py, of two terms\n(.*?)```", page, re.S)[1], names)
    loss_fn = names["build_loss"](JobConfig())
    assert count_of(loss_fn)(torch.tensor([[3, IGNORE_INDEX]])) == 1


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Weighted:
    def __init__(self) -> None:
        self.weights = nn.Parameter(torch.ones(2))

    def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return pred.sum()


def test_a_loss_is_a_function_without_parameters() -> None:
    config = JobConfig()
    for loss_fn in build_loss(config), cross_entropy, Tempered().requires_grad_(False):
        check_loss(loss_fn, config)
    for loss_fn, told in (
        (Tempered(), "Tempered with the parameters scale, which no optimizer trains"),
        (Weighted(), "Weighted with the parameters weights, which no"),
        (None, r"NoneType, which cannot be called with \(pred, labels\)"),
    ):
        with pytest.raises(ConfigError, match=f"build_loss_fn of llama3 returns {told}"):
            check_loss(loss_fn, config)


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


def test_many_chunks_in_bfloat16_add_up_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(8192, 16).bfloat16(), torch.randn(32, 16).bfloat16()
    labels = torch.randint(32, (8192,))
    exact = weight.float().requires_grad_()
    cross_entropy(hidden.float() @ exact.T, labels).backward()
    errors = []
    for chunk_size in (8192, 16):
        own = weight.clone().requires_grad_()
        chunked_linear_cross_entropy(hidden, own, labels, chunk_size).backward()
        errors.append((own.grad.float() - exact.grad).norm())
    one, many = errors
    assert many < 2 * one


@pytest.mark.parametrize("rank", range(4))
def test_tensor_parallelism_need_not_divide_the_vocabulary(rank: int) -> None:
    with fake_world(4, rank):
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
        (rows, _), (start, _) = compute_local_shape_and_global_offset((10, 4), mesh, [Shard(0)])
        shape = torch.Size((10, 4))
        local = torch.empty(rows, 4)
        weight = DTensor.from_local(local, mesh, [Shard(0)], shape=shape, stride=(4, 1))
        shard = VocabShard.of_dim(weight, 0)
        assert (shard.start, shard.is_last) == (start, rank == 3)


@pytest.mark.parametrize(
    ("label", "backend"),
    # Inductor of torch 2.11 and 2.12 counts -1 from the end; ModelInputs refuses it before.
    [
        *[(-1, "none"), (37, "none"), (-1, "eager"), (37, "eager")],
        pytest.param(37, "inductor", marks=pytest.mark.long),
    ],
)
def test_a_label_outside_the_vocabulary_is_an_error(label: int, backend: str) -> None:
    hidden, weight, labels = example()
    labels[3] = label
    loss = {
        "none": lambda: cross_entropy(hidden @ weight.T, labels, 0.01),
        "eager": lambda: chunked_linear_cross_entropy(hidden, weight, labels, 13),
        "inductor": lambda: chunked_linear_cross_entropy(hidden, weight, labels, 13, 0.0, backend),
    }
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss[backend]()


def test_each_label_is_of_one_rank_and_others_are_out_of_range() -> None:
    labels = torch.tensor([-1, 10, IGNORE_INDEX, *range(10)])
    shards = [VocabShard(None, start, start == 8) for start in (0, 4, 8)]
    sizes = [4, 4, 2]
    rows = [s.local_labels(labels, size) for s, size in zip(shards, sizes, strict=True)]
    counts = torch.stack([mine for _, mine in rows]).sum(0)
    assert counts.tolist() == [1, 1, 0, *[1] * 10]
    assert rows[0][0][0] == -1 and rows[2][0][1] == 2  # the ends, where reading fails
    for (index, mine), shard, size in zip(rows, shards, sizes, strict=True):
        assert ((index >= 0) & (index < size))[2:].all()
        assert torch.equal((index + shard.start)[3:][mine[3:]], labels[3:][mine[3:]])


def test_chunked_loss_under_autocast_computes_products_in_bfloat16() -> None:
    hidden, weight, labels = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chunked_linear_cross_entropy(hidden, weight, labels, 8)
    actual.backward()
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    expected = chunked_linear_cross_entropy(*low, labels, 8)
    expected.backward()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(hidden.grad, low[0].grad.float(), rtol=0, atol=0)
    # That of the weight is summed in float32, and stays so.
    torch.testing.assert_close(weight.grad.bfloat16(), low[1].grad, rtol=0, atol=0)
    assert not torch.equal(weight.grad, low[1].grad.float())


def test_chunked_loss_needs_an_output_layer_that_it_can_fuse() -> None:
    model = nn.Module()
    model.output = nn.Linear(4, 4, bias=True)
    with pytest.raises(ConfigError, match=r"loss\.name = 'chunked_cross_entropy'"):
        ChunkedCrossEntropy(8, 0.0).attach([model])


def test_a_loss_that_compares_samples_warns_if_a_step_has_several_micro_batches(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, config = nn.Linear(1, 1), JobConfig()
    config.training.local_batch_size = 4
    warn_of_divided_samples(model, config, 2)
    model.compares_samples = True  # type: ignore[assignment]
    warn_of_divided_samples(model, config, 1)
    assert not caplog.messages
    warn_of_divided_samples(model, config, 2)
    config.parallelism.pipeline_parallel_degree = 2
    warn_of_divided_samples(model, config, 1)
    assert "Linear.compares_samples" in caplog.messages[0]
    assert "the 4 samples of a micro-batch, not the 8 " in caplog.messages[0]
    assert "the 1 samples of a micro-batch, not the 4 " in caplog.messages[1]
