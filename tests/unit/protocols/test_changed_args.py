"""A job's `model.args` change single hyperparameters of a flavor."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pytest
import torch

from torchtitan.config import JobConfig, load_config
from torchtitan.errors import ConfigError
from torchtitan.models import flux, llama3
from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.preflight.validate import validate
from torchtitan.protocols import BaseModelArgs, register_train_spec
from torchtitan.protocols.changed_args import changed_args
from torchtitan.protocols.train_spec import get_train_spec, train_spec_of


@dataclass(frozen=True)
class Window:
    size: int = 8


@dataclass(frozen=True)
class Layer:
    kind: Literal["attention", "none"] = "attention"
    window: Window | None = None


@dataclass
class Args(BaseModelArgs):
    n_layers: int = 4
    eps: float = 1e-5
    kinds: tuple[str, ...] = ("a",)
    sizes: tuple[int, float] = (1, 0.5)
    layers: list[Layer] = field(default_factory=lambda: [Layer()])
    by_number: dict[int, Layer] = field(default_factory=dict)
    window: Window | None = None
    name: str | None = "x"
    mode: Literal["none", "some"] | None = "some"
    anything: Any = None
    dtype: torch.dtype = torch.float32
    halves: int = 2
    total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.total = 2 * self.n_layers
        self.halves = self.n_layers // 2
        assert self.n_layers != 13


def job(**args: Any) -> JobConfig:
    config = JobConfig()
    config.model.args = args
    return config


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("n_layers", 8, 8),
        ("eps", 1, 1.0),
        ("kinds", ["a", "b"], ("a", "b")),
        ("sizes", [2, 3], (2, 3.0)),
        ("layers", [{"kind": "none"}, {}], [Layer("none"), Layer()]),
        ("layers", [{"window": {"size": 2}}], [Layer(window=Window(2))]),
        ("by_number", {"3": {"kind": "none"}}, {3: Layer("none")}),
        ("window", {}, Window(3)),
        ("window", {"size": 2}, Window(2)),
        ("window", "none", None),
        ("name", "None", None),
        ("mode", "none", "none"),
        ("anything", [1, {"a": "none"}], [1, {"a": "none"}]),
    ],
)
def test_a_value_becomes_what_the_annotation_says(name: str, given: Any, value: Any) -> None:
    flavor = Args(window=Window(3))
    changed = getattr(changed_args(flavor, job(**{name: given})), name)
    assert changed == value and type(changed) is type(value)
    assert flavor == Args(window=Window(3))


def test_other_fields_keep_the_flavors_values() -> None:
    changed = changed_args(Args(dtype=torch.bfloat16, kinds=("z",)), job(n_layers=8))
    assert (changed.dtype, changed.kinds, changed.total) == (torch.bfloat16, ("z",), 16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"n_layer": 8},
            r"model\.args\.n_layer = 8: unknown key\. Did you mean 'n_layers'\?",
        ),
        ({"total": 8}, r"model\.args\.total = 8: has field\(init=False\)"),
        ({"a.b": 8}, r"model\.args\.a\.b = 8: unknown key"),
        ({"n_layers": "8"}, r"model\.args\.n_layers = \"8\": must be an integer, not '8'"),
        ({"n_layers": "none"}, r"n_layers = \"none\": must be an integer, not 'none'"),
        ({"window": {"sise": 1}}, r"model\.args\.window\.sise = 1: unknown key\. Did you mean"),
        ({"window": 8}, r"model\.args\.window = 8: must be a table, not 8"),
        ({"sizes": [1]}, r"model\.args\.sizes: must be an array of 2, not of 1"),
        ({"kinds": ["a", 1]}, r"model\.args\.kinds\.1 = 1: must be a string, not 1"),
        ({"by_number": {"x": {}}}, r"by_number: must have keys that are an integer"),
        ({"by_number": {"1": {"x": 1}}}, r"model\.args\.by_number\.1\.x = 1: unknown key"),
        ({"mode": "other"}, r"'other' is not allowed\. Allowed: none, some"),
        (
            {"dtype": "float16"},
            r"model\.args\.dtype = .* the annotation .*torch\.dtype.*, whi",
        ),
        (
            {"halves": 3},
            r"model\.args\.halves = 3: would be replaced: __post_init__ of Args",
        ),
        ({"n_layers": 13}, r"(?s)^model\.args: Args fails with these values: Ass.*\.py:\d+"),
        ({"n_layer": 1, "eps": "x"}, r"n_layer = 1: unknown.*\n.*eps = \"x\": must be a number"),
    ],
)
def test_a_mistake_is_one_error(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        changed_args(Args(), job(**args))


def test_a_line_of_the_file_is_named(tmp_path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model.args]\nn_layers = 2\nrope_scaling = {class = "Yarn"}\n')
    with pytest.raises(ConfigError, match=r"run\.toml:3: \[model\] args\.rope_scaling\.class = "):
        train_spec_of(load_config([str(path)]))


def llama(flavor: str, *options: str) -> Any:
    return train_spec_of(load_config([f"--model.flavor={flavor}", *options])).model_args


def test_scaled_positions_are_changed_removed_or_of_another_kind() -> None:
    key = "--model.args.rope_scaling"
    assert llama("8B", f"{key}=none").rope_scaling is None
    assert llama("8B", f"{key}.factor=4").rope_scaling == RopeScaling(factor=4.0)
    yarn = YarnScaling(factor=4.0)
    assert llama("8B", f"{key}.class=YarnScaling", f"{key}.factor=4").rope_scaling == yarn
    assert llama("debugmodel", f"{key}.beta_fast=9").rope_scaling == YarnScaling(beta_fast=9.0)
    with pytest.raises(ConfigError, match=r"needs the key class, .* Allowed: LinearScaling, Rope"):
        llama("debugmodel", f"{key}.factor=4")  # each kind has it


def test_a_value_that_another_option_sets_is_refused() -> None:
    config = load_config(["--model.args.attention=sdpa"])
    spec = train_spec_of(config)
    with pytest.raises(
        ConfigError,
        match=r'^model\.args\.attention = "sdpa": would be replaced: update_from_config of '
        r"Llama3ModelArgs sets it to 'auto'\. Set model\.attention instead$",
    ):
        spec.updated_args(config)


@dataclass
class OwnArgs(llama3.Llama3ModelArgs):
    broken: Literal["", "update", "count", "model"] = ""

    def update_from_config(self, job_config: JobConfig) -> Any:
        return self.fail_if("update")

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        self.fail_if("count")
        return 1, 1

    def fail_if(self, what: str) -> OwnArgs:
        if self.broken == what:
            raise KeyError(what)
        return self


class OwnModel(llama3.Llama3Model):
    def __init__(self, args: OwnArgs) -> None:
        super().__init__(args.fail_if("model"))


MODEL_CONFIGS = {"own": OwnArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=8)}


def get_own(flavor: str) -> Any:
    args = MODEL_CONFIGS[flavor]
    spec = replace(llama3.get_train_spec("debugmodel"), model_cls=OwnModel, model_args=args)
    return replace(spec, build_dataloader_fn=lambda *_: args)


register_train_spec("changed_own", get_own)


@pytest.mark.parametrize("where", ["update", "count", "model"])
def test_a_failure_of_the_models_code_is_one_error_only_with_changed_args(where: str) -> None:
    config = load_config(
        ["--model.name=changed_own", "--model.flavor=own", f"--model.args.broken={where}"]
    )
    spec = train_spec_of(config)
    with pytest.raises(ConfigError, match=rf"^model\.args: Own.* KeyError: '{where}' .*args\.py:"):
        spec.meta_model(spec.updated_args(config))
    with pytest.raises(KeyError):
        replace(spec, has_changed_args=False).meta_model()
        spec.model_args.update_from_config(config)
        spec.model_args.get_nparams_and_flops(1)


def test_builders_of_the_factory_get_the_changed_args() -> None:
    """As those of a model with its own loader, which close over the flavor's args."""
    spec = train_spec_of(
        load_config(["--model.name=changed_own", "--model.flavor=own", "--model.args.n_layers=3"])
    )
    assert spec.build_dataloader_fn().n_layers == spec.model_args.n_layers == 3
    assert get_train_spec("changed_own", "own").build_dataloader_fn().n_layers == 1
    images = train_spec_of(load_config(["--model.name=flux", "--model.args.text_len=4"]))
    assert images.build_dataloader_fn.args[0].text_len == 4
    assert flux.MODEL_CONFIGS["debugmodel"].text_len == 8


def test_rules_between_options_see_the_changed_args() -> None:
    options = ["--model.name=qwen3", "--model.flavor=debugmodel_moe"]
    options += ["--parallelism.expert_parallel_degree=8", "--training.global_batch_size=64"]
    validate(load_config(options), 8)
    with pytest.raises(ConfigError, match=r"divide the 12 experts of qwen3 debugmodel_moe \(moe"):
        validate(load_config([*options, "--model.args.moe.num_experts=12"]), 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.args.dim=208"], r"\(dim = 208\): rotary positions turn pairs .* are 13, an odd"),
        (
            ["--model.name=llama4", "--model.args.temperature_floor=0"],
            r"temperature_floor = 0: must be >= 1, not 0",
        ),
        (["--model.name=flux", "--model.args.axes_dim=[4, 6, 5]"], "are 5, an odd number"),
        (["--model.name=deepseek_v3", "--model.args.qk_rope_dim=7"], "are 7, an odd number"),
    ],
)
def test_impossible_sizes_are_refused_before_a_model_is_built(
    options: list[str], message: str
) -> None:
    config = load_config(options)
    with pytest.raises(ConfigError, match=message):
        train_spec_of(config).updated_args(config)
