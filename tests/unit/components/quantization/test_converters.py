"""What the converters change in a model, and what they refuse."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn as nn

from torchtitan.components.quantization import converters as converters_module
from torchtitan.components.quantization.linear import QuantizedLinear
from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.models.common.moe import grouped_linear
from torchtitan.protocols.model_converter import build_model_converters
from torchtitan.protocols.train_spec import get_train_spec

FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"
EXPERTS, MX_EXPERTS = "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"


def config(*names: str, options: tuple[str, ...] = ()) -> JobConfig:
    job_config = load_config(list(options))
    job_config.model.converters = list(names)
    return job_config


def build(name: str = "llama3", flavor: str = "debugmodel") -> nn.Module:
    spec = get_train_spec(name, flavor)
    with torch.device("meta"):
        return spec.model_cls(spec.model_args)


def converted(
    model: nn.Module, *names: str, options: tuple[str, ...] = (), **degrees: int
) -> nn.Module:
    dims = ParallelDims(world_size=max([1, *degrees.values()]), **degrees)
    build_model_converters(config(*names, options=options), dims).convert(model)
    return model


def quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("name", [FLOAT8, MX])
def test_all_linear_layers_but_the_output_are_converted(name):
    model = build()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "output"]
    params = dict(model.named_parameters())
    converted(model, name)
    assert list(quantized(model)) == names
    after = dict(model.named_parameters())
    assert list(after) == list(params)
    assert all(after[key] is param for key, param in params.items())


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ("--quantize.linear.float8.recipe_name=rowwise", "needs recipe_name 'tensorwise'"),
        ("--training.enable_cpu_offload", "cannot be combined with training.enable_cpu_offload"),
    ],
)
def test_float8_gathers_that_cannot_be_are_refused(other, problem):
    gather = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
    with pytest.raises(ConfigError, match=f"enable_fsdp_float8_all_gather.*{problem}"):
        converted(build(), FLOAT8, options=(gather, other))
    assert all(
        m.float8_gather for m in quantized(converted(build(), FLOAT8, options=(gather,))).values()
    )


def test_tied_weights_stay_tied():
    model = build("llama3", "1B")
    assert model.output.weight is model.tok_embeddings.weight
    converted(model, FLOAT8, options=("--quantize.linear.float8.filter_fqns=wq",))
    assert isinstance(model.output, QuantizedLinear)
    assert model.output.weight is model.tok_embeddings.weight
    model.to_empty(device="meta")
    assert model.output.weight is model.tok_embeddings.weight


def with_a_shared_layer() -> nn.Module:
    model = build()
    for layer in model.layers.values():
        layer.attention.wo = model.layers["0"].attention.wo
    return model


def test_a_layer_that_blocks_share_is_converted_in_all_of_them():
    model = converted(with_a_shared_layer(), FLOAT8)
    shared = {layer.attention.wo for layer in model.layers.values()}
    assert [type(layer) for layer in shared] == [QuantizedLinear]
    options = (f"--{FLOAT8}.filter_fqns", "output", "layers.1.attention.wo")
    model = converted(with_a_shared_layer(), FLOAT8, options=options)
    shared = {layer.attention.wo for layer in model.layers.values()}
    assert [type(layer) for layer in shared] == [nn.Linear]


def test_subclasses_stay_with_a_warning(caplog):
    class Scaled(nn.Linear):
        pass

    model = build()
    model.layers["1"].feed_forward.w2 = Scaled(64, 64, device="meta")
    with caplog.at_level(logging.WARNING, "torchtitan"):
        converted(model, FLOAT8)
    message = "float8: left in high precision, as they are of a subclass of nn.Linear: layers.1.fee"
    assert message in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "torchtitan"):
        converted(build("llama3"), FLOAT8)
    assert "float8: 28 of 29 linear layers" in caplog.text
    converted(build("deepseek_v3"), FLOAT8)  # its router is filtered
    assert "subclass" not in caplog.text


def test_filtered_layers_stay():
    model = build()
    options = (f"--{FLOAT8}.filter_fqns", "output", "feed_forward", "layers.0")
    expected = [f"layers.{i}.attention.w{m}" for i in range(1, len(model.layers)) for m in "qkvo"]
    assert list(quantized(converted(model, FLOAT8, options=options))) == expected


@pytest.mark.parametrize(
    ("recipe", "grouping", "weight_grad"),
    [
        ("tensorwise", "tensor", True),
        ("rowwise", "row", True),
        ("rowwise_with_gw_hp", "row", False),
    ],
)
def test_recipes(recipe, grouping, weight_grad):
    model = converted(build(), FLOAT8, options=(f"--{FLOAT8}.recipe_name={recipe}",))
    for linear in quantized(model).values():
        assert (linear.grouping, linear.quantize_weight_grad) == (grouping, weight_grad)


@pytest.mark.parametrize("name", [EXPERTS, MX_EXPERTS])
def test_experts_are_converted_and_their_router_is_not(name):
    model = converted(build("qwen3", "debugmodel_moe"), name, FLOAT8)
    experts = [layer.moe.experts for layer in model.layers.values()]
    assert all(e.product is not grouped_linear for e in experts)
    assert not any("router" in n for n in quantized(model))


@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "deepseek_v3"])
def test_experts_of_every_model_multiply_by_their_product(name):
    converted(build(name), EXPERTS)


def test_on_a_cpu_products_are_emulated_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "torchtitan"):
        model = converted(build(), FLOAT8)
    assert all(linear.emulate for linear in quantized(model).values())
    assert "quantize.linear.float8: emulated, as on every CPU" in caplog.text


def test_emulation_that_was_asked_for_needs_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "torchtitan"):
        converted(build(), FLOAT8, options=(f"--{FLOAT8}.emulate",))
    assert not caplog.text


class FakeGpu:
    """Takes the place of what asks CUDA."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
        monkeypatch.setattr(converters_module, "device_type", lambda: "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("name", "options", "capability", "needed"),
    [
        (FLOAT8, (), (8, 0), "8.9"),
        (FLOAT8, (f"--{FLOAT8}.recipe_name=rowwise",), (8, 9), "9.0"),
        (MX, (), (9, 0), "10.0"),
        (EXPERTS, (), (8, 9), "9.0"),
    ],
)
def test_a_gpu_without_the_products_is_refused(monkeypatch, name, options, capability, needed):
    FakeGpu(monkeypatch, *capability)
    has = ".".join(map(str, capability))
    message = f"^{name}.emulate = false: needs a device of compute capability {needed}, and this "
    message += f"one has {has}. Set it to true"
    dims = ParallelDims(world_size=1)
    with pytest.raises(ConfigError, match=message):
        build_model_converters(config(name, options=options), dims)
    build_model_converters(config(name, options=(*options, f"--{name}.emulate")), dims)


def test_mx_experts_have_no_kernel(monkeypatch):
    FakeGpu(monkeypatch, 10, 0)
    with pytest.raises(ConfigError, match="no kernel for these products yet"):
        build_model_converters(config(MX_EXPERTS), ParallelDims(world_size=1))


def test_a_gpu_that_can_does_not_emulate(monkeypatch):
    FakeGpu(monkeypatch, 9, 0)
    assert not any(linear.emulate for linear in quantized(converted(build(), FLOAT8)).values())


@pytest.mark.parametrize(
    ("options", "slow"),
    [((), True), (("--compile.enable", "--compile.components=loss"), True)]
    + [(("--compile.enable",), False)],
)
def test_eager_models_on_a_gpu_are_warned_of_the_rounding(monkeypatch, caplog, options, slow):
    FakeGpu(monkeypatch, 9, 0)
    with caplog.at_level(logging.WARNING, "torchtitan"):
        converted(build(), FLOAT8, options=options)
    assert ("quantize.linear.float8: without compile.enable" in caplog.text) == slow


def test_real_products_need_bfloat16(monkeypatch):
    FakeGpu(monkeypatch, 9, 0)
    options = ("--training.mixed_precision_param=float32",)
    with pytest.raises(ConfigError, match=r"training.mixed_precision_param must be 'bfloat16'"):
        build_model_converters(config(FLOAT8, options=options), ParallelDims(world_size=1))


def test_sizes_that_do_not_divide_are_refused_by_name():
    model = build()
    model.layers["1"].feed_forward.w2 = nn.Linear(100, 64, device="meta")
    message = "quantize.linear.float8.filter_fqns: layers.1.feed_forward.w2 has 100 features in "
    message += "and 64 out, which must be multiples of 16. Add its name"
    with pytest.raises(ConfigError, match=message):
        converted(model, FLOAT8)
    converted(build(), FLOAT8)


def test_tensor_parallelism_needs_larger_multiples():
    model = build()
    model.layers["1"].feed_forward.w2 = nn.Linear(48, 64, device="meta")
    with pytest.raises(ConfigError, match=r"multiples of 32 \(tensor_parallel_degree 2 x 16\)"):
        converted(model, FLOAT8, tp=2)


def test_tokens_that_do_not_divide_are_refused():
    options = ("--training.seq_len=40", "--training.local_batch_size=1")
    message = r"training.local_batch_size = 1: .* multiple of 16 tokens .* this one has 40"
    with pytest.raises(ConfigError, match=message):
        converted(build(), FLOAT8, options=options)
    high_precision = (*options, f"--{FLOAT8}.recipe_name=rowwise_with_gw_hp")
    converted(build(), FLOAT8, options=high_precision)


@pytest.mark.parametrize(
    ("batch", "seq_len", "degrees", "message"),
    [
        (1, 48, {"tp": 2}, "training.local_batch_size = 1: .* this one has 24"),
        (2, 40, {"pp": 2}, "pipeline_parallel_microbatch_size = 1: .* this one has 40"),
    ],
)
def test_the_tokens_are_those_of_a_forward_pass_of_a_rank(batch, seq_len, degrees, message):
    options = (f"--training.seq_len={seq_len}", f"--training.local_batch_size={batch}")
    converted(build(), FLOAT8, options=options)
    with pytest.raises(ConfigError, match=message):
        converted(build(), FLOAT8, options=options, **degrees)


def test_tensor_parallelism_of_experts_needs_larger_multiples():
    model = build("qwen3", "debugmodel_moe")
    experts = model.layers["1"].moe.experts
    experts.w2 = nn.Parameter(torch.empty(8, 48, 64, device="meta"))
    converted(model, EXPERTS)
    with pytest.raises(ConfigError, match=r"multiples of 32, but the experts' w2 is \[8, 48, 64\]"):
        converted(model, EXPERTS, tp=2, etp=2)


def test_a_filter_that_leaves_nothing_is_refused():
    options = (f"--{FLOAT8}.filter_fqns", "layers", "output")
    with pytest.raises(ConfigError, match="no linear layer is left to convert"):
        converted(build(), FLOAT8, options=options)


@pytest.mark.parametrize("name", [FLOAT8, MX])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention.wq,output"], "'attention.wq,output'. On the command line, separate"),
        (["output", "atention.wq"], "filter_fqns: no layer's name contains 'atention.wq'"),
    ],
)
def test_a_filter_of_no_layer_is_refused(name, words, message):
    with pytest.raises(ConfigError, match=message):
        converted(build(), name, options=(f"--{name}.filter_fqns", *words))


def test_two_converters_of_the_same_layers_are_refused():
    with pytest.raises(ConfigError, match="no linear layer is left to convert"):
        converted(build(), FLOAT8, MX)


def test_a_model_without_experts_is_refused():
    with pytest.raises(ConfigError, match="needs a mixture of experts, but llama3 has no experts"):
        converted(build(), EXPERTS)


def test_experts_of_a_strange_kind_are_refused():
    model = build("qwen3", "debugmodel_moe")
    del model.layers["0"].moe.experts.product
    with pytest.raises(ConfigError, match="needs experts that multiply with `self"):
        converted(model, EXPERTS)
