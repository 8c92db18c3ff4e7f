"""`torchtitan converge` from the command line to the report, on real training runs."""

from __future__ import annotations

import json
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
warmup_steps = 2
[training]
dataset = "stdlib"
local_batch_size = 2
global_batch_size = 4
seq_len = 32
steps = 100
mixed_precision_param = "float32"
[debug]
seed = {seed}
"""


def converge(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchtitan", "converge", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)


def verdict(folder: Path) -> dict:
    return json.loads((folder / "outputs" / "converge" / "verdict.json").read_text())


@pytest.mark.long
def test_two_ranks_are_equal_to_one_process_and_another_seed_is_not(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(CONFIG.format(seed=42))
    (tmp_path / "seed.toml").write_text(CONFIG.format(seed=43))
    steps = ["--", "--training.steps", "3"]

    done = converge(tmp_path, "model.toml", "model.toml", "--nproc", "model-2=2", *steps)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "model-2: EQUAL to model" in done.stdout
    found = verdict(tmp_path)
    assert [run["layout"] for run in found["runs"]] == ["dp_shard 1", "dp_shard 2"]
    for metric in found["tests"][0]["metrics"].values():
        assert metric["largest"] < 1e-5
    assert (tmp_path / "outputs" / "converge" / "report.html").is_file()

    # The control again, now as a finished run.
    control = "outputs/converge/runs/model"
    done = converge(tmp_path, control, "seed.toml", *steps)
    assert done.returncode == 2
    assert f"debug.seed = 42 in {control}, 43 in seed.toml" in done.stderr

    done = converge(tmp_path, control, "seed.toml", "--allow-different", "debug.seed", *steps)
    assert done.returncode == 1, done.stdout + done.stderr[-4000:]
    assert "seed: DIVERGED from model: loss beyond 1e-4 from step 1" in done.stdout
    assert verdict(tmp_path)["tests"][0]["state"] == "diverged"


def test_a_job_that_crashes_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "model.toml").write_text(CONFIG.format(seed=42))
    (tmp_path / "broken.py").write_text(
        "from torchtitan.models.llama3 import MODEL_CONFIGS, get_train_spec as llama3\n"
        "from torchtitan.protocols.train_spec import register_train_spec\n\n\n"
        "def parallelize(*args):\n"
        "    raise RuntimeError('planted in parallelize')\n\n\n"
        "def get_train_spec(flavor):\n"
        "    spec = llama3(flavor)\n"
        "    spec.parallelize_fn = parallelize\n"
        "    return spec\n\n\n"
        "register_train_spec('broken', get_train_spec)\n"
    )
    broken = CONFIG.format(seed=42).replace('"llama3"', '"broken"')
    broken = '[job]\ncustom_import = "broken"\n' + broken
    (tmp_path / "broken.toml").write_text(broken)
    nproc = ["--nproc", "broken=2", "--allow-different", "model.name"]
    done = converge(tmp_path, "broken.toml", "model.toml", *nproc, "--", "--training.steps", "1")
    assert done.returncode == 1, done.stderr[-4000:]
    assert "exit code 1; the end of outputs/converge/runs/broken/log.txt" in done.stdout
    assert "RuntimeError: planted in parallelize" in done.stdout
    assert "ChildFailedError" not in done.stdout
    assert "model: FAILED: the control failed" in done.stdout
    report = (tmp_path / "outputs" / "converge" / "report.html").read_text()
    assert "planted in parallelize" in report
