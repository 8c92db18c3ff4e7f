"""What a compiled model keeps for its backward pass. tests/null_gpu has an allocator say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchtitan.config import load_config
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.plan import Plan
from torchtitan.planning.stage import StageTracer

MODELS = Path(__file__).parents[3] / "torchtitan/models"


def plan(model: str, compiled: bool, *options: str, ranks: int = 1) -> Plan:
    file = MODELS / model / "train_configs/debug_model.toml"
    settings = ["--training.mixed_precision_param=bfloat16", "--training.global_batch_size=-1"]
    compiling = f"--compile.enable={compiled}".lower()
    config = load_config([f"--job.config_file={file}", *settings, compiling, *options])
    return plan_run(config, ranks, DEVICES["h100"])


def activations(found: Plan) -> float:
    return max(rank.memory.activations for rank in found.ranks)


@pytest.mark.parametrize("option", ["components=loss", "backend=aot_eager"])
def test_a_model_that_is_not_fused_is_planned_as_eager(option: str) -> None:
    eager, compiled = (
        plan("llama3", flag, f"--compile.{option}").busiest for flag in (False, True)
    )
    assert compiled.other_seconds == pytest.approx(eager.other_seconds)


LAYOUTS = {
    "one": (1, []),
    "fsdp": (4, ["--parallelism.data_parallel_shard_degree=4"]),
    "pipeline": (
        4,
        [
            *["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"],
            "--parallelism.data_parallel_shard_degree=2",
        ],
    ),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(n, marks=[pytest.mark.long] if n == "pipeline" else []) for n in LAYOUTS],
)
def test_the_compiler_keeps_less(layout: str) -> None:
    ranks, options = LAYOUTS[layout]
    eager, compiled = (plan("llama3", flag, *options, ranks=ranks) for flag in (False, True))
    assert 0.3 * activations(eager) < activations(compiled) < 0.9 * activations(eager)
    assert compiled.peak < eager.peak


@pytest.mark.long
def test_a_compiled_chunked_loss_has_no_buffer() -> None:
    """Of one chunk, large beside all else: the logits are in bfloat16, not in float32."""
    options = ["--model.flavor=150M", "--loss.name=chunked_cross_entropy"]
    options += ["--activation_checkpoint.mode=full", "--loss.chunk_size=8192"]
    options += ["--training.seq_len=2048", "--training.local_batch_size=4"]
    rows, vocabulary = 8192, 49152
    eager, compiled = (plan("llama3", flag, *options) for flag in (False, True))
    assert eager.peak - compiled.peak == pytest.approx(rows * vocabulary * 2, rel=0.05)


@pytest.mark.parametrize("model", [pytest.param("gemma3", marks=pytest.mark.long), "llama3"])
def test_masks_of_planned_attention_are_compiled_too(model: str, caplog) -> None:
    options = ["--training.document_mask", "--activation_checkpoint.mode=selective"]
    eager, compiled = (plan(model, flag, *options) for flag in (False, True))
    assert activations(compiled) <= activations(eager)
    assert "compiler fails" not in caplog.text


@pytest.mark.parametrize(
    ("model", "options"),
    [("llama3", ["--activation_checkpoint.mode=full"]), ("deepseek_v3", [])],
)
def test_what_the_compiler_does_not_decide_is_planned_eager(
    model: str, options: list[str], monkeypatch
) -> None:
    monkeypatch.setattr(StageTracer, "kept", lambda tracer: pytest.fail("asked"))
    assert plan(model, True, *options).peak == plan(model, False, *options).peak


def test_a_compiler_that_fails_is_told_of(monkeypatch, caplog) -> None:
    def kept(tracer: StageTracer) -> int:
        raise AssertionError("no such tensor\nand more")

    monkeypatch.setattr(StageTracer, "kept", kept)
    assert plan("llama3", True).peak == plan("llama3", False).peak
    assert (
        "memory is that of an eager run, because the compiler fails here: AssertionError: no such "
        "tensor" in caplog.text
    )
    assert "and more" not in caplog.text
