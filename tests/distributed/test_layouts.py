"""Every layout trains like one process: same seed, same losses, same weights."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
[model]
name = "llama3"
flavor = "debugmodel"
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 5
[training]
dataset = "stdlib"
local_batch_size = {local_batch_size}
global_batch_size = 8
seq_len = 64
steps = 20
mixed_precision_param = "float32"
[metrics]
log_freq = 1
[activation_checkpoint]
mode = "none"
"""


def train(folder: Path, processes: int, local_batch_size: int, *options: str) -> list[dict]:
    """Run the trainer as a user would; return the lines of metrics.jsonl."""
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(local_batch_size=local_batch_size))
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
        launcher[-2:-2] = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*launcher, "torchtitan.train", "--job.config_file", str(config)]
    command += ["--job.dump_folder", str(folder / "run"), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train(tmp_path_factory.mktemp("layouts") / "one", 1, 8)


TP2 = "--parallelism.tensor_parallel_degree=2"
REPLICATE2 = "--parallelism.data_parallel_replicate_degree=2"
LAYOUTS = {
    "accumulation": (1, 2),
    "ddp2": (2, 4, REPLICATE2, "--parallelism.data_parallel_shard_degree=1"),
    "ddp2_accumulation": (2, 2, REPLICATE2, "--parallelism.data_parallel_shard_degree=1"),
    "fsdp2": (2, 4),
    "fsdp4": (4, 2),
    "hsdp2x2": (4, 2, REPLICATE2),
    "hsdp2x2_accumulation": (4, 1, REPLICATE2),
    "tp2": (2, 8, TP2),
    "tp2_gathered_logits": (2, 8, TP2, "--parallelism.disable_loss_parallel"),
    "fsdp2xtp2": (4, 4, TP2),
    "fsdp2_chunked_loss": (2, 4, "--loss.name=chunked_cross_entropy", "--loss.chunk_size=100"),
    "fsdp2xtp2_chunked_loss": (4, 4, TP2, "--loss.name=chunked_cross_entropy"),
    "full_ac_fsdp2": (2, 4, "--activation_checkpoint.mode=full"),
    "op_ac_fsdp2xtp2": (4, 4, TP2, "--activation_checkpoint.mode=selective"),
    "layer_ac": (
        1,
        8,
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=2",
    ),
}
LONG_LAYOUTS = {
    "fsdp8": (8, 1),
    "hsdp2x4": (8, 1, REPLICATE2),
    "hsdp2xfsdp2xtp2": (8, 2, REPLICATE2, TP2),
    "tp4": (4, 8, "--parallelism.tensor_parallel_degree=4"),
    "fsdp2xtp4": (8, 4, "--parallelism.tensor_parallel_degree=4"),
    "never_reshard": (2, 4, "--parallelism.fsdp_reshard_after_forward=never"),
    "always_reshard": (2, 4, "--parallelism.fsdp_reshard_after_forward=always"),
}


def check(lines: list[dict], reference: list[dict]) -> None:
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line, expected in zip(lines, reference, strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(line[key], expected[key], rel_tol=1e-4), (key, line, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_losses_of_one_process(
    name: str, one_process: list[dict], tmp_path: Path
) -> None:
    processes, local_batch_size, *options = LAYOUTS[name]
    check(train(tmp_path / name, processes, local_batch_size, *options), one_process)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_LAYOUTS)
def test_larger_layout_gives_the_losses_of_one_process(
    name: str, one_process: list[dict], tmp_path: Path
) -> None:
    processes, local_batch_size, *options = LONG_LAYOUTS[name]
    check(train(tmp_path / name, processes, local_batch_size, *options), one_process)
