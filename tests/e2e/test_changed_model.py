"""A run with changed hyperparameters of its flavor, and what reads its checkpoint."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from harness import command, train
from tiny_llama import OPTIONS

from torchtitan.commands.convert.command import main as convert
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.generation.load import ModelOptions, load_model, open_source

CHANGED = ("--model.args.n_layers=2", "--model.args.rope_theta=10000")
SAVING = ("--checkpoint.enable", "--checkpoint.last_save_in_hf")


def test_a_run_trains_resumes_generates_and_is_exported_with_changed_args(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, *OPTIONS, *CHANGED, "--training.steps=1", *SAVING)
    checkpoint = run / "checkpoint" / "step-1"
    args = Manifest.read(checkpoint).model["args"]
    assert (args["n_layers"], args["rope_theta"]) == (2, 10000.0)
    saved = tomllib.loads((run / "config.resolved.toml").read_text())["model"]["args"]
    assert saved == {"n_layers": 2, "rope_theta": 10000}
    exported = json.loads((run / "checkpoint" / "step-1-hf" / "config.json").read_text())
    assert (exported["num_hidden_layers"], exported["rope_theta"]) == (2, 10000.0)

    other = ("--model.args.n_layers=3", *OPTIONS, "--training.steps=2", *SAVING)
    done = command("train", *other, f"--job.dump_folder={run}")
    assert done.exit_code == 2 and "\n  n_layers = 2 (now 3)\n" in done.err
    lines = train(run, str(run / "config.resolved.toml"), "--training.steps=2")
    assert [line["step"] for line in lines] == [1, 2]

    source = open_source(ModelOptions(str(run), dtype="float32"))
    assert len(load_model(source).model.layers) == 2
    assert source.job_config.model.args == {}  # its spec has the checkpoint's args
    assert convert(["to-hf", str(checkpoint), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == exported
