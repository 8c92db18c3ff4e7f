from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.utils.parametrizations import weight_norm

from torchtitan.config import load_config
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.parallel_styles import (
    DeferredOutputParallel,
    EmbeddingParallel,
    HeadwiseParallel,
    embed_own,
)
from torchtitan.distributed.tensor_parallel import _with_whole_sequence, apply_tensor_parallel
from torchtitan.errors import ConfigError
from torchtitan.models.deepseek_v3.infra.parallelize import apply_tp
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.runtime.fake_world import fake_world

TP2 = load_config(["--parallelism.tensor_parallel_degree=2"])
SHARDED = {
    "norm": SequenceParallel(),
    "attention": PrepareModuleInput(
        input_layouts=(Shard(1), None),
        desired_input_layouts=(Replicate(), None),
        input_kwarg_layouts={"x": Shard(1)},
        desired_input_kwarg_layouts={"x": Replicate()},
    ),
    "wq": ColwiseParallel(),
    "wo": RowwiseParallel(output_layouts=Shard(1)),
    "moe": PrepareModuleInputOutput(
        input_layouts=(Shard(1),),
        desired_input_layouts=(Replicate(),),
        output_layouts=(Replicate(),),
        desired_output_layouts=(Shard(1),),
    ),
    "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1)),
    "deferred": DeferredOutputParallel(),
}


def test_a_plan_for_whole_sequences_leaves_all_else():
    whole = _with_whole_sequence(SHARDED)
    assert whole["norm"].sequence_sharding == (Replicate(),)
    assert whole["attention"].input_layouts == (Replicate(), None)
    assert whole["attention"].input_kwarg_layouts == {"x": Replicate()}
    assert vars(whole["wq"]) == vars(SHARDED["wq"])
    assert whole["wo"].input_layouts == (Shard(-1),)
    assert whole["wo"].output_layouts == (Replicate(),)
    assert whole["moe"].prepare_module_input.input_layouts == (Replicate(),)
    assert whole["moe"].prepare_module_output.desired_output_layouts == (Replicate(),)
    assert whole["output"].input_layouts == (Replicate(),)
    assert whole["output"].output_layouts == (Shard(-1),)
    assert whole["deferred"].input_layouts == (Replicate(),)


def test_the_plan_itself_stays_as_it_was():
    _with_whole_sequence(SHARDED)
    assert SHARDED["norm"].sequence_sharding == (Shard(1),)
    assert SHARDED["moe"].prepare_module_input.input_layouts == (Shard(1),)


@pytest.mark.parametrize("padding_idx", [None, 0, 1])
@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (7, 3), (2, 4)])
def test_embeddings_and_gradients_of_the_ranks_add_up(
    rows: int, ranks: int, padding_idx: int | None
):
    whole = torch.randn(rows, 4, requires_grad=True)
    tokens = torch.randint(0, rows, (2, 16))
    wanted = F.embedding(tokens, whole, padding_idx)
    wanted.square().sum().backward()
    parts = [p.detach().requires_grad_() for p in whole.detach().chunk(ranks)]
    parts += [torch.empty(0, 4, requires_grad=True)] * (ranks - len(parts))
    starts = [sum(len(p) for p in parts[:rank]) for rank in range(ranks)]
    found = sum(map(partial(embed_own, tokens, padding_idx=padding_idx), parts, starts))
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    assert torch.equal(torch.cat([p.grad for p in parts]), whole.grad)


def test_gradients_of_matrices_are_split_as_the_matrices_are():
    config = load_config(["--parallelism.tensor_parallel_degree=2", "--training.seq_len=16"])
    spec = get_train_spec("llama3", "debugmodel")
    with fake_world(2, rank=1):
        dims = ParallelDims.from_config(config.parallelism, 2)
        model = spec.model_cls(spec.model_args)
        model = spec.parallelize_fn(model, dims.world_mesh, dims, config)
        model(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                assert parameter.grad.placements == parameter.placements, name


class Unnamed(torch.nn.Module):
    """A model that has none of the modules that text models have."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Linear(4, 4)
        self.layers = torch.nn.ModuleDict({"0": torch.nn.Sequential(torch.nn.Linear(4, 4))})


def test_a_model_without_embedding_norm_and_output_is_split():
    model = Unnamed()
    with fake_world(2, rank=1):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, {"0": ColwiseParallel()})
    assert model.layers["0"][0].weight.placements == (Shard(0),)


@pytest.mark.parametrize("name", ["outer.gain", "outer.*"])
def test_a_plan_of_other_modules_reaches_into_them(name: str):
    model = Unnamed()
    model.outer = torch.nn.ModuleDict({"gain": torch.nn.RMSNorm(4)})
    plan = {name: SequenceParallel(), "in_another_stage.gain": SequenceParallel()}
    with fake_world(2, rank=0):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, {}, plan)
    assert model.outer.gain.weight.placements == (Replicate(),)


@pytest.mark.parametrize("name", ["tok_embeddings", "output"])
def test_what_cannot_be_split_is_named(name: str):
    model = Unnamed()
    setattr(model, name, torch.nn.ModuleList([torch.nn.Embedding(4, 4)]))
    with (
        fake_world(2, rank=1),
        pytest.raises(ConfigError, match=rf"Unnamed\.{name} is ModuleList, but .* another name"),
    ):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, {"0": ColwiseParallel()})


@pytest.mark.parametrize("around", [torch.nn.Sequential, weight_norm])
def test_a_module_around_a_matrix_is_named(around: Callable[[torch.nn.Module], torch.nn.Module]):
    model = Unnamed()
    part = around(torch.nn.Linear(4, 4))
    model.layers["0"] = torch.nn.Sequential(part)
    message = rf"0 is {type(part).__name__}, which ColwiseParallel cannot split"
    with fake_world(2, rank=1), pytest.raises(ConfigError, match=message):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, {"0": ColwiseParallel()})


class Scaled(torch.nn.Embedding):
    """Multiplies, as Gemma does."""

    def forward(self, tokens):
        return super().forward(tokens) * 3


def test_an_embedding_keeps_its_own_forward():
    model = Unnamed()
    model.tok_embeddings = Scaled(4, 4)
    with fake_world(2, rank=0):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, {"0": ColwiseParallel()})
    assert "forward" not in vars(model.tok_embeddings)
    assert model.tok_embeddings.weight.placements == (Shard(0),)


def test_an_embedding_with_more_parameters_is_named():
    model = Unnamed()
    model.tok_embeddings = Scaled(4, 4)
    model.tok_embeddings.scale = torch.nn.Parameter(torch.ones(4))
    with fake_world(2, rank=0), pytest.raises(ConfigError, match="Scaled has scale beside its w"):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, {"0": ColwiseParallel()})


class PostNorm(torch.nn.Module):
    """Adds the output of a norm to the residual stream."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.RMSNorm(4), torch.nn.RMSNorm(4)
        self.w1, self.w2 = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x):
        return x + self.last(self.w2(self.w1(self.first(x))))


@pytest.mark.parametrize("local", [True, False])
def test_a_norm_after_a_matrix_gives_a_local_output_to_the_residual_stream(local: bool):
    model = Unnamed()
    model.layers = torch.nn.ModuleDict({"0": PostNorm()})
    plan = {
        "first": SequenceParallel(),
        "w1": ColwiseParallel(input_layouts=Shard(1)),
        "w2": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(use_local_output=local),
    }
    with fake_world(2, rank=1):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tensor_parallel(model, mesh, TP2, plan)
        if local:
            assert type(model.layers["0"](torch.ones(1, 2, 4))) is torch.Tensor
        else:
            with pytest.raises(RuntimeError, match=r"got mixed torch\.Tensor and DTensor"):
                model.layers["0"](torch.ones(1, 2, 4))


class Decay(torch.nn.Module):
    """By head, in plain tensors, from the first token of a document on."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.ones(4, 1))

    def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return local_tensor(x) * local_tensor(self.rate) * (place > 0)[..., None, None]


def test_a_module_by_heads_may_have_other_inputs_and_plain_tensors():
    with fake_world(2, rank=0):
        mesh = init_device_mesh("cpu", (2,))
        decay = parallelize_module(Decay(), mesh, HeadwiseParallel())
        torch.nn.init.ones_(local_tensor(decay.rate))  # no process has sent this rank its part
        out = decay(torch.ones(1, 3, 2, 5), torch.arange(3)[None])
    assert type(out) is torch.Tensor
    assert out[0, :, 0, 0].tolist() == [0, 1, 1]


def test_deepseeks_layers_are_compiled_for_any_number_of_samples():
    """As of training and of a validation. PyTorch cannot trace `F.linear` on parts of sequences."""
    spec = get_train_spec("deepseek_v3", "debugmodel")
    model = spec.model_cls(spec.model_args)
    with fake_world(2, 0):
        mesh = ParallelDims.from_config(TP2.parallelism, 2).world_mesh["tp"]
        apply_tp(model, mesh, TP2)
        layer = model.layers["0"].attention.wkv_a
        compiled = torch.compile(layer.forward, backend="eager", fullgraph=True)
        for samples in (2, 3):
            x = torch.ones(samples, 8, 128)
            out = compiled(DTensor.from_local(x, mesh, [Shard(1)]))
            assert out.placements == (Shard(1),) and out.shape == (samples, 16, 48)
            torch.testing.assert_close(out.to_local(), x @ layer.weight.to_local().T)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_cannot_be_split_is_refused(option: dict[str, float]):
    with fake_world(2, rank=0):
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(ConfigError, match="max_norm or scale_grad_by_freq cannot be split"):
            EmbeddingParallel(output_layouts=Shard(1))._apply(nn.Embedding(8, 4, **option), mesh)
