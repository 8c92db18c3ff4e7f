"""The benchmarks run, at tiny sizes, and find what they claim to find."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    checkpoint,
    convert,
    gpu_llama3,
    gpu_plan,
    loss,
    models,
    products,
    run,
    startup,
    trainer,
)
from benchmarks.peers import compare as peers
from benchmarks.plot import draw
from benchmarks.report import Bar, Spread, Table, verdict
from torchtitan.config import load_config

TINY = """
[job]
custom_import = "benchmarks.flavors"
[model]
name = "benchmark_llama3"
flavor = "tiny"
[lr_scheduler]
warmup_steps = 0
decay_ratio = 0.0
[training]
local_batch_size = 1
global_batch_size = 2
seq_len = 32
mixed_precision_param = "float32"
[activation_checkpoint]
mode = "none"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def test_spread_is_median_and_range():
    assert str(Spread.of([1.0, 4.0, 2.0])) == "2.00 (1.00 to 4.00)"


def test_table_is_markdown():
    text = Table("Title", ["a", "b"], [["1", "2"]], "A note.").markdown()
    assert text == "## Title\n\nA note.\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"


def test_bars_are_drawn(tmp_path: Path):
    bars = [Bar("ours", Spread(1.1, 0.9, 1.3), target=1.0), Bar("theirs", Spread(1.0, 1.0, 1.0))]
    tables = [Table("Ratios", ["a"], bars=bars, bar_label="tokens/s"), Table("Words", ["a"])]
    assert draw(tables, tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert not draw(tables[1:], tmp_path / "none.png") and not (tmp_path / "none.png").exists()


def test_verdict():
    assert verdict(4.1, at_least=4) == ">= 4: met"
    assert verdict(0.97, at_least=0.98) == ">= 0.98: missed"
    assert verdict(7, at_most=6) == "<= 6: missed"


def test_trainer_and_bare_loop_take_turns_and_get_the_same_losses(tiny: Path):
    found = trainer.compare(tiny, rounds=3, steps_per_turn=2)
    assert len(found.trainer.wall) == len(found.bare.wall) == 3
    assert found.tokens_per_turn == 2 * 2 * 32
    assert found.loss_difference < 1e-6
    assert 0 < found.ratio("cpu").low <= found.ratio("cpu").median
    assert "| tiny |" in trainer.table([found]).markdown()


def test_a_loop_that_does_other_work_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    step = trainer.BareLoop.step

    def skip_a_micro_batch(self, micro_batches):
        return step(self, micro_batches[:1])

    monkeypatch.setattr(trainer.BareLoop, "step", skip_a_micro_batch)
    with pytest.raises(RuntimeError, match="losses of trainer and bare loop differ"):
        trainer.compare(tiny, rounds=1, steps_per_turn=1)


@pytest.mark.long
def test_peers_take_turns_and_get_the_same_losses(tiny: Path):
    _, (ours, theirs) = peers.compare(tiny, "tiny-untied", rounds=2, steps_per_turn=1)
    assert len(ours.wall) == len(theirs.wall) == 2
    assert len(ours.losses) == 2 * (peers.WARMUP_STEPS + 2 + 1)
    assert peers.loss_difference(ours, theirs) < 1e-5
    theirs.losses[-1] *= 1.001
    assert peers.loss_difference(ours, theirs) > 1e-4


@pytest.mark.long
def test_chunked_loss_takes_less_memory_than_plain():
    # 256 tokens x 16,384 entries: 16 MiB of logits, three times over; far above what else varies.
    plain, chunked = (loss.measure(loss.Case(size, 16, 16384, 256)) for size in (0, 32))
    assert plain.peak_bytes > 40 * 2**20
    assert plain.peak_bytes > 4 * chunked.peak_bytes
    assert loss.relative_error(chunked.loss, plain.loss) < 1e-5
    for ours, theirs in zip(chunked.gradients, plain.gradients, strict=True):
        assert loss.relative_error(ours, theirs) < 1e-5


@pytest.mark.long
def test_conversion_against_a_copy():
    table = convert.measure(rounds=1, layers=1)
    assert [row[0] for row in table.rows] == ["plain copy", "from-hf", "to-hf"]
    assert all(float(row[1]) > 0 for row in table.rows)


def test_startup_ends_at_a_line_or_at_the_end():
    code = "import sys, time; sys.stderr.write('ready\\n'); sys.stderr.flush(); time.sleep(0.5)"
    until_end = startup.Command("to the end", ["-c", code])
    until_line = startup.Command("to a line", ["-c", code], until="ready")
    for command in (until_end, until_line):
        command.measure()
    assert until_end.wall[0] > 0.5
    assert until_line.cpu[0] > 0

    with pytest.raises(RuntimeError, match="no such line: exit code 0\nready"):
        startup.Command("no such line", ["-c", code], until="step 1").measure()
    with pytest.raises(RuntimeError, match="fails: exit code 3"):
        startup.Command("fails", ["-c", "raise SystemExit(3)"]).measure()


def test_importing_torchtitan_imports_no_torch(tmp_path: Path):
    probe = next(c for c in startup.commands(tmp_path) if "no torch" in c.name)
    probe.measure()  # the exit code says it
    assert len(probe.wall) == 1


@pytest.mark.parametrize("path", sorted(trainer.CONFIGS.glob("*.toml")), ids=lambda p: p.stem)
def test_configs_load(path: Path):
    config = load_config(["--job.config_file", str(path)])
    assert getattr(torch, config.training.mixed_precision_param)


@pytest.mark.long
def test_gpu_benchmark_runs_on_cpu():
    (table,) = gpu_llama3.run(quick=True)
    assert [row[0] for row in table.rows] == list(gpu_llama3.MODES)
    assert all(float(row[1].split()[0]) > 0 for row in table.rows)


def test_products_run_on_cpu():
    (table,) = products.run(quick=True)
    assert len(table.rows) == 4
    assert {row[-1] for row in table.rows} == {"open: no GPU"}


@pytest.mark.long
def test_plans_are_made_and_run_on_cpu():
    (table,) = gpu_plan.run(quick=True)
    assert [row[:2] for row in table.rows] == [["tiny", mode] for mode in gpu_plan.MODES]
    assert all(row[3] == "not compared" and float(row[6].split()[0]) > 0 for row in table.rows)


def test_a_plan_is_compared_with_a_run():
    plan = SimpleNamespace(peak=3 * 2**30, step_seconds=0.9, tokens_per_step=100)
    run = gpu_llama3.Run({}, [{"peak_memory_bytes": 4 * 2**30, "tokens_per_second": 100.0}])
    assert gpu_plan._cells(plan, run, gpu=True) == [
        *("3.00 GiB", "4.00 GiB", "-25.0%", "0.900", "1.000", "-10.0%")
    ]


def metrics(tokens_per_second: float) -> str:
    line = {"tokens_per_second": tokens_per_second, "tflops_per_second_per_device": 2.0}
    line |= {"peak_memory_bytes": 2**30, "elapsed_seconds": 3.0}
    return 3 * f"{json.dumps(line)}\n"


def test_a_run_that_fails_is_a_row_and_each_is_told_at_once(monkeypatch, capsys):
    problems = iter([None, None, None, "OutOfMemoryError: no", None, None, "a", "OutOfMemoryError"])
    seen = []

    def train(options: list[str]) -> str | None:
        folder = Path(options[options.index("--job.dump_folder") + 1])
        folder.joinpath("metrics.jsonl").write_text(metrics(100.0 + len(seen)))
        seen.append(capsys.readouterr().err)
        return next(problems)

    monkeypatch.setattr(gpu_llama3, "train", train)
    config = gpu_llama3.CONFIGS / "llama3_1b.toml"
    rows = gpu_llama3.measure(config, list(gpu_llama3.MODES), 2, 989.0, []).rows
    assert [row[0] for row in rows] == [
        *("eager", "compiled", "compiled, float8 (1 failed: a)", "compiled, float8 rowwise")
    ]
    assert rows[0][1].startswith("102") and rows[2][1].startswith("102")
    assert rows[3][1:] == ["failed: OutOfMemoryError: no", *[""] * 5]
    assert seen[1] == "round 1, eager: 100 tokens/s, 2.00 TFLOP/s, 1.00 GiB, first step 3.00 s\n"
    assert seen[4] == "round 1, compiled, float8 rowwise: failed: OutOfMemoryError: no\n"


def test_a_trainer_that_fails_is_told_of_and_the_next_one_trains(tmp_path, capsys):
    base = [*gpu_llama3.TINY, "--metrics.progress", "plain", "--job.dump_folder", str(tmp_path)]
    problem = gpu_llama3.train([*base, "--training.seq_len", "0"])
    assert problem is not None and problem.startswith("ConfigError: --training.seq_len")
    assert gpu_llama3.train(base) is None


def test_a_failed_run_stands_beside_its_plan():
    plan = SimpleNamespace(peak=3 * 2**30, step_seconds=0.9, tokens_per_step=100)
    cells = gpu_plan._cells(plan, gpu_llama3.Failed("no memory"), gpu=True)
    assert cells == ["3.00 GiB", "failed: no memory", "", "0.900", "", ""]


@pytest.mark.parametrize(
    ("gpu", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA RTX 4090", "h100"),
    ],
)
def test_a_gpu_is_planned_by_its_own_data_sheet(gpu: str, device: str) -> None:
    assert gpu_plan.device_of(gpu) == device


@pytest.mark.parametrize("module", [gpu_llama3, gpu_plan])
def test_full_size_needs_a_gpu(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for start in (partial(module.main, []), module.run):
        with pytest.raises(SystemExit, match="needs a GPU"):
            start()


def test_models_do_the_same_work():
    found = models.compare_training("llama3", rounds=1, quick=True)
    assert found.difference < 1e-5 and found.ratio("cpu").low > 0
    assert "| llama3 |" in models.training_table([found]).markdown()


def test_checkpoints_are_saved_by_turns():
    (table,) = checkpoint.run(quick=True)
    names = [row[0] for row in table.rows]
    assert names[:2] == ["save at once", "stall of a save in the background"]
    assert all(float(row[1].split()[0]) > 0 for row in table.rows[:2])


@pytest.mark.long
def test_suite_writes_a_page(tmp_path: Path):
    assert run.main(["--suite", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (page,) = tmp_path.glob("*-cpu.md")
    text = page.read_text()
    titles = "Trainer against a bare", "Start-up", "Loss and", "Forward and", "Greedy", "Conversion"
    titles += "Memory-mapped tokens", "Resume", "Preparing", "JSON lines", "Waiting for data"
    titles += ("Checkpoints of",)
    for title in titles:
        assert f"## {title}" in text, title
