"""CUDA's code paths without a GPU: PyTorch's CUDA build, on a GPU whose kernels do nothing.

The numbers mean nothing here. What is tested is that all that runs on the host does: no tensor is
on the wrong device, no kernel refuses its types, nothing waits for the device in a step, Triton
compiles what inductor writes, and the allocator's peak is the planned one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build import build

from torchtitan.config import load_config
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        torch.version.cuda is None or torch.cuda.is_available() or shutil.which("gcc") is None,
        reason="for the CUDA build of PyTorch, gcc, and no GPU",
    ),
]

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "torchtitan" / "models"
STEPS = 4


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("null_gpu"))


@pytest.fixture
def run(library: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs null_train.py or another script; returns what it printed."""

    def run(*options: str, ranks: int = 1, script: str = "null_train.py", **env: str) -> str:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        start = torchrun if ranks > 1 else []
        for context in tmp_path.glob("context_*"):
            context.unlink()
        done = subprocess.run(
            [
                sys.executable,
                *start,
                HERE / script,
                *options,
                f"--job.dump_folder={tmp_path / 'run'}",
            ],
            env=os.environ
            | {
                "LD_PRELOAD": str(library),
                "LD_LIBRARY_PATH": str(library.parent),
                "NULL_GPUS": "8",
                "NULL_GPU_FOLDER": str(tmp_path),
                "OMP_NUM_THREADS": "1",
            }
            | env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr
        assert len(list(tmp_path.glob("context_*"))) == ranks, "a rank has used another's GPU"
        return done.stdout

    return run


def debug_model(name: str, file: str = "debug_model") -> list[str]:
    return [
        f"--job.config_file={MODELS / name / 'train_configs' / file}.toml",
        "--training.mixed_precision_param=bfloat16",
        f"--training.steps={STEPS}",
    ]


def degree(kind: str, size: int = 2) -> str:
    return f"--parallelism.{kind}_degree={size}"


NO_SYNC = {"REFUSE_SYNC": "1"}
DEBUG_MODELS = {
    "llama3": debug_model("llama3"),
    "qwen3": debug_model("qwen3"),
    "qwen3_moe": debug_model("qwen3", "debug_model_moe"),
    "deepseek_v3": debug_model("deepseek_v3"),
    "gpt_oss": debug_model("gpt_oss"),
    "llama4": debug_model("llama4"),
    "gemma3": debug_model("gemma3"),
}
FEATURES = {
    "selective": ["--activation_checkpoint.mode=selective"],
    "full": ["--activation_checkpoint.mode=full"],
    "accumulation": ["--training.global_batch_size=32"],
    "deterministic": ["--debug.deterministic"],
    "muon": ["--optimizer.name=Muon"],
    "float8": ["--model.converters=quantize.linear.float8"],
    "validation": ["--validation.enable", "--validation.freq=2", "--validation.steps=2"],
    "compile": ["--compile.enable"],
    "memory_budget": ["--compile.enable", "--activation_checkpoint.mode=memory_budget"],
    "compile_selective": ["--compile.enable", "--activation_checkpoint.mode=selective"],
    "memory_snapshot": ["--profiling.enable_memory_snapshot", "--profiling.profile_freq=4"],
}
FLOAT8_GATHER = [
    "--model.converters=quantize.linear.float8",
    "--quantize.linear.float8.enable_fsdp_float8_all_gather",
]
LAYOUTS = {
    "fsdp": (2, "llama3", []),
    "ddp": (2, "llama3", [degree("data_parallel_replicate"), degree("data_parallel_shard", 1)]),
    "hsdp": (4, "llama3", [degree("data_parallel_replicate"), degree("data_parallel_shard")]),
    "tp": (2, "llama3", [degree("tensor_parallel")]),
    "cp": (2, "llama3", [degree("context_parallel")]),
    "ring": (
        2,
        "llama3",
        [degree("context_parallel"), "--parallelism.context_parallel_method=ring"],
    ),
    "fsdp_compile": (2, "llama3", ["--compile.enable"]),
    "ep": (2, "deepseek_v3", [degree("expert_parallel")]),
    "ep_compile": (2, "qwen3_moe", [degree("expert_parallel"), "--compile.enable"]),
    "fsdp_tp": (4, "llama3", [degree("tensor_parallel")]),
    "float8_gather": (2, "llama3", [*FLOAT8_GATHER, "--compile.enable"]),
    "muon": (2, "llama3", ["--optimizer.name=Muon"]),
    "muon_ep": (2, "qwen3_moe", [degree("expert_parallel"), "--optimizer.name=Muon"]),
    "pp": (2, "llama3", [degree("pipeline_parallel"), "--training.local_batch_size=8"]),
}
WAITING = {
    "pp_tied": (2, "gemma3", [degree("pipeline_parallel"), "--training.local_batch_size=8"]),
    "checkpoints": (
        2,
        "llama3",
        ["--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.async_mode=async"],
    ),
    "stragglers": (2, "llama3", ["--metrics.straggler_freq=2"]),
}
STREAMS = {
    "hsdp": LAYOUTS["hsdp"],
    "ep": LAYOUTS["ep"],
    "float8_gather": (2, "llama3", FLOAT8_GATHER),
    "checkpoints": WAITING["checkpoints"],
}


@pytest.mark.parametrize("model", DEBUG_MODELS)
def test_a_model_trains_without_waiting_for_the_device(run: Callable[..., str], model: str) -> None:
    run(*DEBUG_MODELS[model], **NO_SYNC)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_works_without_waiting_for_the_device(
    run: Callable[..., str], feature: str
) -> None:
    run(*DEBUG_MODELS["llama3"], *FEATURES[feature], **NO_SYNC)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_works_by_nccl_without_waiting_for_the_device(
    run: Callable[..., str], layout: str
) -> None:
    ranks, model, options = LAYOUTS[layout]
    run(*DEBUG_MODELS[model], *options, ranks=ranks, **NO_SYNC)


@pytest.mark.parametrize("layout", WAITING)
def test_a_layout_works_whose_host_waits_for_the_device(
    run: Callable[..., str], layout: str
) -> None:
    ranks, model, options = WAITING[layout]
    run(*DEBUG_MODELS[model], *options, ranks=ranks)


@pytest.mark.parametrize("layout", STREAMS)
def test_streams_wait_for_each_other(run: Callable[..., str], layout: str) -> None:
    """PyTorch's sanitizer raises where one may change what another uses at the same time."""
    ranks, model, options = STREAMS[layout]
    run(*DEBUG_MODELS[model], *options, ranks=ranks, TORCH_CUDA_SANITIZER="1")


@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_need_no_kernel_that_deterministic_runs_refuse(
    run: Callable[..., str], model: str
) -> None:
    run(*DEBUG_MODELS[model], "--debug.deterministic")


@pytest.mark.parametrize("layout", ["fsdp", "ddp", "hsdp"])
def test_a_run_resumes_by_nccl(run: Callable[..., str], layout: str, tmp_path: Path) -> None:
    ranks, model, options = LAYOUTS[layout]
    options = [*DEBUG_MODELS[model], *options, "--checkpoint.enable", "--checkpoint.interval=2"]
    for steps in 2, 4:
        run(*options, f"--training.steps={steps}", ranks=ranks)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 4
    assert (tmp_path / "run" / "checkpoint" / "step-4").is_dir()


def test_dropout_of_dtensors_draws_by_the_state_of_each_rank(run: Callable[..., str]) -> None:
    run(*DEBUG_MODELS["llama3"], ranks=2, script="null_dropout.py")


def test_no_group_takes_memory_of_nccl_for_a_few_numbers(
    run: Callable[..., str], tmp_path: Path
) -> None:
    experts = [*DEBUG_MODELS["qwen3_moe"], degree("expert_parallel"), degree("tensor_parallel")]
    few = ["--training.on_spike=warn", "--metrics.block_norm_freq=1"]
    run(*experts, *FEATURES["validation"], *few, ranks=4)
    communicators = {path.name.partition("-")[0] for path in tmp_path.glob("*-*")}
    assert len(communicators) == 4 * 2  # of tensors, experts, and FSDP of experts and of the rest


PLANNED = {
    "llama3/llama3_1b": 1,
    "llama3/llama3_3b": 8,
    "llama3/llama3_8b": 8,
    "llama3/llama3_405b": 512,
    "deepseek_v3/deepseek_v3_16b": 64,
}


@pytest.mark.parametrize("name", PLANNED)
def test_the_allocators_peak_is_the_planned_one(run: Callable[..., str], name: str) -> None:
    planned, peak = planned_and_peak(run, name, "--compile.enable=false")
    assert planned == pytest.approx(peak, rel=0.02)


COMPILED = {
    "llama3/llama3_1b": ["--activation_checkpoint.mode=none", "--training.local_batch_size=2"],
    "llama3/llama3_3b": ["--activation_checkpoint.mode=none", "--training.local_batch_size=1"],
    "llama3/llama3_8b": ["--activation_checkpoint.mode=none", "--training.seq_len=4096"],
    "qwen3/qwen3_8b": ["--activation_checkpoint.mode=selective", degree("tensor_parallel")],
}


@pytest.mark.parametrize("name", COMPILED)
def test_so_it_is_compiled(run: Callable[..., str], name: str) -> None:
    planned, peak = planned_and_peak(run, name, "--compile.enable", *COMPILED[name])
    assert planned == pytest.approx(peak, rel=0.04)


def planned_and_peak(run: Callable[..., str], name: str, *more: str) -> tuple[float, float]:
    model, file = name.split("/")
    world_size = PLANNED.get(name, 8)
    options = [
        f"--job.config_file={MODELS / model / 'train_configs' / file}.toml",
        "--model.tokenizer_path=bytes",
        "--training.dataset=stdlib",
        "--checkpoint.enable=false",
        "--training.global_batch_size=-1",  # one micro-batch a step
        *more,
    ]
    planned = plan_run(load_config(options), world_size, DEVICES["h100"]).peak
    told = run(*options, NULL_WORLD=str(world_size))
    return planned, json.loads(told.splitlines()[-1])["peak"]
