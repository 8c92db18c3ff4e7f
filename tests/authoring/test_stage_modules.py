"""A plan splits a model as its `pipeline_fn` does, whatever its modules are called."""

from __future__ import annotations

import pytest

from torchtitan.config import load_config
from torchtitan.errors import ConfigError
from torchtitan.models.plugins import load_plugins
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.trace import try_layout
from torchtitan.protocols import TrainSpec
from torchtitan.protocols.train_spec import MODEL_REGISTRY

OPTIONS = [
    *["--model.name=learned_positions", "--model.flavor=debugmodel"],
    *["--job.custom_import=learned_positions", "--activation_checkpoint.mode=none"],
    *["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"],
    *["--training.seq_len=64", "--training.mixed_precision_param=float32"],
]


def test_a_stage_has_the_modules_that_its_pipeline_names() -> None:
    config = load_config(OPTIONS)
    load_plugins(config.job.custom_import)
    try_layout(config, 2)
    assert plan_run(config, 2, DEVICES["h100"]).peak > 0


def test_a_module_that_no_stage_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(OPTIONS)
    load_plugins(config.job.custom_import)
    spec_of = MODEL_REGISTRY["learned_positions"]

    def unnamed(flavor: str) -> TrainSpec:
        spec = spec_of(flavor)
        spec.pipeline_fn = spec.pipeline_fn.func  # the modules' names by default
        return spec

    monkeypatch.setitem(MODEL_REGISTRY, "learned_positions", unnamed)
    with pytest.raises(ConfigError, match=r"embedding.*not named in its pipeline_fn"):
        try_layout(config, 2)
