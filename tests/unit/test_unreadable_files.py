"""Files that cannot be looked at now, or never: one message, and exit code 1 or 2."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from torchtitan import cli
from torchtitan.components.checkpoint import retry
from torchtitan.components.checkpoint.folder import restore_replaced
from torchtitan.components.checkpoint.huggingface import check_same_model
from torchtitan.components.checkpoint.load import is_huggingface
from torchtitan.components.checkpoint.manifest import is_hf_weights
from torchtitan.components.checkpoint.model_identity import describe_tokenizer
from torchtitan.components.checkpoint.owner import claim_dump_folder
from torchtitan.components.checkpoint.reader import read_safetensors_metadata
from torchtitan.components.checkpoint.tokenizer_files import chat_template_of, write_bytes_tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer, build_tokenizer
from torchtitan.config import JobConfig
from torchtitan.data.chat import load_template
from torchtitan.data.files import find_files
from torchtitan.errors import OutageError, TitanError
from torchtitan.preflight.validate import validate
from torchtitan.protocols.train_spec import get_train_spec

Fail = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bytes_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Call it with a function of `os` that fails, the name of the file, the error, how often."""
    monkeypatch.setattr(retry, "RETRY_AFTER", (0, 0, 0))

    def fail(function: str, name: str, number: int = errno.EIO, times: int = 1000) -> None:
        real, left = getattr(os, function), [times]

        def failing(path, *args, **options):
            if os.path.basename(os.fspath(path)) == name and left[0]:
                left[0] -= 1
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *args, **options)

        monkeypatch.setattr(os, function, failing)

    return fail


def config_of(folder: Path) -> JobConfig:
    config = JobConfig()
    config.model.tokenizer_path = str(folder)
    config.job.dump_folder = str(folder)
    return config


LOOKS = {
    "tokenizer.json": lambda folder: HuggingFaceTokenizer(folder),
    "tokenizer.json of a config": lambda folder: build_tokenizer(config_of(folder)),
    "tokenizer_config.json": lambda folder: HuggingFaceTokenizer(folder),
    "chat_template.jinja": lambda folder: load_template(None, str(folder)),
    "chat_template.jinja of an export": lambda folder: chat_template_of(None, str(folder)),
    "config.json": lambda folder: check_same_model(
        folder, get_train_spec("llama3", "debugmodel").model_args
    ),
    "model.safetensors": lambda folder: is_hf_weights(folder),
    "model.safetensors.index.json": lambda folder: read_safetensors_metadata(folder),
}


@pytest.mark.parametrize("case", LOOKS)
@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 1), (errno.EACCES, 2)])
def test_a_file_that_cannot_be_looked_at(
    folder: Path, fail: Fail, case: str, number: int, code: int
) -> None:
    name = case.partition(" ")[0]
    fail("stat", name, number)
    with pytest.raises(TitanError, match=f"{name} cannot be read: {os.strerror(number)}") as error:
        LOOKS[case](folder)
    assert error.value.exit_code == code


def test_a_folder_of_data_that_cannot_be_looked_at_is_not_missing(folder: Path, fail: Fail) -> None:
    fail("stat", folder.name)
    with pytest.raises(OutageError, match=f"{folder} cannot be read: Input/output error"):
        find_files(str(folder))


def test_folders_of_checkpoints_that_cannot_be_listed(folder: Path, fail: Fail) -> None:
    fail("scandir", folder.name)
    for read in (restore_replaced, is_huggingface):
        with pytest.raises(OutageError, match=f"{folder} cannot be read: "):
            read(folder)


def test_a_tokenizer_that_cannot_be_read_is_not_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, real, left = HuggingFaceTokenizer(folder), Path.read_bytes, [1]
    known = describe_tokenizer(tokenizer)

    def read_bytes(path: Path) -> bytes:
        if path.name == "tokenizer.json" and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(retry, "RETRY_AFTER", (0, 0, 0))
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert describe_tokenizer(tokenizer) == known  # at the second attempt
    left[0] = 1000
    for read in (lambda: HuggingFaceTokenizer(folder), lambda: describe_tokenizer(tokenizer)):
        with pytest.raises(OutageError, match=r"tokenizer\.json cannot be read: "):
            read()


def test_a_rank_does_not_go_on_without_the_template_that_others_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_bytes(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(OutageError, match=r"tokenizer_config\.json cannot be read: Stale file"):
        load_template(None, str(folder))


def test_a_template_that_cannot_be_read_now_is_not_left_out(folder: Path, fail: Fail) -> None:
    fail("stat", "own.jinja")
    with pytest.raises(OutageError, match=r"own\.jinja cannot be read: Input/output error"):
        chat_template_of(str(folder / "own.jinja"), "bytes")


def test_weights_to_start_from_that_cannot_be_looked_at_are_not_missing(
    folder: Path, fail: Fail
) -> None:
    config = config_of(folder)
    config.checkpoint.initial_load_path = str(folder / "step-5")
    fail("stat", "step-5")
    with pytest.raises(OutageError, match=r"step-5 cannot be read: Input/output error"):
        validate(config, 1)


def test_a_dump_folder_that_cannot_be_claimed_ends_no_run(folder: Path, fail: Fail) -> None:
    fail("open", folder.name)
    claim_dump_folder(config_of(folder))


def test_a_folder_of_another_user_is_one_message(
    folder: Path, fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    fail("stat", folder.name, errno.EACCES)
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "--checkpoint", str(folder), "--prompt", "a"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {folder} cannot be read: Permission denied\n"
