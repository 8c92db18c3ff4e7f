"""The chunked loss in a model; test_loss compares its values and gradients with the plain one."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan.components.chunked_loss import ChunkedCrossEntropy, chunked_linear_cross_entropy
from torchtitan.components.loss import IGNORE_INDEX, build_loss, cross_entropy
from torchtitan.config import JobConfig
from torchtitan.distributed.fsdp import apply_fsdp
from torchtitan.errors import ConfigError
from torchtitan.runtime.fake_world import fake_world

DIM, VOCAB, BATCH, SEQ = 8, 19, 2, 24


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(tokens).tanh())


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randint(VOCAB, (2, BATCH, SEQ), generator=generator)
    labels[0, ::3] = IGNORE_INDEX
    return tokens, labels


def chunked(model: nn.Module, chunk_size: int = 5) -> ChunkedCrossEntropy:
    loss = ChunkedCrossEntropy(chunk_size, z_loss_weight=0.01)
    loss.attach([model])
    return loss


def test_a_model_trains_as_with_the_plain_loss_under_the_same_names() -> None:
    tokens, labels = batch()
    plain, fused = Model(), Model()
    cross_entropy(plain(tokens), labels, 0.01).backward()
    loss = chunked(fused)
    loss(fused(tokens), labels).backward()
    expected = dict(plain.named_parameters())
    for name, param in fused.named_parameters():
        torch.testing.assert_close(param.grad, expected.pop(name).grad, rtol=1e-5, atol=1e-6)
    assert not expected and fused.state_dict().keys() == plain.state_dict().keys()


def test_it_has_the_gathered_weight_whatever_is_resharded_after_the_forward_pass() -> None:
    config = JobConfig()
    config.parallelism.fsdp_reshard_after_forward = "always"
    model = Model()
    model.layers = nn.ModuleDict()
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "dp_shard_cp"))
        apply_fsdp(model, mesh["dp"], config)
        chunked(model)
        model(torch.zeros(1, 3, dtype=torch.int64))
        assert not isinstance(model.output.weight, DTensor)


def test_the_last_part_of_a_pipeline_has_the_output_layer() -> None:
    first, last = Model(), Model()
    first.output = None
    loss = ChunkedCrossEntropy(5, 0.0)
    loss.attach([first, last])
    tokens, labels = batch()
    expected = cross_entropy(Model()(tokens), labels)
    torch.testing.assert_close(loss(last(tokens), labels), expected)


def test_evaluation_computes_no_gradients() -> None:
    tokens, labels = batch()
    model = Model()
    loss = chunked(model)
    with torch.no_grad(), Sizes() as sizes:
        value = loss(model(tokens), labels)
    assert not value.requires_grad
    assert (VOCAB, DIM) not in sizes.made
    torch.testing.assert_close(value, cross_entropy(Model()(tokens), labels))  # no z-loss


class Sizes(TorchDispatchMode):
    """Notes the shape of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            self.made |= {tuple(tensor.shape) for tensor in outputs}
        return result


@pytest.mark.parametrize("chunk_size", [1, 5, 24])
def test_the_logits_of_at_most_one_chunk_exist(chunk_size: int) -> None:
    tokens, labels = batch()
    model = Model()
    loss = chunked(model, chunk_size)
    with Sizes() as sizes:
        loss(model(tokens), labels).backward()
    rows = [shape[0] for shape in sizes.made if len(shape) == 2 and shape[1] == VOCAB]
    assert max(rows) == chunk_size
    assert not any(len(shape) == 3 and shape[-1] == VOCAB for shape in sizes.made)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    tensors = {
        "hidden": torch.randn(9, DIM, requires_grad=frozen != "hidden"),
        "weight": torch.randn(VOCAB, DIM, requires_grad=frozen != "weight"),
    }
    labels = torch.arange(9)
    (trained,) = tensors.keys() - {frozen}
    expected = cross_entropy(tensors["hidden"] @ tensors["weight"].T, labels)
    (grad,) = torch.autograd.grad(expected, tensors[trained])
    chunked_linear_cross_entropy(**tensors, labels=labels, chunk_size=4).backward()
    torch.testing.assert_close(tensors[trained].grad, grad, rtol=1e-5, atol=1e-6)
    assert tensors[frozen].grad is None


def test_a_batch_without_labels_has_loss_and_gradients_of_zero() -> None:
    model = Model()
    loss = chunked(model)
    value = loss(model(batch()[0]), torch.full((BATCH, SEQ), IGNORE_INDEX))
    value.backward()
    assert value == 0
    assert all(not param.grad.any() for param in model.parameters())


def test_the_config_chooses_it() -> None:
    config = JobConfig()
    config.loss.name = "chunked_cross_entropy"
    assert isinstance(build_loss(config), ChunkedCrossEntropy)


def test_an_output_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden)

    config = JobConfig()
    config.loss.name = "chunked_cross_entropy"
    model = Model()
    model.output = Doubled(model.output.in_features, model.output.out_features, bias=False)
    with pytest.raises(ConfigError, match="or a subclass that keeps its forward; Model has"):
        build_loss(config).attach([model])


def test_a_model_that_changes_its_logits_is_refused() -> None:
    """It trained on changed hidden states, without a word."""

    class Capped(Model):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return 5 * (super().forward(tokens) / 5).tanh()

    tokens, labels = batch()
    model = Capped()
    with pytest.raises(ConfigError, match="but Capped changes what that layer returns"):
        chunked(model)(model(tokens), labels)


def test_a_model_may_cast_its_logits() -> None:
    class Cast(Model):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens).float()

    tokens, labels = batch()
    model = Cast().bfloat16()
    assert chunked(model)(model(tokens), labels).isfinite()


@pytest.mark.parametrize(
    ("backend", "chunk_size", "dtype"),
    [
        ("aot_eager", 5, torch.float32),
        ("aot_eager", 48, torch.bfloat16),
        pytest.param("inductor", 5, torch.bfloat16, marks=pytest.mark.long),
    ],
)
def test_compiled_it_is_the_same_loss(backend: str, chunk_size: int, dtype: torch.dtype) -> None:
    config = JobConfig()
    config.loss.name = "chunked_cross_entropy"
    config.loss.chunk_size, config.loss.z_loss_weight = chunk_size, 0.01
    config.compile.backend = backend
    tokens, labels = batch()
    results = []
    for config.compile.enable in (False, True):
        model = Model().to(dtype)
        loss = build_loss(config)
        loss.attach([model])
        counters.clear()
        value = loss(model(tokens), labels)
        value.backward()
        assert bool(counters["stats"]["unique_graphs"]) == config.compile.enable
        with torch.no_grad():
            of_validation = loss(model(tokens), labels)
        grads = [param.grad for param in model.parameters()]
        results.append([value, of_validation, *grads])
        torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        digits = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
        torch.testing.assert_close(compiled, eager, **digits)
