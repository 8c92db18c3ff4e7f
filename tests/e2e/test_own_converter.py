"""Adapters beside frozen weights, by a converter of an author's: from a base model to an export."""

from __future__ import annotations

import re
from pathlib import Path

import own_parts_llama
import pytest
import tiny_llama
import torch
from equality import newest_weights
from harness import command, read_lines, train
from safetensors.torch import load_file

from torchtitan.commands.convert.command import main as convert
from torchtitan.config import load_config
from torchtitan.generation.load import ModelOptions, load_model, open_source
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run

ADAPTERS = [
    *tiny_llama.OPTIONS,
    *("--job.custom_import=own_parts_llama", "--model.name=own_adapters"),
    *("--model.converters=adapters", "--checkpoint.enable", "--checkpoint.last_save_in_hf"),
]
APART = r"--checkpoint.initial_load_exclude=wq\.(up|down)$"
SAVE = ("--training.steps=2", "--checkpoint.enable")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    hugging_face = "--checkpoint.last_save_in_hf"
    train(folder, *tiny_llama.OPTIONS, *SAVE, hugging_face)
    return folder


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    start = f"--checkpoint.initial_load_path={base}/checkpoint/step-2"
    train(folder, *ADAPTERS, start, APART)
    return folder


def test_adapters_learn_beside_the_weights_of_the_base(base: Path, adapted: Path) -> None:
    before, after = newest_weights(base), newest_weights(adapted)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    others = after.keys() - before.keys()
    assert len(others) == 8 and all(after[name].abs().max() > 0 for name in others)


def test_adapters_and_frozen_weights_are_counted(base: Path, adapted: Path) -> None:
    """A layer has 64 x (64 + 2 x 32 + 64 + 3 x 192) weights; its adapter 2 x (64 + 64)."""
    expected = own_parts_llama.MODEL_CONFIGS["tiny"].get_nparams_and_flops(32)
    runs = (read_lines(folder / "metrics.jsonl")[-1] for folder in (base, adapted))
    before, after = (
        1e12 * run["tflops_per_second_per_device"] / run["tokens_per_second_per_device"]
        for run in runs
    )
    assert before == pytest.approx(expected[1])
    added = 4 * 2 * (64 + 64)
    frozen = 4 * 64 * (64 + 2 * 32 + 64 + 3 * 192) + 64 * 264  # of which the first wq gets nothing
    assert after == pytest.approx(before + 6 * added - 2 * frozen - 2 * 64 * 64)
    plan = plan_run(load_config(ADAPTERS), 1, DEVICES["h100"])
    assert plan.nparams == expected[0] + added
    assert plan.flops_per_token == pytest.approx(after)


@pytest.mark.long
def test_a_hugging_face_folder_is_as_good_a_base(base: Path, adapted: Path, tmp_path: Path) -> None:
    start = f"--checkpoint.initial_load_path={base}/checkpoint/step-2-hf"
    train(tmp_path, *ADAPTERS, start, APART, "--parallelism.tensor_parallel_degree=2", ranks=2)
    for name, tensor in newest_weights(adapted).items():
        torch.testing.assert_close(newest_weights(tmp_path)[name], tensor, rtol=1e-4, atol=1e-4)


def test_what_the_base_lacks_is_named_with_the_key_that_lets_it(base: Path, tmp_path: Path) -> None:
    start = f"--checkpoint.initial_load_path={base}/checkpoint/step-2"
    done = command("train", *ADAPTERS, start, f"--job.dump_folder={tmp_path}")
    assert done.exit_code == 2
    assert "step-2 lacks model.layers.0.attention.wq.down, " in done.err
    assert re.search(r"parameters, of which [\d,]+ are trained, on 1 rank ", done.err)
    assert "match checkpoint.initial_load_exclude are not read" in done.err
    wrong = "--checkpoint.initial_load_exclude=lora"
    done = command("train", *ADAPTERS, start, wrong, f"--job.dump_folder={tmp_path}")
    assert done.exit_code == 2
    assert "checkpoint.initial_load_exclude = \"lora\": pattern 'lora' matches no" in done.err


def test_generating_and_exporting_know_the_adapters(adapted: Path, tmp_path: Path) -> None:
    weights, name = newest_weights(adapted), "layers.0.attention.wq.up"
    model = load_model(open_source(ModelOptions(str(adapted)))).model
    assert torch.equal(model.get_parameter(name), weights[f"model.{name}"])
    checkpoint, out = adapted / "checkpoint" / "step-6", tmp_path / "out"
    convert(["to-hf", str(checkpoint), str(out)])
    of_run = adapted / "checkpoint" / "step-6-hf"
    exported, expected = (
        {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
        for folder in (out, of_run)
    )
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    before = weights["model.layers.0.attention.wq.weight"]
    merged = exported["model.layers.0.self_attn.q_proj.weight"]
    assert (merged - before).abs().max() > 0.01


def test_a_resumed_run_without_its_converter_is_told_what_changed(
    base: Path, tmp_path: Path
) -> None:
    start = f"--checkpoint.initial_load_path={base}/checkpoint/step-2"
    train(tmp_path, *ADAPTERS, start, APART, "--training.steps=1")
    options = [option for option in ADAPTERS if not option.startswith("--model.converters")]
    done = command("train", *options, "--training.steps=2", f"--job.dump_folder={tmp_path}")
    assert done.exit_code == 2
    assert '\n  model.converters = [] (was ["adapters"])' in done.err
