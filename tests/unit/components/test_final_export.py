"""A finished run leaves its Hugging Face folder, if need be when it is started again."""

import errno
import json
import logging
import os
import shutil

import own_parts_llama
import pytest
import torch
import torch.distributed as dist
from checkpoint_run import Run, world_of_one  # noqa: F401
from harness import checkpoints_in
from safetensors.torch import load_file
from tiny_models import tiny_spec

from torchtitan.commands.convert.to_hf import convert_to_hf
from torchtitan.components.checkpoint import final_export, huggingface_save, series
from torchtitan.components.checkpoint.huggingface import ExportAssets
from torchtitan.components.checkpoint.tokenizer_files import TOKENIZER_FILES
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.distributed.init import initialize_weights
from torchtitan.errors import CheckpointError, OutageError
from torchtitan.models.which_model import model_of_checkpoint


def run_of(tmp_path, **checkpoint):
    spec = tiny_spec("llama3")
    model = spec.model_cls(spec.model_args)
    initialize_weights(model, 0, torch.device("cpu"))
    options = {"steps": 4, "last_save_in_hf": True, "tokenizer": BytesTokenizer()} | checkpoint
    return Run(tmp_path, model=model, **options)


def fail(monkeypatch, number):
    def write_index(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_save, "write_index", write_index)


def weights_of(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EIO, OutageError), (errno.ENOSPC, CheckpointError)]
)
def test_an_export_that_failed_is_made_by_the_next_start(tmp_path, monkeypatch, number, kind):
    folder = tmp_path / "checkpoint" / "step-4-hf"
    trained, again = run_of(tmp_path), run_of(tmp_path)
    with monkeypatch.context() as patch:
        fail(patch, number)
        for attempt in (lambda: trained.train(4, last=True), again.manager.load):
            with pytest.raises(kind, match=rf"{folder} could not be saved: OSError") as error:
                attempt()
            assert type(error.value) is kind
    assert checkpoints_in(folder.parent) == ["step-2", "step-4"]

    assert run_of(tmp_path).manager.load() == 4
    weights = weights_of(folder)
    whole = tmp_path / "whole"
    assets = ExportAssets("bytes", max_seq_len=128)
    huggingface_save.save_huggingface(
        [trained.model], whole, torch.float32, assets, dist.group.WORLD
    )
    expected = weights_of(whole)
    assert weights.keys() == expected.keys() and len(weights) > 3
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_without_a_last_checkpoint_the_export_alone_is_saved(tmp_path):
    run_of(tmp_path, last_save_model_only=True).train(4, last=True)
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-4-hf"]


def test_an_export_that_is_asked_for_later_is_made_once(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "torchtitan")
    run_of(tmp_path, last_save_in_hf=False).train(4, last=True)
    assert run_of(tmp_path, last_save_in_hf=False).manager.load() == 4
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-4"]
    assert run_of(tmp_path, last_save_model_only=True).manager.load() == 4
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-4", "step-4-hf"]
    assert "step-4-hf is missing or older: saving it now" in caplog.text

    monkeypatch.setattr(final_export, "save_huggingface", None)
    assert run_of(tmp_path).manager.load() == 4


def test_an_export_of_a_training_before_is_made_anew(tmp_path, caplog):
    """The run went back and came here again, and could not export then."""
    caplog.set_level(logging.INFO, "torchtitan")
    run_of(tmp_path).train(4, last=True)
    folder = tmp_path / "checkpoint" / "step-4-hf"
    assert run_of(tmp_path).manager.load() == 4
    assert "saving it now" not in caplog.text
    saved = (folder.with_name("step-4") / "manifest.json").stat().st_mtime
    os.utime(folder, (saved - 60, saved - 60))
    assert run_of(tmp_path).manager.load() == 4
    assert "step-4-hf is missing or older: saving it now" in caplog.text
    assert folder.stat().st_mtime >= saved


def test_the_clock_of_a_host_that_is_ahead_makes_no_export_again(tmp_path, monkeypatch):
    """The time in a manifest is a host's, and that of a folder the file server's."""
    monkeypatch.setattr(series, "time_after", lambda _: "2999-01-01T00:00:00.000000+00:00")
    run_of(tmp_path).train(4, last=True)
    monkeypatch.setattr(final_export, "save_huggingface", None)
    assert run_of(tmp_path).manager.load() == 4


def test_a_run_that_is_not_over_makes_no_export(tmp_path):
    run_of(tmp_path, steps=6).train(3, last=True)
    assert run_of(tmp_path, steps=6).manager.load() == 3
    shutil.rmtree(tmp_path / "checkpoint")
    assert run_of(tmp_path).manager.load() == 0
    assert checkpoints_in(tmp_path / "checkpoint") == []


def test_no_other_tokenizer_is_exported_than_that_of_the_run(tmp_path, caplog):
    """Here one of an author's, which has no files that Hugging Face reads."""
    run_of(tmp_path, tokenizer=own_parts_llama.Letters()).train(4, last=True)
    checkpoint, of_run = (tmp_path / "checkpoint" / name for name in ("step-4", "step-4-hf"))
    converted = tmp_path / "converted"
    convert_to_hf(checkpoint, converted, model_of_checkpoint(checkpoint), None)
    for folder in (of_run, converted):
        assert {path.name for path in folder.iterdir()}.isdisjoint(TOKENIZER_FILES)
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0
    assert f"{of_run} is saved without a tokenizer: the run's is a custom one" in caplog.text
