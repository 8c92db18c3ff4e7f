"""Runs in float8 are planned with the products that a GPU makes, not with their emulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.errors import ConfigError
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.trace import quantizes, trace_step
from torchtitan.runtime.fake_world import fake_world

LARGE = ["--model.flavor=8B", "--training.seq_len=8192", "--training.local_batch_size=1"]
FLOAT8 = ["--model.converters", "quantize.linear.float8"]


def config(*options: str) -> JobConfig:
    return load_config([*LARGE, "--activation_checkpoint.mode=none", *options])


def products(job_config: JobConfig) -> dict[str, int]:
    """FLOPs of a step by the name of the operation."""
    with fake_world(8, 0):
        stage = trace_step(job_config)
    total: dict[str, int] = {}
    for part in (stage.forward, stage.backward):
        for operation, calls in part.operations.items():
            if operation.flops:
                total[operation.name] = total.get(operation.name, 0) + calls * operation.flops
    return total


def test_the_linear_layers_change_sides_and_no_flop_is_lost() -> None:
    options = ["--model.flavor=debugmodel", "--training.seq_len=64"]
    before, after = products(config(*options)), products(config(*options, *FLOAT8))
    assert "aten::_scaled_mm" not in before
    # What is left in bfloat16 is the output layer.
    assert after["aten::mm"] < before["aten::mm"] / 2
    assert after["aten::_scaled_mm"] + after["aten::mm"] == before["aten::mm"]


def test_a_model_with_8_bits_is_known_by_its_converters() -> None:
    assert quantizes(config(*FLOAT8)) and not quantizes(config())


def test_experts_change_sides_but_for_the_gradients_of_weights() -> None:
    options = ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--training.seq_len=64"]
    experts = ["--model.converters", "quantize.grouped_mm.float8"]
    before, after = products(config(*options)), products(config(*options, *experts))
    whole = before["aten::_grouped_mm"]
    # Forward, and gradients of inputs: two of three.
    assert after["aten::_scaled_grouped_mm"] == pytest.approx(2 / 3 * whole)
    assert after["aten::_grouped_mm"] == pytest.approx(whole / 3)


GATHER = [*FLOAT8, "--quantize.linear.float8.enable_fsdp_float8_all_gather"]
PP2 = ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]


@pytest.mark.parametrize(
    "layout", [[], *(pytest.param(o, marks=pytest.mark.long) for o in (["--compile.enable"], PP2))]
)
def test_weights_gathered_in_float8_take_half_of_the_bytes(layout: list[str]) -> None:
    """All but the embedding, the head and the norms."""
    options = ["--model.flavor=debugmodel", "--training.seq_len=64", *layout]
    plain, gathered = (
        plan_run(config(*options, *o), 8, DEVICES["h100"]).busiest for o in (FLOAT8, GATHER)
    )
    (before,), (after,) = (
        [t for t in rank.traffic if t.kind == "all_gather"] for rank in (plain, gathered)
    )
    assert after.calls == before.calls
    assert 0.5 < after.sent / before.sent < 0.6
    assert 0.5 < gathered.memory.whole_parameters / plain.memory.whole_parameters < 0.6
    assert gathered.memory.activations <= plain.memory.activations * (1 + 1e-3)
    assert gathered.memory.total < plain.memory.total


@pytest.mark.long
def test_a_large_model_is_faster_and_as_large() -> None:
    plain, float8 = (plan_run(config(*o), 8, DEVICES["h100"]) for o in ([], FLOAT8))
    assert 0.5 < float8.busiest.compute_seconds / plain.busiest.compute_seconds < 0.75
    assert float8.peak == pytest.approx(plain.peak, rel=0.05)
    no_faster = replace(DEVICES["h100"], float8_flops=989e12)
    slow = plan_run(config(*FLOAT8), 8, no_faster)
    assert slow.busiest.compute_seconds == pytest.approx(plain.busiest.compute_seconds, rel=0.02)


@pytest.mark.long
def test_tensor_parallel_ranks_send_what_they_send_without() -> None:
    tp = ["--parallelism.tensor_parallel_degree", "8"]
    plain, float8 = (
        plan_run(config(*options), 8, DEVICES["h100"]).busiest.traffic
        for options in (tp, [*tp, *FLOAT8])
    )
    assert {(t.group, t.kind): t.calls for t in float8} == {
        (t.group, t.kind): t.calls for t in plain
    }


@pytest.mark.parametrize(
    ("converter", "device", "needs"),
    [("linear.float8", "a100", "8.9.*a100 has 8.0"), ("linear.mx", "h100", "10.0.*h100 has 9.0")],
)
def test_a_device_without_the_products_is_refused(converter: str, device: str, needs: str) -> None:
    """As by the trainer, unless they are emulated."""
    options = ["--model.flavor=debugmodel", "--model.converters", f"quantize.{converter}"]
    with pytest.raises(ConfigError, match=rf"quantize.{converter}.emulate.* capability {needs}"):
        plan_run(config(*options), 8, DEVICES[device])
    emulated = config(*options, f"--quantize.{converter}.emulate=true")
    assert "aten::_scaled_mm" not in products(emulated)
