"""`compile.mode` reaches the compiler."""

from __future__ import annotations

import pytest
import torch

from torchtitan.config import JobConfig
from torchtitan.distributed.compile import apply_compile, compiled_pass
from torchtitan.protocols.train_spec import get_train_spec


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize(
    ("mode", "expected"), [("default", None), ("max-autotune-no-cudagraphs",) * 2]
)
def test_the_mode_is_the_compilers(monkeypatch, scope, mode, expected):
    job_config = JobConfig()
    job_config.compile.enable, job_config.compile.scope = True, scope
    job_config.compile.mode = mode
    modes = []

    def compile(target, **options):
        modes.append(options["mode"])
        return target

    monkeypatch.setattr(torch, "compile", compile)
    spec = get_train_spec("llama3", "debugmodel")
    with torch.device("meta"):
        model = spec.model_cls(spec.model_args)
    apply_compile(model, job_config)
    assert modes == [expected] * (1 if scope == "model" else len(model.layers))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs_hear_of_each_forward_pass(monkeypatch, mode):
    job_config = JobConfig()
    job_config.compile.enable, job_config.compile.mode = True, mode
    heard = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: heard.append(1))
    with compiled_pass(job_config):
        pass
    assert len(heard) == (mode == "reduce-overhead")
