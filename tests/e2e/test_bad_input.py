"""A user's mistake: one message, exit code 2, no traceback, on one rank and on several."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama
from harness import Finished, command, shell, train

SAVING = ["--checkpoint.enable", "--checkpoint.interval=2"]


def assert_one_message(done: Finished, *words: str) -> None:
    assert set(done.exit_codes) == {2}, done.err
    assert "Traceback" not in done.err and "Traceback" not in done.out
    messages = re.findall(r"^error: .*", done.err, re.M)
    assert len(messages) == 1, done.err
    for word in words:
        assert word in messages[0], done.err


def refused(folder: Path, *options: str, ranks: int = 1) -> Finished:
    arguments = [*tiny_llama.OPTIONS, "--job.dump_folder", str(folder), *options]
    return command("train", *arguments, ranks=ranks)


MISTAKES = {
    "model": ("--model.name=lama3", "lama3", "Did you mean 'llama3'?"),
    "flavor": ("--model.flavor=tiney", "tiney", "Did you mean 'tiny'?"),
    "dataset": ("--training.dataset=sdtlib", "training.dataset", "Did you mean 'stdlib'?"),
    "optimizer": ("--optimizer.name=AdanW", "optimizer.name", "Did you mean 'AdamW'?"),
    "tokenizer": ("--model.tokenizer_path=/no/such", "model.tokenizer_path", "tokenizer.json"),
    "import": ("--job.custom_import=nothing_there", "job.custom_import", "nothing_there"),
    "config": ("--job.config_file=/no/such.toml", "/no/such.toml", "No such file"),
    "weights": ("--checkpoint.initial_load_path=/no/such", "initial_load_path", "no such folder"),
    "seq_len": ("--training.seq_len=31", "--parallelism.tensor_parallel_degree=2", "30 or 32"),
    "world": ("--parallelism.tensor_parallel_degree=3", "world size 2", "[1, 2]"),
    "batch": ("--training.global_batch_size=9", "global_batch_size = 9", "Nearest: 8 or 16"),
    "wandb": ("--metrics.enable_wandb", "metrics.enable_wandb", "pip install"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config(mistake: str, tmp_path: Path) -> None:
    option, *words = MISTAKES[mistake]
    options = [option, *(word for word in words if word.startswith("--"))]
    done = refused(tmp_path / "run", *options, ranks=2)
    assert_one_message(done, *(word for word in words if not word.startswith("--")))
    assert not (tmp_path / "run").exists()
