"""docs/metrics.md lists every key of metrics.jsonl, and no other; what a run leaves is complete.

    pytest tests/e2e/test_metric_keys.py --write-docs

writes the table from `torchtitan.components.metric_keys`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import tiny_llama
from harness import read_lines, train

from torchtitan.components.metric_keys import SECTIONS, VALIDATION, find

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_KEYS = re.compile(r"(<!-- keys: .*? -->\n).*?(<!-- end of keys -->\n)", re.S)

GPU = {"mfu", "peak_memory_reserved_percent"}
"""Keys that no CPU has; tests/unit/components/test_metrics.py makes them."""

FAULTS = (
    *("--training.on_spike=warn", "--metrics.straggler_freq=1"),
    *("--metrics.block_norm_freq=2", "--training.max_norm=0.1"),
)

REPLICAS = {"replica_groups"}
"""Of tests/faults/test_replica_groups.py, which needs torchft."""

MIXTURE = """
[job]
custom_import = "z_loss_qwen3"
[model]
name = "z_loss_qwen3"
flavor = "tiny"
[training]
steps = 2
seq_len = 64
local_batch_size = 2
mixed_precision_param = "float32"
[data]
packing = "best_fit"
on_error = "skip"
[[data.sources]]
name = "lines"
dataset = "jsonl"
dataset_path = "{folder}/lines.jsonl"
[[data.sources]]
name = "python"
dataset = "stdlib"
[validation]
enable = true
steps = 1
seq_len = 64
local_batch_size = 2
[[validation.sources]]
dataset = "stdlib_validation"
[[validation.sources]]
name = "lines"
dataset = "jsonl"
dataset_path = "{folder}/lines.jsonl"
weight = 3.0
[metrics]
log_freq = 1
"""

MULTI_TOKEN = (
    "--model.name=deepseek_v3",
    "--model.flavor=debugmodel_mtp",
    "--training.steps=1",
    "--training.seq_len=64",
    "--training.local_batch_size=1",
    "--training.mixed_precision_param=float32",
)


def table() -> str:
    lines = ["| key | unit | meaning | only with |", "|---|---|---|---|"]
    for entries in SECTIONS.values():
        for e in entries:
            lines.append(f"| `{e.key}` | {e.unit or 'number'} | {e.meaning} | {e.when} |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_keys(request: pytest.FixtureRequest) -> None:
    text = PAGE.read_text()
    written = _KEYS.sub(lambda match: match[1] + table() + match[2], text)
    if request.config.getoption("--write-docs"):
        PAGE.write_text(written)
    else:
        assert text == written, "run: pytest tests/e2e/test_metric_keys.py --write-docs"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One dataset, and everything else that makes keys."""
    folder = tmp_path_factory.mktemp("keys")
    documents = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    (folder / "lines.jsonl").write_text("\n".join([*documents, "malformed"]) + "\n")
    (folder / "run.toml").write_text(MIXTURE.replace("{folder}", str(folder)))
    train(folder / "mixture", "--job.config_file", str(folder / "run.toml"))
    train(folder / "plain", *tiny_llama.OPTIONS, *FAULTS, ranks=2)
    train(folder / "tokens", *MULTI_TOKEN)
    return [folder / "mixture", folder / "plain", folder / "tokens"]


def test_runs_have_the_keys_of_the_page_and_no_others(runs: list[Path]) -> None:
    keys = {key for run in runs for row in read_lines(run / "metrics.jsonl") for key in row}
    families = {find(key)[1].key for key in keys - {"step"}}
    documented = {entry.key for entries in SECTIONS.values() for entry in entries}
    assert families - documented == set(), "name them in torchtitan/components/metric_keys.py"
    assert documented - families == GPU | REPLICAS
    [row] = read_lines(runs[0] / "validation.jsonl")
    losses = [row[f"{VALIDATION.key}/{name}"] for name in ("stdlib_validation", "lines")]
    assert len(row) == 2 + len(losses)
    assert row[VALIDATION.key] == pytest.approx((losses[0] + 3 * losses[1]) / 4)


def test_the_norms_of_the_blocks_make_up_the_norm_before_clipping(runs: list[Path]) -> None:
    measured = []
    for row in read_lines(runs[1] / "metrics.jsonl"):
        norms = [value for key, value in row.items() if key.startswith("grad_norm/")]
        if norms:
            measured.append(row["step"])
            assert row["grad_norm"] > 0.1  # which the run clips to
            assert math.hypot(*norms) == pytest.approx(row["grad_norm"], rel=1e-5)
            assert row["grad_norm/layers.1"] > 0 and row["weight_norm/output"] > 0
    assert measured and not any(step % 2 for step in measured)


def test_a_run_leaves_its_environment(runs: list[Path]) -> None:
    facts = json.loads((runs[1] / "environment.json").read_text())
    assert facts["processes"] == "2"
    assert facts["device"].startswith("cpu")
    assert {"torchtitan", "torch", "python", "host"} < set(facts)
