"""What every model's args count, and what they refuse."""

import dataclasses

import pytest
import torch
from model_cases import CASES
from tiny_models import TINY, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import JobConfig, load_config, to_toml
from torchtitan.distributed.context_parallel import apply_cp
from torchtitan.errors import ConfigError
from torchtitan.protocols.changed_args import changed_args, plain_args
from torchtitan.protocols.train_spec import get_train_spec, model_flavors

GROUPED = [name for name, args in TINY.items() if hasattr(args, "n_kv_heads")]
"""Models whose query heads share key and value heads."""


def grouped_mm_flops(rows, weights, *args, out_shape, **kwargs):
    """Not known to the flop counter: two operands of `[rows, in]`, `[experts, in, out]`, or two of
    `[in, rows]`, `[rows, out]`."""
    return 2 * rows[0] * rows[1] * weights[-1]


@pytest.mark.parametrize(
    ("name", "flavor"), [(name, flavor) for name in CASES for flavor in model_flavors(name)]
)
def test_parameters_are_counted_exactly(name, flavor):
    spec = get_train_spec(name, flavor)
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args)
    counted, _ = spec.model_args.get_nparams_and_flops(seq_len=128)
    assert counted == sum(p.numel() for p in model.parameters())
    assert counted == CASES[name].published_sizes.get(flavor, counted)


@pytest.mark.parametrize(
    ("name", "flavor"), [(name, f) for name in [*CASES, "flux"] for f in model_flavors(name)]
)
def test_every_field_can_be_set_in_a_job(name, flavor, tmp_path):
    args = get_train_spec(name, flavor).model_args
    config = JobConfig()
    config.model.args = plain_args(args)
    (tmp_path / "run.toml").write_text(to_toml(config))
    config = load_config([str(tmp_path / "run.toml")])
    for start in (args, type(args)()):
        assert changed_args(start, config) == args


@pytest.mark.parametrize("name", [name for name in TINY if name in ("gpt_oss", "llama4")])
def test_shared_experts_and_router_biases_are_counted(name):
    moe = dataclasses.replace(TINY[name].moe, num_shared_experts=2, gate_bias=name == "llama4")
    args = dataclasses.replace(TINY[name], moe=moe)
    with torch.device("meta"):
        model = get_train_spec(name, "debugmodel").model_cls(args)
    assert args.get_nparams_and_flops(8)[0] == sum(p.numel() for p in model.parameters())


def numbers_of(args, *path):
    """Return the names of the numeric fields, with those of tables inside: `("moe", "top_k")`."""
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers_of(value, *path, field.name)
        elif type(value) in (int, float):
            yield *path, field.name


@pytest.mark.parametrize("name", [*TINY, "flux"])
def test_a_job_cannot_make_a_number_negative(name):
    args = TINY.get(name) or get_train_spec(name, "debugmodel").model_args
    for path in numbers_of(args):
        config = JobConfig()
        table = config.model.args
        for key in path[:-1]:
            table = table.setdefault(key, {})
        table[path[-1]] = -1
        with pytest.raises(ConfigError, match=path[-1]):
            changed_args(args, config)


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("llama3", "n_heads=0", r"model\.args\.n_heads = 0: must be >= 1, not 0"),
        ("llama4", "moe_interval=0", r"model\.args\.moe_interval = 0: must be >= 1, not 0"),
        ("gemma3", "rope_theta=1", r"model\.args\.rope_theta = 1: must be > 1, not 1\.0"),
        ("deepseek_v3", "q_rank=0", r"model\.args\.q_rank = 0: must be >= 1, not 0"),
        ("gpt_oss", "moe.z_loss_weight=inf", r"z_loss_weight = inf: must be finite and >= 0"),
        ("gpt_oss", "swiglu_limit=1e39", r"swiglu_limit = 1e\+39: must be > 0 and <= 1e\+30, not"),
        ("flux", "axes_dim=[0,8,8]", r"model\.args\.axes_dim\.0 = 0: must be >= 1, not 0"),
    ],
)
def test_a_number_out_of_range_is_refused(name, option, message):
    config = load_config([f"--model.name={name}", f"--model.args.{option}"])
    with pytest.raises(ConfigError, match=message):
        changed_args(get_train_spec(name, "debugmodel").model_args, config)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_those_counted_in_forward_and_backward(name, tied):
    model, seq_len = tiny_model(name, tie_word_embeddings=tied), 8  # no longer than a window
    tokens = torch.randint(model.args.vocab_size, (2, seq_len))
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    _, flops_per_token = model.args.get_nparams_and_flops(seq_len)
    flops_per_token += CASES[name.split(",")[0]].uncounted_flops(model.args, seq_len)
    assert counter.get_total_flops() == flops_per_token * tokens.numel()


@pytest.mark.parametrize(
    ("name", "n_layers", "window"), [("gemma3", 4, 8), ("gpt_oss", 3, 8), ("llama4", 4, 16)]
)
def test_layers_with_a_window_count_no_more_keys_than_it_has(name, n_layers, window):
    args = dataclasses.replace(TINY[name], n_layers=n_layers)  # of which one has no window
    _, within = args.get_nparams_and_flops(window)
    _, beyond = args.get_nparams_and_flops(window + 10)
    assert beyond - within == 12 * args.n_heads * args.head_dim * 10


@pytest.mark.parametrize("name", GROUPED)
def test_heads_that_do_not_divide_are_refused(name):
    with pytest.raises(ValueError, match=r"n_kv_heads \(3\) must divide n_heads") as caught:
        dataclasses.replace(TINY[name], n_kv_heads=3)
    assert "n_heads (4)" in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_a_tensor_parallel_degree_that_splits_a_head_is_refused(name):
    config = JobConfig()
    heads, degree, degrees = ("n_kv_heads = 2", 4, "1, 2")
    if name not in GROUPED:
        heads, degree, degrees = ("n_heads = 4", 8, "1, 2, 4")
    config.parallelism.tensor_parallel_degree = degree
    with pytest.raises(ConfigError, match=rf"{heads}.*Degrees that do: {degrees}$"):
        TINY[name].update_from_config(config)
    config.parallelism.tensor_parallel_degree = 2
    TINY[name].update_from_config(config)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3, experts", r"hidden_dim = 24.*Degrees that do: 1, 3$"),
        ("deepseek_v3", r"hidden_dim = 24.*Degrees that do: 1, 3$"),
        ("gpt_oss", r"expert_tensor_parallel_degree = 2.*output biases"),
        ("llama4", r"expert_tensor_parallel_degree.* cannot be split"),
    ],
)
def test_an_expert_parallel_degree_that_splits_an_expert_is_refused(name, message):
    args = dataclasses.replace(TINY[name], moe=dataclasses.replace(TINY[name].moe, hidden_dim=24))
    config = JobConfig()
    config.parallelism.tensor_parallel_degree = 2
    args.update_from_config(config)
    config.parallelism.expert_tensor_parallel_degree = 2
    with pytest.raises(ConfigError, match=message):
        args.update_from_config(config)


@pytest.mark.parametrize("name", TINY)
def test_ulysses_needs_heads_for_every_rank(name):
    config = JobConfig()
    config.parallelism.context_parallel_method = "ulysses"
    config.parallelism.context_parallel_degree = 8
    with pytest.raises(ConfigError, match=r"n_heads = 4.*Degrees that divide this number: 1, 2, 4"):
        TINY[name].update_from_config(config)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_a_ring_is_refused_where_it_computes_other_attention(name):
    config = JobConfig()
    config.model.name = name
    config.parallelism.context_parallel_method = "ring"
    with pytest.raises(
        ConfigError, match=rf"ring attention supports.*{name} has layers with a custom scale"
    ):
        apply_cp(tiny_model(name), None, config)


@pytest.mark.parametrize("name", TINY)
def test_the_job_chooses_the_attention_kernel(name):
    config = JobConfig()
    config.model.attention = "sdpa"
    assert TINY[name].update_from_config(config).attention == "sdpa"
    assert TINY[name].attention == "auto", "a flavor was changed in place"
