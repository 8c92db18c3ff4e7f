"""A `parallelize_fn` that leaves options out is told of on rank 0, and one that does not is not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn as nn
from tiny_models import tiny_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from torchtitan.components.loss import build_loss
from torchtitan.components.lr_scheduler import build_lr_scheduler
from torchtitan.components.optimizer import OPTIMIZERS, build_optimizer
from torchtitan.config import JobConfig
from torchtitan.config.optimizer import Optimizer
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.expert_parallel import apply_expert_parallel
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.unused_options import check_applied, warn_of_unread
from torchtitan.models.common.moe import MoE, MoEArgs
from torchtitan.planning.trace import fake_world

AC = (
    "because the parallelize_fn of llama3 does not call "
    "torchtitan.distributed.activation_checkpoint.apply_ac(model, job_config) here"
)
COMPILE = AC.replace("activation_checkpoint.apply_ac", "compile.apply_compile")


@pytest.fixture
def config() -> Iterator[JobConfig]:
    config = JobConfig()
    config.activation_checkpoint.mode = "none"
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        yield config


def model() -> nn.Module:
    return tiny_model("llama3")


def warnings(caplog: pytest.LogCaptureFixture, config: JobConfig, *parts: nn.Module) -> list[str]:
    caplog.clear()
    check_applied(list(parts), config)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("mode", ["full", "selective", "memory_budget"])
def test_a_mode_that_is_not_applied(mode, config, caplog):
    config.activation_checkpoint.mode = mode
    part = model()
    (warning,) = warnings(caplog, config, part)
    assert warning == f'activation_checkpoint.mode = "{mode}": has no effect, {AC}'
    apply_ac(part, config)
    assert warnings(caplog, config, part) == []


def test_tensor_parallelism_that_is_not_applied(config, caplog):
    config.parallelism.tensor_parallel_degree = 2
    part = model()
    (warning,) = warnings(caplog, config, part)
    assert warning.startswith("parallelism.tensor_parallel_degree = 2: has no effect, because the")
    with fake_world(2, 0):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        norm = part.norm.weight.detach()
        part.norm.weight = nn.Parameter(distribute_tensor(norm, mesh, [Replicate()]))
    assert warnings(caplog, config, part) == []


def test_expert_parallelism_that_is_not_applied(config, caplog):
    config.parallelism.expert_parallel_degree = 2
    part = model()
    (warning,) = warnings(caplog, config, part)
    assert warning.startswith("parallelism.expert_parallel_degree = 2: has no effect, because the")
    config.parallelism.pipeline_parallel_degree = 2  # the experts may be in other stages
    assert warnings(caplog, config, part) == []
    config.parallelism.pipeline_parallel_degree = 1
    part.moe = MoE(8, MoEArgs(num_experts=4, hidden_dim=8))
    with fake_world(2, 0):
        apply_expert_parallel(part, ParallelDims(dp_shard=2, ep=2, world_size=2))
        assert warnings(caplog, config, part) == []


@pytest.mark.parametrize(
    ("policy", "unused"),
    [
        (MixedPrecisionPolicy(), ["param"]),
        (MixedPrecisionPolicy(param_dtype=torch.bfloat16), ["reduce"]),
        (MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), []),
    ],
)
def test_dtypes_that_the_models_own_sharding_does_not_use(policy, unused, config, caplog):
    part = model()
    with fake_world(2, 0):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        found = [warning.split(" = ")[0] for warning in warnings(caplog, config, part)]
    assert found == [f"training.mixed_precision_{kind}" for kind in unused]


def test_the_guides_model_without_checkpointing_is_quiet(config, caplog):
    assert warnings(caplog, config, model()) == []


@pytest.mark.parametrize("option", ["2", "100"])
def test_some_blocks_are_enough(option, config, caplog):
    config.activation_checkpoint.mode = "selective"
    config.activation_checkpoint.selective_ac_option = option
    part = model()
    apply_ac(part, config)
    assert warnings(caplog, config, part) == []


def test_the_wrapper_of_torch_counts(config, caplog):
    config.activation_checkpoint.mode = "full"
    part = model()
    part.layers["0"] = checkpoint_wrapper(part.layers["0"])
    assert warnings(caplog, config, part) == []


def test_a_stage_without_layers_is_quiet(config, caplog):
    config.activation_checkpoint.mode, config.compile.enable = "full", True
    stage = model()
    stage.layers = nn.ModuleDict()
    assert warnings(caplog, config, stage) == []


def test_other_ranks_are_quiet(config, caplog, monkeypatch):
    config.activation_checkpoint.mode = "full"
    monkeypatch.setenv("RANK", "1")
    assert warnings(caplog, config, model()) == []


def compiled_in_place(part: nn.Module) -> nn.Module:
    part.layers["0"].compile()
    return part


def a_part_left_to_eager_mode(part: nn.Module) -> nn.Module:
    part.norm.forward = torch.compiler.disable(part.norm.forward)
    return part


def test_a_model_that_is_not_compiled(config, caplog):
    config.compile.enable = True
    for part in (model(), a_part_left_to_eager_mode(model())):
        assert warnings(caplog, config, part) == [
            f"compile.enable = true: has no effect, {COMPILE}"
        ]
    config.compile.components = ["loss"]
    assert warnings(caplog, config, model()) == []


@pytest.mark.parametrize("compile", [torch.compile, compiled_in_place])
def test_other_ways_to_compile_count(compile: Callable, config, caplog):
    config.compile.enable = True
    assert warnings(caplog, config, compile(model())) == []


@pytest.mark.parametrize("name", ["llama3", "qwen3, experts"])
@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_what_our_models_apply_is_quiet(mode, scope, name, config, caplog):
    """Among them the blocks of experts that are compiled within their checkpoint."""
    config.activation_checkpoint.mode = mode
    config.training.mixed_precision_param = "float32"
    config.compile.enable, config.compile.scope = True, scope
    part = tiny_model(name)
    apply_ac(part, config)
    assert warnings(caplog, config, apply_compile(part, config)) == []


def test_a_compiler_that_is_switched_off_is_no_fault_of_the_model(config, caplog, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    config.compile.enable = True
    assert warnings(caplog, config, torch.compile(model())) == []


def test_a_key_of_a_section_that_the_models_builder_does_not_read(config, caplog):
    config.lr_scheduler.total_steps = 5
    config.lr_scheduler.warmup_steps = 7
    section = config.lr_scheduler
    with warn_of_unread("lr_scheduler", "build_lr_scheduler_fn", config):
        assert config.lr_scheduler.warmup_steps == 7
    assert config.lr_scheduler is section
    assert [record.getMessage() for record in caplog.records] == [
        "lr_scheduler.total_steps = 5: may have no effect, because the build_lr_scheduler_fn of "
        "llama3 does not read it"
    ]


def test_ours_read_what_is_set(config, caplog):
    config.lr_scheduler.total_steps, config.lr_scheduler.decay_type = 5, "sqrt"
    with warn_of_unread("lr_scheduler", "build_lr_scheduler_fn", config):
        build_lr_scheduler([], config)
    config.loss.name, config.loss.chunk_size = "chunked_cross_entropy", 512
    with warn_of_unread("loss", "build_loss_fn", config):
        build_loss(config)
    assert caplog.records == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_tells_which_keys_are_of_others(name, config, caplog):
    options = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "momentum": 0.9, "weight_decay": 0.2}
    config.optimizer = Optimizer(name=name, **options, muon_lr=0.1, muon_weight_decay=0.2)
    with warn_of_unread("optimizer", "build_optimizer_fn", config):
        build_optimizer([model()], config, ParallelDims.from_config(config.parallelism, 1))
    unread = {
        "AdamW": ["momentum", "muon_lr", "muon_weight_decay"],
        "Adam": ["momentum", "muon_lr", "muon_weight_decay"],
        "SGD": ["beta1", "beta2", "eps", "muon_lr", "muon_weight_decay"],
        "Muon": [],
    }
    told = [record.getMessage().partition(" = ")[0] for record in caplog.records]
    assert told == [f"optimizer.{key}" for key in unread[name]]
