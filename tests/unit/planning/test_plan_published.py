"""The table of docs/planning.md: published figures of clusters, and what is planned for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchtitan.config import load_config
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run

ROOT = Path(__file__).parents[3]
SELECTIVE = ["--training.local_batch_size=2", "--loss.name=cross_entropy"]
COMPILED = ["--compile.enable"]
FULL = ["--activation_checkpoint.mode=full", "--parallelism.tensor_parallel_degree=8"]
FULL += [*COMPILED, "--model.converters=quantize.linear.float8"]
PIPELINE = [*FULL, "--parallelism.pipeline_parallel_degree=8", "--training.local_batch_size=32"]
PIPELINE += ["--parallelism.pipeline_parallel_microbatch_size=1"]
SCHEDULE = "--parallelism.pipeline_parallel_schedule"
RUNS = {
    "8B, FSDP 8, selective checkpointing, eager": ("8b", 8, [*SELECTIVE, "--compile.enable=false"]),
    "the same, compiled": ("8b", 8, [*SELECTIVE, *COMPILED]),
    "70B, FSDP 32 x TP 8, full checkpointing, compiled, float8": (
        "70b",
        256,
        [*FULL, "--training.local_batch_size=16"],
    ),
    "405B, FSDP 8 x TP 8 x PP 8, 1F1B, full checkpointing, compiled, float8": (
        "405b",
        512,
        [*PIPELINE, f"{SCHEDULE}=1F1B"],
    ),
    "the same, Interleaved1F1B": ("405b", 512, [*PIPELINE, f"{SCHEDULE}=Interleaved1F1B"]),
}


@pytest.mark.long
def test_the_table_of_published_figures_is_what_is_planned() -> None:
    text = (ROOT / "docs/planning.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \| ([+-]\d+)% \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == list(RUNS)
    planned = []
    for name, published, stated, error in rows:
        flavor, ranks, options = RUNS[name]
        file = ROOT / f"torchtitan/models/llama3/train_configs/llama3_{flavor}.toml"
        length = ["--training.seq_len=8192", "--training.global_batch_size=-1"]
        config = load_config([f"--job.config_file={file}", *length, *options])
        found = plan_run(config, ranks, DEVICES["h100"]).tokens_per_second
        assert found == pytest.approx(_number(stated), rel=0.01), name
        assert round(100 * (_number(stated) / _number(published) - 1)) == int(error), name
        planned.append((_number(published), found))
    # The order of the rows agrees.
    assert sorted(planned) == sorted(planned, key=lambda pair: pair[1])


def _number(text: str) -> int:
    return int(text.replace(",", ""))
