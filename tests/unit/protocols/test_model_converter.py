"""`model.converters`: looked up by name, applied in order."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.protocols import model_converter
from torchtitan.protocols.model_converter import (
    build_model_converters,
    convert_to_load,
    register_model_converter,
)

DIMS = ParallelDims(world_size=1)


class Recorder:
    """Notes what it is called with."""

    calls: list[tuple[str, object]]

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        assert parallel_dims is DIMS
        self.calls = []

    def convert(self, model: nn.Module) -> None:
        self.calls.append(("convert", model))

    def post_optimizer_hook(self, model_parts: list[nn.Module]) -> None:
        self.calls.append(("hook", model_parts))


class Other(Recorder):
    pass


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    build_model_converters(JobConfig(), DIMS)  # which registers ours
    table = dict(model_converter.MODEL_CONVERTERS)
    monkeypatch.setattr(model_converter, "MODEL_CONVERTERS", table)
    register_model_converter(Recorder, "recorder")
    register_model_converter(Other, "other")


def config(*names: str) -> JobConfig:
    job_config = JobConfig()
    job_config.model.converters = list(names)
    return job_config


def test_converters_run_in_the_order_of_the_config():
    converters = build_model_converters(config("other", "recorder"), DIMS)
    assert [type(c) for c in converters.converters] == [Other, Recorder]
    model, parts = nn.Linear(1, 1), [nn.Linear(1, 1)]
    converters.convert(model)
    converters.post_optimizer_hook(parts)
    for converter in converters.converters:
        assert converter.calls == [("convert", model), ("hook", parts)]


def test_no_converters_by_default():
    assert build_model_converters(JobConfig(), DIMS).converters == []


def test_an_unknown_name_is_refused_with_the_nearest():
    message = r"^model.converters: no such converter 'quantize.linear.fp8'\. "
    message += r"Did you mean 'quantize.linear.float8'\? Allowed: .*recorder"
    with pytest.raises(ConfigError, match=message):
        build_model_converters(config("quantize.linear.fp8"), DIMS)


def test_a_name_that_is_there_twice_is_refused():
    with pytest.raises(ConfigError, match="'recorder' is given twice"):
        build_model_converters(config("recorder", "recorder"), DIMS)


def test_a_name_is_registered_once():
    register_model_converter(Recorder, "recorder")
    with pytest.raises(ValueError, match="'recorder' is already registered"):
        register_model_converter(Other, "recorder")


def test_a_converter_that_adds_parameters_must_say_so():
    class Adding(Recorder):
        def convert(self, model: nn.Module) -> None:
            model.register_parameter("more", nn.Parameter(torch.zeros(1)))

    register_model_converter(Adding, "adding")
    with pytest.raises(
        ConfigError, match=r"model\.converters.*Adding adds or .* \(more\)\. Its class"
    ):
        build_model_converters(config("adding"), DIMS).convert(nn.Linear(1, 1))
    model = nn.Linear(1, 1)
    convert_to_load(model, config("recorder", "adding"), DIMS)
    assert not hasattr(model, "more")
    Adding.changes_parameters = True
    build_model_converters(config("adding"), DIMS).convert(nn.Linear(1, 1))
    convert_to_load(model, config("recorder", "adding"), DIMS)
    assert hasattr(model, "more")


class Replacing(Recorder):
    def convert(self, model: nn.Module) -> None:
        model[0] = type("Own", (nn.Linear,), {})(1, 1)


def test_a_module_of_an_earlier_converter_is_not_replaced():
    register_model_converter(Replacing, "replacing")
    register_model_converter(type("Again", (Replacing,), {}), "again")
    with pytest.raises(ConfigError, match="'again' replaces 0, which 'replacing' has converted"):
        build_model_converters(config("replacing", "recorder", "again"), DIMS).convert(
            nn.Sequential(nn.Linear(1, 1))
        )
