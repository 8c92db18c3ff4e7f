"""What `TrainSpec` does besides naming builders."""

from __future__ import annotations

import inspect
from dataclasses import replace

import own_parts_llama
import pytest
import torch
import torch.nn as nn

from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.planning.trace import trace_step
from torchtitan.protocols.train_spec import MODEL_REGISTRY, get_train_spec, register_train_spec
from torchtitan.runtime.fake_world import fake_world

FROZEN = own_parts_llama.get_own_frozen("tiny")
TP2 = "--parallelism.tensor_parallel_degree=2"
OPTIONS = ["--job.custom_import=own_parts_llama", "--model.name=own_frozen", "--model.flavor=tiny"]


def test_parallelize_keeps_frozen_what_the_model_froze() -> None:
    config = load_config([*OPTIONS, TP2])
    with fake_world(4, rank=0):
        dims = ParallelDims.from_config(config.parallelism, 4)
        model = FROZEN.meta_model()
        expected = {name: param.requires_grad for name, param in model.named_parameters()}
        model = FROZEN.parallelize(model, dims.world_mesh, dims, config)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == expected
    assert len(set(expected.values())) == 2


def test_a_parallelize_fn_that_returns_no_model_is_named() -> None:
    def forgets(model: nn.Module, *layout: object) -> None:
        pass

    with pytest.raises(ConfigError, match="forgets, a parallelize_fn, returned None: it must ret"):
        replace(FROZEN, parallelize_fn=forgets).parallelize(FROZEN.meta_model())


def test_a_plan_gives_what_is_frozen_no_gradients_under_tensor_parallelism() -> None:
    config = load_config([*OPTIONS, TP2, "--training.seq_len=64"])
    with fake_world(2, rank=0):
        gradients = trace_step(config).gradients
    trained = [p.numel() for p in FROZEN.meta_model().parameters() if p.requires_grad]
    assert gradients == sum(trained) * 4 / 2  # each is split over the two ranks


def hooked(register: str) -> nn.Linear:
    linear = nn.Linear(2, 2, bias=False)
    getattr(linear.weight, register)(lambda tensor: None)
    return linear


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: nn.LazyLinear(2), r"the parameter extra\.weight has no size yet"),
        (lambda: hooked("register_hook"), "extra.weight has a hook, which would be lost"),
        (lambda: hooked("register_post_accumulate_grad_hook"), "extra.weight has a hook"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), "weight is complex64, but parameters are"),
        (lambda: nn.Linear(2, 2, dtype=torch.float64), "weight is float64"),
    ],
)
def test_a_parameter_that_cannot_be_trained_is_refused_with_its_name(part, message) -> None:
    class WithPart(FROZEN.model_cls):
        def __init__(self, args):
            super().__init__(args)
            self.extra = part()

    with pytest.raises(ConfigError, match=message):
        replace(FROZEN, model_cls=WithPart).meta_model()


@pytest.mark.parametrize("factory", [FROZEN, lambda: FROZEN])
def test_what_upstream_registers_is_refused(factory) -> None:
    """A `TrainSpec`, or a function of no flavor."""
    with pytest.raises(TypeError, match=r"takes a function \(flavor\) -> TrainSpec"):
        register_train_spec("old", factory)
    assert "old" not in MODEL_REGISTRY


def test_a_factory_that_forgets_to_return_is_refused(monkeypatch) -> None:
    monkeypatch.setitem(MODEL_REGISTRY, "forgetful", lambda flavor: None)
    with pytest.raises(ConfigError, match="forgetful: its factory returns NoneType for '8B', not"):
        get_train_spec("forgetful", "8B")


def test_model_args_of_all_flavors_are_refused(monkeypatch) -> None:
    old = replace(FROZEN, model_args={"8B": FROZEN.model_args})
    monkeypatch.setitem(MODEL_REGISTRY, "old", lambda flavor: old)
    with pytest.raises(ConfigError, match="old: model_args of its TrainSpec is dict, not one"):
        get_train_spec("old", "8B")


def as_upstream_parallelizes(model, parallel_dims, job_config):
    return model


@pytest.mark.parametrize(
    ("field", "function", "takes"),
    [
        ("parallelize_fn", as_upstream_parallelizes, "model, world_mesh, parallel_dims, job_confi"),
        ("build_loss_fn", lambda job_config, *, parallel_dims: None, "job_config"),
        ("build_lr_scheduler_fn", lambda optimizers, config, steps: None, "optimizers, job_config"),
    ],
)
def test_functions_of_other_arguments_are_refused(field, function, takes, monkeypatch) -> None:
    old = replace(FROZEN, **{field: function})
    monkeypatch.setitem(MODEL_REGISTRY, "old", lambda flavor: old)
    with pytest.raises(ConfigError, match=rf"old: {field} of its TrainSpec must take \({takes}"):
        get_train_spec("old", "8B")


def test_a_compiled_function_is_taken_as_it_is(monkeypatch) -> None:
    compiled = replace(FROZEN, build_tokenizer_fn=dict)
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(compiled.build_tokenizer_fn)
    monkeypatch.setitem(MODEL_REGISTRY, "compiled", lambda flavor: compiled)
    assert get_train_spec("compiled", "8B") is compiled


def test_args_that_count_the_parameters_of_a_given_model_are_refused(monkeypatch) -> None:
    class Args(type(FROZEN.model_args)):
        def get_nparams_and_flops(self, model, seq_len):
            return 0, 0

    old = replace(FROZEN, model_args=Args(**vars(FROZEN.model_args)))
    monkeypatch.setitem(MODEL_REGISTRY, "old", lambda flavor: old)
    message = r"Args.get_nparams_and_flops must take \(seq_len\): missing a required"
    with pytest.raises(ConfigError, match=message):
        get_train_spec("old", "8B")


def test_an_unknown_model_may_lack_its_import(monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"no such model\..* job\.custom_import imports a model"):
        get_train_spec("mine", "8B")
    monkeypatch.setattr("torchtitan.protocols.train_spec.MODEL_REGISTRY", {})
    with pytest.raises(ConfigError, match=r"no such model\. `import torchtitan.models` registers"):
        get_train_spec("llama3", "8B")
