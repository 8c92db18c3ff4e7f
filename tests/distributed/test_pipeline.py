"""A pipeline trains like one process, under every schedule and with every other parallelism."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_llama
import torch
from equality import (
    SAVE,
    assert_equal_curves,
    assert_equal_runs,
    assert_equal_weights,
    newest_weights,
)
from harness import read_lines, short_and_long, train
from safetensors.torch import load_file

DENSE = "torchtitan/models/llama3/train_configs/debug_model.toml"
MOE = "torchtitan/models/qwen3/train_configs/debug_model_moe.toml"
SMALL = (
    "--training.steps=8",
    "--training.seq_len=64",
    "--training.global_batch_size=8",
    "--training.mixed_precision_param=float32",
    "--metrics.log_freq=1",
    "--metrics.block_norm_freq=2",
    "--lr_scheduler.warmup_steps=8",
    "--optimizer.lr=5e-4",  # at a higher rate rounding grows tenfold in a step
    "--activation_checkpoint.mode=none",
)
VALIDATION = (
    "--validation.enable=true",
    "--validation.freq=4",
    "--validation.local_batch_size=8",
    "--validation.seq_len=128",
    "--validation.steps=2",
)
CSV = "0F0,0F1,,,0B0,0B1\n,1F0,1B0,1F1,1B1,\n"


def pipeline(degree: int = 2, **others: object) -> tuple[str, ...]:
    names = {"schedule": "pipeline_parallel_schedule"}
    names |= {"microbatch": "pipeline_parallel_microbatch_size"}
    names |= {key: f"{key}_parallel_degree" for key in ("tensor", "context", "expert")}
    names |= {"rep": "data_parallel_replicate_degree", "shard": "data_parallel_shard_degree"}
    options = [f"--parallelism.pipeline_parallel_degree={degree}"]
    return (*options, *(f"--parallelism.{names[key]}={value}" for key, value in others.items()))


LAYOUTS = {
    # In CI with larger micro-batches, which takes less time.
    "interleaved": (2, 8, pipeline(schedule="Interleaved1F1B", microbatch=2)),
    "zbv": (2, 8, pipeline(schedule="ZBVZeroBubble", microbatch=2)),
}
LONG_LAYOUTS = {
    "pp2_fsdp2": (4, 4, pipeline(shard=2, microbatch=2)),
    "pp2_tp2": (4, 8, pipeline(tensor=2, microbatch=4)),
    "pp2_cp2": (4, 8, pipeline(context=2)),
    "1f1b": (2, 8, pipeline()),
    "dual_pipe_v": (2, 8, pipeline(schedule="DualPipeV")),
    "chunked_loss": (2, 8, (*pipeline(), "--loss.name=chunked_cross_entropy")),
    "gpipe": (2, 8, pipeline(schedule="GPipe")),
    "looped_bfs": (2, 8, pipeline(schedule="LoopedBFS")),
    "interleaved_zero_bubble": (2, 8, pipeline(schedule="InterleavedZeroBubble")),
    "accumulation": (2, 4, pipeline(microbatch=2)),
    "pp4": (4, 8, pipeline(4)),
    "pp2_hsdp": (8, 2, pipeline(rep=2, shard=2)),
    "pp2_fsdp2_tp2": (8, 4, pipeline(shard=2, tensor=2)),
    "pp2_cp2_tp2": (8, 8, pipeline(context=2, tensor=2)),
    "pp2_cp2_tp2_zbv": (8, 8, pipeline(context=2, tensor=2, schedule="ZBVZeroBubble")),
    "pp2_fsdp2_dual_pipe_v": (4, 4, pipeline(shard=2, schedule="DualPipeV")),
    "pp2_fsdp2_ac_full_zbv": (
        4,
        4,
        (*pipeline(shard=2, schedule="ZBVZeroBubble"), "--activation_checkpoint.mode=full"),
    ),
    "compiled_zbv": (
        2,
        8,
        (
            *pipeline(schedule="ZBVZeroBubble"),
            "--compile.enable=true",
            "--compile.backend=aot_eager",
        ),
    ),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    options = (*SMALL, *SAVE, "--training.local_batch_size=8", *VALIDATION)
    train(folder, f"--job.config_file={DENSE}", *options)
    return folder


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_a_pipeline_trains_like_one_process(
    layout: tuple, one_process: Path, tmp_path: Path
) -> None:
    ranks, batch, options = layout
    train(
        tmp_path,
        f"--job.config_file={DENSE}",
        *SMALL,
        *SAVE,
        f"--training.local_batch_size={batch}",
        *options,
        ranks=ranks,
    )
    assert_equal_runs(tmp_path, one_process)


@pytest.mark.parametrize(
    "schedule",
    [
        "ZBVZeroBubble",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("1F1B", "Interleaved1F1B", "DualPipeV")
        ),
    ],
)
def test_validation_gives_the_loss_of_one_process(
    schedule: str, one_process: Path, tmp_path: Path
) -> None:
    options = (*SMALL, "--training.local_batch_size=8", *VALIDATION, *pipeline(schedule=schedule))
    train(tmp_path, f"--job.config_file={DENSE}", *options, ranks=2)
    curves = [read_lines(folder / "validation.jsonl") for folder in (tmp_path, one_process)]
    assert_equal_curves(*curves)


@pytest.mark.long
def test_a_schedule_from_a_file(one_process: Path, tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(CSV)
    options = (
        *pipeline(microbatch=4),
        f"--parallelism.pipeline_parallel_schedule_csv={path}",
        "--parallelism.pipeline_parallel_split_points",
        "layers.1",
        "--training.local_batch_size=8",
    )
    train(tmp_path / "run", f"--job.config_file={DENSE}", *SMALL, *SAVE, *options, ranks=2)
    assert_equal_runs(tmp_path / "run", one_process)


def test_bfloat16_gives_the_gradients_of_accumulation(tmp_path: Path) -> None:
    """Under autocast, backward passes computed in bfloat16 what forward passes did in float32:
    attention whose values have another size than its keys."""
    shared = ("--model.name=deepseek_v3", *SMALL, "--training.steps=1")
    shared += ("--training.mixed_precision_param=bfloat16",)
    one = train(tmp_path / "1", *shared, "--training.local_batch_size=1")
    options = (*pipeline(), "--training.local_batch_size=8")
    two = train(tmp_path / "2", *shared, *options, ranks=2)
    assert_equal_curves(two, one, loss_tolerance=1e-6, norm_tolerance=1e-6)


RULES = r"""
[[optimizer.rules]]
pattern = "tok_embeddings"
lr_scale = 0.5
[[optimizer.rules]]
pattern = 'layers\.0\.attention'
lr_scale = 0.0
[[optimizer.rules]]
pattern = 'layers\.3\.|^output'
lr_scale = 2.0
weight_decay = 0.0
"""


def test_rules_hold_on_the_stages_that_have_their_parameters(tmp_path: Path) -> None:
    config = tmp_path / "rules.toml"
    config.write_text(Path(DENSE).read_text() + RULES)
    shared = (f"--job.config_file={config}", *SMALL, *SAVE, "--training.local_batch_size=8")
    one = train(tmp_path / "one", *shared)
    options = pipeline(schedule="Interleaved1F1B", microbatch=2)
    two = train(tmp_path / "pp2", *shared, *options, ranks=2)
    assert_equal_runs(tmp_path / "pp2", tmp_path / "one")
    assert [line["lr"] for line in two] == [line["lr"] for line in one]


TIED = (
    *tiny_llama.OPTIONS,
    "--model.flavor=tied",
    *SAVE,
    "--checkpoint.last_save_in_hf",
    "--metrics.block_norm_freq=2",
    "--lr_scheduler.decay_ratio=0",
    "--optimizer.lr=5e-4",
    # The copy in the last stage counts as an embedding, too.
    "--optimizer.no_decay",
    "embedding",
    "--optimizer.weight_decay=10",
)


def test_stages_that_share_a_weight_train_like_one_process(tmp_path: Path) -> None:
    """In the second half, the first and the last stage are on one rank; the state is resumed."""
    one, halves = tmp_path / "one", tmp_path / "pp2"
    train(one, *TIED, "--training.local_batch_size=8")
    options = (*TIED, "--training.local_batch_size=8")
    train(halves, *options, *pipeline(microbatch=2), "--training.steps=3", ranks=2)
    zbv = pipeline(schedule="ZBVZeroBubble", microbatch=2)
    train(halves, *options, *zbv, ranks=2)
    assert_equal_runs(halves, one)
    weights = newest_weights(halves)
    copies = [weights[f"model.{name}.weight"] for name in ("tok_embeddings", "output")]
    assert torch.equal(*copies)
    exported = [
        load_file(folder / "checkpoint" / "step-6-hf" / "model-00001-of-00001.safetensors")
        for folder in (halves, one)
    ]
    assert exported[0].keys() == exported[1].keys() and "lm_head.weight" not in exported[0]
    assert_equal_weights(*exported)


@pytest.mark.long
@pytest.mark.parametrize("degrees", [{"shard": 2}, {"rep": 2, "shard": 1}, {"tensor": 2}])
def test_stages_that_share_a_sharded_weight_start_from_hugging_face(
    degrees: dict[str, int], tmp_path: Path
) -> None:
    train(tmp_path / "first", *TIED, "--training.local_batch_size=8", "--debug.seed=5")
    source = tmp_path / "first" / "checkpoint" / "step-6-hf"
    options = (*TIED, "--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={source}")
    train(tmp_path / "one", *options, "--training.local_batch_size=8")
    batch = f"--training.local_batch_size={8 if 'tensor' in degrees else 4}"
    train(tmp_path / "pp2", *options, batch, *pipeline(microbatch=2, **degrees), ranks=4)
    assert_equal_runs(tmp_path / "pp2", tmp_path / "one")


@pytest.mark.long
def test_experts_in_a_pipeline(tmp_path: Path) -> None:
    shared = (f"--job.config_file={MOE}", *SMALL, *SAVE)
    train(tmp_path / "1", *shared, "--training.local_batch_size=8")
    options = (*pipeline(shard=2, expert=2), "--training.local_batch_size=4")
    train(tmp_path / "4", *shared, *options, ranks=4)
    assert_equal_runs(tmp_path / "4", tmp_path / "1")


EXPERTS_AND_CHECKPOINTING = {
    "1f1b_selective": ("1F1B", "selective"),
    "1f1b_full": ("1F1B", "full"),
    "zbv_full": ("ZBVZeroBubble", "full"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "1f1b_full" else pytest.mark.long)
        for name in EXPERTS_AND_CHECKPOINTING
    ],
)
def test_experts_in_a_pipeline_with_activation_checkpointing(name: str, tmp_path: Path) -> None:
    schedule, mode = EXPERTS_AND_CHECKPOINTING[name]
    shared = (f"--job.config_file={MOE}", *SMALL, "--training.steps=3")
    shared += ("--training.local_batch_size=8",)
    one = train(tmp_path / "1", *shared)
    options = (*pipeline(schedule=schedule), f"--activation_checkpoint.mode={mode}")
    assert_equal_curves(train(tmp_path / "2", *shared, *options, ranks=2), one)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((2, 8, pipeline(microbatch=4)), (1, 8, ())),
        pytest.param(
            (1, 8, ()), (2, 8, pipeline(schedule="ZBVZeroBubble")), marks=pytest.mark.long
        ),
        pytest.param(
            (4, 4, pipeline(shard=2)),
            (2, 8, ("--parallelism.tensor_parallel_degree=2",)),
            marks=pytest.mark.long,
        ),
    ],
    ids=["pp2-one", "one-zbv", "pp2_fsdp2-tp2"],
)
def test_a_checkpoint_of_a_pipeline_resumes_on_another_layout(
    saved: tuple, resumed: tuple, tmp_path: Path
) -> None:
    for steps, (ranks, batch, options) in ((4, saved), (8, resumed)):
        lines = train(
            tmp_path,
            f"--job.config_file={DENSE}",
            *SMALL,
            f"--training.local_batch_size={batch}",
            "--checkpoint.enable=true",
            "--checkpoint.interval=4",
            f"--training.steps={steps}",
            "--lr_scheduler.decay_ratio=0",  # the schedule of 4 steps is that of 8
            *options,
            ranks=ranks,
        )
    whole = train(
        tmp_path / "whole",
        f"--job.config_file={DENSE}",
        *SMALL,
        "--training.local_batch_size=8",
        "--lr_scheduler.decay_ratio=0",
    )
    assert_equal_curves(lines, whole)
