"""A user's mistake: one message, exit code 2, no traceback, on one rank and on several."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_llama
from harness import Finished, checkpoints_in, command, shell, train

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
    "hf weights": ("--checkpoint.initial_load_in_hf", "initial_load_in_hf", "initial_load_path"),
    "hf export": ("--checkpoint.last_save_in_hf", "last_save_in_hf", "checkpoint.enable is false"),
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


OWN = "--job.custom_import=own_parts_llama"


def test_a_loader_without_rows_is_refused_before_the_first_step(tmp_path: Path) -> None:
    done = refused(tmp_path / "run", OWN, "--model.name=own_loader_steps", *SAVING, ranks=2)
    assert_one_message(done, "build_dataloader_fn of own_loader_steps", "has 'step'", "int64")


def test_what_a_loader_gives_in_vain_is_refused(tmp_path: Path) -> None:
    done = refused(tmp_path / "run", OWN, "--model.name=own_loader_noise", ranks=2)
    assert_one_message(done, "build_dataloader_fn of own_loader_noise", "has 'noise'")


def test_ranks_whose_batches_have_different_names(tmp_path: Path) -> None:
    done = refused(tmp_path / "run", OWN, "--model.name=own_loader_uneven", ranks=2)
    assert done.err.count("own_loader_uneven: the ranks' batches of a step have different") == 2
    assert done.exit_codes == [2, 2] and "Traceback" not in done.err, done.err


def test_a_loader_that_ends_before_the_run(tmp_path: Path) -> None:
    options = ("--model.name=own_loader_ends", "--training.steps=9")
    done = refused(tmp_path / "run", OWN, *options)
    assert "build_dataloader_fn of own_loader_ends: the loader ended in step " in done.err
    assert done.exit_codes == [2] and "Traceback" not in done.err, done.err


def test_a_loss_may_be_a_plain_function(tmp_path: Path) -> None:
    options = ["--model.name=own_loss", "--training.steps=1", "--loss.z_loss_weight=0.001"]
    done = refused(tmp_path / "run", OWN, *options)
    assert set(done.exit_codes) == {0}, done.err
    unread = "because the build_loss_fn of own_loss does not read it"
    assert f"WARNING loss.z_loss_weight = 0.001: may have no effect, {unread}" in done.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_wraps_ours_and_does_not_hand_attach_on(ranks: int, tmp_path: Path) -> None:
    """Under tensor parallelism the output layer could not even be called."""
    options = ["--model.name=own_loss_forgets", "--loss.name=chunked_cross_entropy"]
    options.append(f"--parallelism.tensor_parallel_degree={ranks}")
    done = refused(tmp_path / "run", OWN, *options, ranks=ranks)
    assert_one_message(done, "loss.name = 'chunked_cross_entropy'", "loss.attach = main.attach")


def test_a_rule_for_no_parameter(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    rules = ["layers.0", "layer.1"]
    config.write_text("".join(f'[[optimizer.rules]]\npattern = "{rule}"\n' for rule in rules))
    done = refused(tmp_path / "run", f"--job.config_file={config}", ranks=2)
    assert_one_message(done, f"{config}:3:", "pattern 'layer.1' matches no parameter")


def test_corrupt_toml(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("[training]\nsteps = = 3\n")
    done = refused(tmp_path / "run", f"--job.config_file={config}", ranks=2)
    assert_one_message(done, f"{config}:2: not valid TOML")


def test_a_validator_with_tokens_that_the_model_does_not_know(tmp_path: Path) -> None:
    options = ("--model.name=own_validator", "--validation.enable", "--validation.freq=1")
    done = refused(tmp_path / "run", OWN, *options)
    assert "build_validator_fn of own_validator: a batch of the validator has the tok" in done.err
    assert done.exit_codes == [2] and "Traceback" not in done.err, done.err


@pytest.mark.parametrize("section", ["training", "validation"])
def test_an_empty_dataset(section: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    options = [f"--{section}.dataset=text", f"--{section}.dataset_path={tmp_path}/empty.txt"]
    done = refused(tmp_path / "run", "--validation.enable", *options, ranks=2)
    assert_one_message(done, f"{section}.dataset", "empty")


def test_malformed_data(tmp_path: Path) -> None:
    """Found by the thread that reads ahead, while training."""
    (tmp_path / "bad.txt").write_bytes(b"text\n\xff\n")
    options = ["--training.dataset=text", f"--training.dataset_path={tmp_path}/bad.txt"]
    assert_one_message(refused(tmp_path / "run", *options, ranks=2), "bad.txt:2", "UTF-8")


@pytest.mark.parametrize("folder", ["/dev/null/run", "/proc/run"])
def test_a_folder_that_cannot_be_written(folder: str) -> None:
    assert_one_message(refused(Path(folder), ranks=2), "job.dump_folder")


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that saved step 2 and step 4."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, *tiny_llama.OPTIONS, *SAVING, "--training.steps=4", ranks=2)
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp", "manifest.json"])
def test_a_damaged_checkpoint(name: str, ranks: int, two_checkpoints: Path, tmp_path: Path) -> None:
    """The older one is resumed from, but not in place of one that was asked for by its step."""
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    file = folder / "checkpoint" / "step-4" / name
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    done = refused(folder, *SAVING, "--checkpoint.load_step=4", ranks=ranks)
    assert_one_message(done, "load_step = 4", str(file), "damaged", "Steps to resume from: 2")
    content = bytearray(content)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = refused(folder, *SAVING, "--checkpoint.load_step=4", ranks=ranks)
    assert_one_message(done, "load_step = 4", str(file), "damaged")

    options = [*tiny_llama.OPTIONS, *SAVING, f"--job.dump_folder={folder}"]
    done = command("train", *options, ranks=ranks)
    assert done.exit_code == 0, done.err
    (warning,) = re.findall(r"WARNING (.*is damaged: .*skipped)", done.err)
    assert str(file) in warning
    assert f"resumed from {folder}/checkpoint/step-2" in done.err
    assert "step-4 is damaged and was renamed to step-4.damaged" in done.err
    assert (folder / "checkpoint" / "step-4.damaged" / name).read_bytes() == content


def test_a_checkpoint_of_another_model_or_step(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_checkpoints, folder)
    done = refused(folder, *SAVING, "--checkpoint.load_step=3", ranks=2)
    assert_one_message(done, "checkpoint.load_step = 3", "2, 4")
    debug = ["--model.name=llama3", "--model.flavor=debugmodel"]
    done = refused(folder, *SAVING, *debug, ranks=2)
    assert_one_message(done, f"{folder}/checkpoint/step-4 is of another model")
    assert "\n  model.name = tiny_llama (now llama3)\n" in done.err
    assert "\n  dim = 64 (now 256)\n" in done.err
    other = ["--training.global_batch_size=12", "--training.local_batch_size=2"]
    done = refused(folder, *SAVING, *other, ranks=2)
    assert_one_message(done, "training.global_batch_size is 12 now")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hugging_face_folder_that_is_damaged_or_of_another_model(
    ranks: int, tmp_path: Path
) -> None:
    export = ["--training.steps=1", "--checkpoint.enable", "--checkpoint.last_save_in_hf"]
    train(tmp_path / "first", *tiny_llama.OPTIONS, *export)
    source = tmp_path / "first" / "checkpoint" / "step-1-hf"
    start = ["--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={source}"]

    other = ["--model.name=llama3", "--model.flavor=debugmodel"]
    done = refused(tmp_path / "run", *start, *other, ranks=ranks)
    assert_one_message(done, "config.json is of another model", "dim = 64 (now 256)", str(source))
    done = refused(tmp_path / "run", *start, "--model.name=gemma3", *other[1:], ranks=ranks)
    assert_one_message(done, str(source), "model_type is 'llama', not 'gemma3_text'")

    (shard,) = source.glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-20])
    assert_one_message(refused(tmp_path / "run", *start, ranks=ranks), str(shard), "damaged")
    shard.write_bytes(content.replace(b"model.norm.weight", b"model.form.weight"))
    done = refused(tmp_path / "run", *start, ranks=ranks)
    assert_one_message(done, str(source), "lacks model.norm.weight")
    shard.unlink()
    assert_one_message(refused(tmp_path / "run", *start, ranks=ranks), str(shard), "is missing")
    (source / "model.safetensors.index.json").unlink()
    done = refused(tmp_path / "run", *start, ranks=ranks)
    assert_one_message(done, "initial_load_path", "holds no Hugging Face weights")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite(ranks: int, tmp_path: Path) -> None:
    options = ["--optimizer.lr=1e30", "--lr_scheduler.warmup_steps=3", "--training.max_norm=inf"]
    folder = tmp_path / "run"
    saving = ["--checkpoint.enable", "--checkpoint.interval=1"]
    done = refused(folder, *options, *saving, "--metrics.log_freq=4", ranks=ranks)
    found = re.search(r"step (\d+): the loss is .* gradient norm is (nan|inf)", done.err)
    assert found, done.err
    last_good = folder / "checkpoint" / f"step-{int(found.group(1)) - 1}"
    assert_one_message(done, f"The last good checkpoint is {last_good}")
    assert last_good.is_dir()


def finishes_from_step_4(folder: Path, whole: list[dict]) -> None:
    lines = train(folder, *tiny_llama.OPTIONS, *SAVING)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """The limit that a shell sets; a real command."""
    folder = tmp_path / "run"
    whole = train(folder, *tiny_llama.OPTIONS, *SAVING)
    shutil.rmtree(folder / "checkpoint" / "step-6")
    options = [*tiny_llama.OPTIONS, *SAVING, f"--job.dump_folder={folder}"]
    done = shell(
        ["python", "-c", LIMITED, "train", *options],
        cwd=Path(tiny_llama.__file__).parent,
        check=False,
    )
    assert_one_message(done, "step 6 could not be saved", "File too large", "step-4")
    assert not list((folder / "checkpoint").glob("*.partial"))
    finishes_from_step_4(folder, whole)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
from torchtitan.cli import main
sys.exit(main())
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk(mode: str, small_disk: Path, tmp_path: Path) -> None:
    """There is room for two checkpoints. The third fails, while the old ones stay."""
    whole = train(tmp_path / "whole", *tiny_llama.OPTIONS)
    folder = small_disk / "run"
    done = refused(folder, *SAVING, f"--checkpoint.async_mode={mode}", ranks=1)
    assert_one_message(done, "step 6 could not be saved", "No space left", "step-4")
    assert checkpoints_in(folder / "checkpoint") == ["step-2", "step-4"]
    shutil.rmtree(folder / "checkpoint" / "step-2")
    finishes_from_step_4(folder, whole)
