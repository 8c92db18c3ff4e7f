"""Steps that are computed twice: they change nothing, and a flipped bit is blamed on its rank."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from harness import Finished, command, read_lines
from tiny_llama import OPTIONS

from torchtitan.components.replay import checksum

REPLAY = (
    *OPTIONS,
    "--job.custom_import=poisoned_llama",
    "--model.name=poisoned_llama",
    "--training.replay_freq=2",
    "--training.steps=3",
)
HSDP = "--parallelism.data_parallel_replicate_degree=2"
LAYOUTS = {
    "one": (1, "--training.local_batch_size=8"),
    "accumulation": (1, "--training.local_batch_size=4"),
    "fsdp2": (2,),
    "fsdp2 op_ac": (2, "--activation_checkpoint.mode=selective"),
    "compile": (2, "--compile.enable", "--compile.backend=aot_eager"),
    "tp2": (2, "--parallelism.tensor_parallel_degree=2", "--training.local_batch_size=8"),
    "hsdp2x2": (
        4,
        "--parallelism.data_parallel_replicate_degree=2",
        "--training.local_batch_size=2",
    ),
    "cp2": (2, "--parallelism.context_parallel_degree=2", "--training.local_batch_size=8"),
    "pp2": (2, "--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=8"),
    "experts": (2, "--model.flavor=experts", "--parallelism.expert_parallel_degree=2"),
}
LONG = {"accumulation", "fsdp2 op_ac", "tp2", "cp2", "compile"}


def run(folder: Path, layout: str, *more: str, **env: str) -> Finished:
    ranks, *options = LAYOUTS[layout]
    options += [*more, f"--job.dump_folder={folder}"]
    return command("train", *REPLAY, *options, ranks=ranks, **env)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in LAYOUTS],
)
def test_a_replayed_step_is_the_step(layout: str, tmp_path: Path) -> None:
    runs = []
    for name, more in ("with", []), ("without", ["--training.replay_freq=0"]):
        done = run(tmp_path / name, layout, *more)
        assert done.exit_code == 0, done.err
        assert ("step 2: computed twice" in done.err) == (name == "with")
        runs.append(read_lines(tmp_path / name / "metrics.jsonl"))
    keys = [key for key in runs[0][0] if key.startswith(("loss", "grad_norm", "expert"))]
    for replayed, plain in zip(*runs, strict=True):
        assert {key: replayed[key] for key in keys} == {key: plain[key] for key in keys}


def test_a_pipeline_is_replayed_in_its_first_step(tmp_path: Path) -> None:
    """In which its stages also tell each other shapes."""
    done = run(tmp_path, "pp2", "--training.replay_freq=1", "--training.steps=1")
    assert done.exit_code == 0 and "step 1: computed twice" in done.err, done.err


# Backward passes: 1 in step 1, then 2 in step 2, times the micro-batches.
FLIPS = {"one": "3 0", "accumulation": "4 0", "fsdp2": "2 1", "tp2": "3 1", "hsdp2x2": "3 2"}


@pytest.mark.parametrize("layout", FLIPS)
def test_a_flipped_bit_is_blamed_on_the_rank(layout: str, tmp_path: Path) -> None:
    rank = FLIPS[layout].split()[1]
    done = run(tmp_path, layout, FLIP=FLIPS[layout])
    assert set(done.exit_codes) == {2} and "Traceback" not in done.err, done.err
    blamed = re.search(r"first on (rank .*?)\. The hardware", done.err)
    assert blamed and re.findall(r"rank (\d)", blamed.group(1)) == [rank], done.err
    assert "error: step 2: the same computation gave different bits" in done.err


@pytest.mark.long
def test_of_a_compiled_model_the_rank_is_among_those_named(tmp_path: Path) -> None:
    done = run(tmp_path, "compile", FLIP="2 1")
    blamed = re.search(r"first on (rank .*?)\. The hardware", done.err)
    assert blamed and "rank 1" in blamed.group(1), done.err


def test_of_a_pipeline_each_stage_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "pp2", FLIP="12 1")
    assert re.search(r"first on rank 0 .* or rank 1 .*\. The hardware", done.err), done.err


def test_a_checksum_sees_each_bit() -> None:
    for dtype in torch.float32, torch.bfloat16, torch.float64, torch.int64:
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        bits = tensor.view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.itemsize])
        before = int(checksum(tensor.T))
        for bit in range(8 * tensor.itemsize):
            flip = (1 << bit) if bit < 8 * tensor.itemsize - 1 else -(1 << bit)
            bits[1, 2] ^= flip
            assert int(checksum(tensor.T)) != before, (dtype, bit)
            bits[1, 2] ^= flip
        assert int(checksum(tensor.T)) == before
