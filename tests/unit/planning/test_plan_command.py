"""`torchtitan plan`: tables, files, exit codes, and mistakes."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from harness import command

from torchtitan.config import load_config
from torchtitan.config.optimizer import ParamRule
from torchtitan.errors import ConfigError
from torchtitan.planning.command import default_world_size, main
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.page import ACTIONS
from torchtitan.planning.report import CATEGORIES
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools import figures

JOB = """\
[model]
flavor = "debugmodel"
tokenizer_path = "/only/on/the/cluster"

[training]
seq_len = 256
local_batch_size = 4

[data]
sources = [
    {dataset = "c4"}, {dataset = "jsonl", dataset_path = "/only/on/the/cluster/*.jsonl"}
]

[checkpoint]
enable = true
initial_load_path = "/only/on/the/cluster"

[parallelism]
pipeline_parallel_degree = 2
"""


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text(JOB)
    return str(path)


def test_a_plan_on_the_terminal_as_json_and_as_a_page(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / f"plan.{suffix}") for suffix in ("json", "html", "png")]
    options = ["--png", files[2], "--world-size", "16", "--tokens", "1e9", "--price", "2"]
    options += ["--json", files[0], "--html", files[1]]
    assert main([job, *options, "--", "--model.args.n_layers=6"]) == 0
    out = capsys.readouterr().out
    for words in (
        "llama3 debugmodel (n_layers = 6): 4.86 M",
        "on 16 h100",
        "pp 2, dp_shard 8",
        "pipeline rank",
        "all_gather",
        "network",
    ):
        assert words in out
    assert "it fits" in out and "pipeline bubble:" in out and "at that price" in out
    assert "sends in a step (pipeline rank" in out and "tokens; pipeline rank" in out

    plan = json.loads(Path(files[0]).read_text())
    assert plan["fits"] and len(plan["ranks"]) == 2
    assert plan["model"]["args"] == {"n_layers": 6}
    for rank in plan["ranks"]:
        assert sum(rank["memory"].values()) == pytest.approx(rank["peak"])
    assert plan["peak_bytes"] == max(rank["peak"] for rank in plan["ranks"])
    assert plan["tokens_per_step"] == 8 * 4 * 256
    budget = plan["budget"]
    assert budget["steps"] == -(-(10**9) // plan["tokens_per_step"])
    assert budget["device_hours"] == pytest.approx(
        budget["steps"] * plan["step_seconds"] * 16 / 3600
    )
    assert budget["cost"] == pytest.approx(2 * budget["device_hours"])
    check_page(Path(files[1]).read_text(), plan)
    check_picture(Path(files[2]).read_bytes())


def test_a_budget_is_of_all_replica_groups(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four groups of 2 devices take a quarter of the time of one, and as many device hours."""
    groups = ["--fault_tolerance.enable", "--fault_tolerance.group_size=4"]
    plans = []
    for batch, options in ((8, []), (32, groups)):
        file = str(tmp_path / "plan.json")
        overrides = ["--", f"--training.global_batch_size={batch}", *options]
        main([job, "--world-size", "2", "--tokens", "1e9", "--json", file, *overrides])
        plans.append(json.loads(Path(file).read_text()))
    one, four = plans
    assert one["step_seconds"] == four["step_seconds"]
    assert (one["replica_groups"], four["replica_groups"]) == (1, 4)
    assert four["budget"]["steps"] == -(-(10**9) // (32 * 256))
    assert four["budget"]["seconds"] == pytest.approx(one["budget"]["seconds"] / 4, rel=0.001)
    hours = [plan["budget"]["device_hours"] for plan in plans]
    assert hours[0] == pytest.approx(hours[1], rel=0.001)
    alone, together = capsys.readouterr().out.split("debugmodel:")[1:]
    assert "2 h100 (" in alone and "of a group" not in alone
    assert "2 h100 of each of 4 replica groups (" in together
    assert f"for {8 * 256:,} tokens of a group" in together
    of_all = 4 * four["tokens_per_second_per_device"] * 2
    assert f"{of_all:,.0f} in all" in together


def check_page(text: str, plan: dict) -> None:
    """Well-formed, nothing from elsewhere, bars as long as what they show."""
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    root = ET.fromstring(text.removeprefix("<!DOCTYPE html>"))
    memory, timeline = root.iter("{http://www.w3.org/2000/svg}svg")
    widths: dict[float, float] = {}
    for bar in memory.iter("{http://www.w3.org/2000/svg}rect"):
        row = float(bar.get("y"))
        widths[row] = widths.get(row, 0.0) + float(bar.get("width"))
    peaks = [rank["peak"] for rank in plan["ranks"]]
    first, second = widths.values()
    assert first / second == pytest.approx(peaks[0] / peaks[1], rel=0.01)
    titles = [
        bar.find("{http://www.w3.org/2000/svg}title").text
        for bar in timeline.iter("{http://www.w3.org/2000/svg}rect")
    ]
    for stage in (0, 1):
        for what in ("forward", "backward"):
            begin = f"stage {stage}, {what}, micro-batch "
            assert sum(title.startswith(begin) for title in titles) == 4
        assert sum(f"stage {stage}, reduction" in title for title in titles) == 1


def check_picture(content: bytes) -> None:
    """A bar in each of the colours of what this plan has."""
    pixels = (255 * plt.imread(io.BytesIO(content))).round().astype(int)[..., :3]
    seen = {"#" + bytes(list(color)).hex() for color in np.unique(pixels.reshape(-1, 3), axis=0)}
    memory = {CATEGORIES[name][1] for name in ("parameters", "optimizer_state", "activations")}
    timeline = {color for what, color in ACTIONS.values() if what in ("forward", "backward")}
    assert memory | timeline <= seen


def test_a_picture_needs_matplotlib(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"--png plan.png: matplotlib is not .*torchtitan\[plots\]"
    ):
        main([job, "--png", "plan.png"])


def test_what_does_not_fit_says_by_how_much(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model.flavor=8B", "--parallelism.pipeline_parallel_degree=1"]
    assert main([job, "--world-size", "1", "--", *options]) == 1
    out = capsys.readouterr().out
    assert "does NOT fit" in out and "too much" in out


def test_a_custom_model_needs_no_more_code(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text('[job]\ncustom_import = "tiny_llama"\n[model]\nname = "tiny_llama"\n')
    options = ["--model.flavor=tiny", "--training.seq_len=32"]
    assert main([str(config), "--world-size", "2", "--", *options]) == 0
    assert "tiny_llama tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "world_size"),
    [
        ([], 8),
        (["--parallelism.tensor_parallel_degree=16"], 16),
        (["--parallelism.tensor_parallel_degree=3"], 24),
        (["--parallelism.data_parallel_shard_degree=4"], 4),
    ],
)
def test_the_default_world(options: list[str], world_size: int) -> None:
    assert default_world_size(load_config(options), 8) == world_size


def test_a_batch_that_does_not_fit_the_default_world(job: str) -> None:
    options = ["--", "--training.global_batch_size=2", "--training.local_batch_size=2"]
    options += ["--parallelism.pipeline_parallel_degree=1"]
    with pytest.raises(ConfigError, match=r"data ranks.*\(on 8 devices, the default; set it with"):
        main([job, *options])
    with pytest.raises(ConfigError) as caught:
        main([job, "--world-size", "8", *options])
    assert "default" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--training.on_nonfinite=rollback", "--training.on_spike=rollback"],
        ["--fault_tolerance.enable", "--fault_tolerance.group_size=2"],
        ["--parallelism.pipeline_parallel_degree=1", "--compile.enable"]
        + ["--compile.mode=reduce-overhead"],
    ],
)
def test_what_only_the_cluster_has_is_not_looked_for(options: list[str], job: str) -> None:
    world_size = "1" if "--compile.enable" in options else "4"
    assert main([job, "--world-size", world_size, "--", *options]) == 0


def test_a_model_without_a_pipeline_is_refused(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(get_train_spec("llama3", "debugmodel"), pipeline_fn=None)
    monkeypatch.setattr("torchtitan.preflight.model_fit.train_spec_of", lambda *_: spec)
    with pytest.raises(ConfigError, match=r"pipeline_parallel_degree.*llama3 has no pipeline_fn"):
        main([job, "--world-size", "4"])


def test_a_replica_group_is_planned_with_its_share(job: str) -> None:
    given = f"--job.config_file={job}", "--training.global_batch_size=32"
    both = load_config([*given, "--fault_tolerance.enable", "--fault_tolerance.group_size=2"])
    plan = plan_run(both, 4, DEVICES["h100"])
    assert plan.tokens_per_step == 16 * 256 and plan.accumulation_steps == 2


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.long
def test_a_rule_may_be_for_a_layer_that_is_not_traced(
    pp: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 32 layers a few are traced, and a stage has its own alone."""
    config = tmp_path / "rules.toml"
    rule = "[[optimizer.rules]]\npattern = 'layers\\.31\\.'\nlr_scale = 0.5\n"
    config.write_text(f'[model]\nflavor = "8B"\n{rule}')
    options = [f"--parallelism.pipeline_parallel_degree={pp}", "--training.seq_len=256"]
    assert main([str(config), "--world-size", "64", "--", *options]) == 0
    assert "it fits" in capsys.readouterr().out


@pytest.mark.long
def test_layers_that_are_frozen_have_no_gradients_and_no_optimizer_state() -> None:
    """Also those that are not traced: of 32 layers the first 8, the last, or none."""
    given = ["--model.flavor=8B", "--training.seq_len=256", "--activation_checkpoint.mode=none"]
    states = []
    for patterns in ([], [r"layers\.[0-7]\."], [r"layers\.31\."]):
        config = load_config(given)
        config.optimizer.rules = [ParamRule(pattern, lr_scale=0.0) for pattern in patterns]
        states.append(plan_run(config, 8, DEVICES["h100"]).ranks[0].memory.optimizer_state)
    none, eight, last = states
    layer = 2 * 4 * 218_112_000 / 8  # two moments in float32 of an eighth of its parameters
    assert none - eight == pytest.approx(8 * layer, rel=0.01)
    assert none - last == pytest.approx(layer, rel=0.01)


def test_a_rule_for_no_parameter_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "rules.toml"
    config.write_text('[model]\nflavor = "8B"\n[[optimizer.rules]]\npattern = "layers.32"\n')
    with pytest.raises(ConfigError, match=r"rules\.toml:3: .*'layers\.32' matches no parameter"):
        main([str(config), "--world-size", "64"])


MISTAKES = {
    "file": (["/no/such.toml"], ["/no/such.toml"]),
    "device": (["JOB", "--device", "h10"], ["--device h10", "Did you mean 'h100'?"]),
    "world": (["JOB", "--world-size", "7"], ["world size 7", "must be one of"]),
    "ranks": (["JOB", "--world-size=-1"], ["--world-size (--gpus) -1", "above 0"]),
    "price": (["JOB", "--price", "2"], ["--price needs --tokens"]),
    "batch": (
        ["JOB", "--world-size", "4", "--", "--training.local_batch_size=1"],
        ["local_batch_size = 1", "1 micro-batches", "at least 2", "local_batch_size = 2, or"],
    ),
    "heads": (
        ["JOB", "--world-size", "6", "--", "--parallelism.tensor_parallel_degree=3"],
        ["tensor_parallel_degree"],
    ),
    "sequence": (
        ["JOB", "--world-size", "8", "--seq-len", "130"]
        + ["--", "--parallelism.context_parallel_degree=4"],
        ["seq_len = 130", "128 or 136"],
    ),
    "budget": (
        ["JOB", "--", "--activation_checkpoint.mode=memory_budget", "--compile.enable"],
        ["activation_checkpoint.mode", "cannot be planned"],
    ),
    "offload": (
        ["JOB", "--world-size", "4", "--", "--training.enable_cpu_offload"],
        ["training.enable_cpu_offload", "cannot be planned"],
    ),
    "json": (["JOB", "--json", "/no/such/folder/plan.json"], ["--json /no/such/folder"]),
    "png": (["JOB", "--png", "/no/such/plan.png"], ["--png /no/such/plan.png", "no such folder"]),
    "out": (["JOB", "--out", "plan.toml"], ["--out", "--search"]),
    "seconds": (["JOB", "--seconds", "9"], ["--seconds", "--search"]),
    "search out": (["JOB", "--search", "--out", "/no/such/plan.toml"], ["--out", "such folder"]),
    "search json": (["JOB", "--search", "--json", "a.json"], ["--json", "plan planned.toml"]),
    "search html": (["JOB", "--search", "--html", "a.html"], ["--html", "plan planned.toml"]),
    "search png": (["JOB", "--search", "--png", "a.png"], ["--png", "plan planned.toml"]),
    "search budget": (["JOB", "--search", "--tokens", "9"], ["--tokens", "plan planned.toml"]),
    "search": (["JOB", "--search"], ["--gpus"]),
    "search batch": (["JOB", "--search", "--gpus", "4"], ["--global-batch-size"]),
    "search groups": (
        ["JOB", "--search", "--gpus", "4", "--global-batch-size", "8"]
        + ["--", "--fault_tolerance.enable"],
        ["fault_tolerance.enable", "a single replica group"],
    ),
    "search none": (
        ["JOB", "--search", "--gpus", "7", "--global-batch-size", "3", "--", *()]
        + ["--model.flavor=debugmodel"],
        ["global_batch_size = 3", "no layout of 7 devices"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message(name: str, job: str) -> None:
    arguments, words = MISTAKES[name]
    with pytest.raises(ConfigError) as refused:
        main([job if word == "JOB" else word for word in arguments])
    for word in words:
        assert word in str(refused.value)


def test_the_command_ends_with_the_code_of_a_mistake(job: str) -> None:
    done = command("plan", job, "--price", "2")
    assert done.exit_code == 2, done.out + done.err
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
