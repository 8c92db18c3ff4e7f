"""Nothing in a checkpoint, a dataset or a tokenizer runs code; no message shows a secret."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorStorageMetadata

import torchtitan
from torchtitan import cli
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.reader import read_metadata, read_safetensors_metadata
from torchtitan.components.checkpoint.storage import FileRecord
from torchtitan.components.run_folder import CONFIG_FILE, config_to_keep, write_description
from torchtitan.config import JobConfig, load_config, to_toml
from torchtitan.data import build_dataloader
from torchtitan.errors import CheckpointError, ConfigError, TitanError
from torchtitan.tools.logging import init_logger
from torchtitan.tools.secrets import hide_secrets

SOURCES = sorted(Path(torchtitan.__file__).parent.rglob("*.py"))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = str(victim)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.victim,)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def step_2(tmp_path: Path) -> Path:
    Run(tmp_path / "run").train(2)
    return tmp_path / "run" / "checkpoint" / "step-2"


def bombs(victim: Path) -> dict[str, bytes]:
    """A bomb in each form that `torch.load` reads."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(Bomb(victim), zipped)
    torch.save(Bomb(victim), legacy, _use_new_zipfile_serialization=False)
    return {
        "pickle": pickle.dumps(Bomb(victim)),
        "zip": zipped.getvalue(),
        "legacy": legacy.getvalue(),
    }


def plant(folder: Path, key: str, bomb: bytes) -> None:
    """Put a bomb in the place of an entry; all checksums fit."""
    metadata, manifest = read_metadata(folder), Manifest.read(folder)
    (folder / "evil.distcp").write_bytes(bomb)
    for index, info in metadata.storage_data.items():
        if index.fqn == key:
            info.relative_path, info.offset, info.length = "evil.distcp", 0, len(bomb)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for name in ("evil.distcp", ".metadata"):
        manifest.files[name] = FileRecord.of(folder / name)
    manifest.write(folder)


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize(
    "key", ["model.output.weight", "dataloader.rows", "train_state.step", "lr_scheduler.step"]
)
def test_an_entry_of_a_checkpoint(step_2: Path, victim: Path, key: str, form: str) -> None:
    """A tensor of the model, the data loader's state, a plain value."""
    plant(step_2, key, bombs(victim)[form])
    with pytest.raises(CheckpointError, match=r"evil\.distcp is damaged"):
        Run(step_2.parents[1]).manager.load()
    for command in (["diff", str(step_2), str(step_2)], ["verify", str(step_2)]):
        try:
            cli.main(["checkpoint", *command])
        except SystemExit as error:
            assert error.code == 2
    assert not victim.exists()


class Attribute:
    """Is an attribute of something when it is unpickled: so does Python 3.11.2 pickle enums."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, (self.owner, self.name)


def test_of_attributes_only_members_of_enums_are_taken(step_2: Path) -> None:
    path = step_2 / ".metadata"
    metadata = read_metadata(step_2)
    properties = next(
        entry.properties
        for entry in metadata.state_dict_metadata.values()
        if isinstance(entry, TensorStorageMetadata)
    )
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    metadata.planner_data = Attribute(_MEM_FORMAT_ENCODING, member.name)
    path.write_bytes(pickle.dumps(metadata))
    assert read_metadata(step_2).planner_data is member
    assert properties.memory_format is torch.contiguous_format
    for owner, name in [(type(metadata), "__init__"), (_MEM_FORMAT_ENCODING, "__class__")]:
        metadata.planner_data = Attribute(owner, name)
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="is damaged"):
            read_metadata(step_2)


def test_the_metadata_of_a_checkpoint(step_2: Path, victim: Path, tmp_path: Path) -> None:
    """With fitting checksums, and as a folder of torch.distributed.checkpoint without a manifest"""
    manifest = Manifest.read(step_2)
    (step_2 / ".metadata").write_bytes(pickle.dumps(Bomb(victim)))
    manifest.files[".metadata"] = FileRecord.of(step_2 / ".metadata")
    manifest.write(step_2)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: .*mkdir"):
        Run(step_2.parents[1]).manager.load()
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        TinyModel(TinyArgs()).load_checkpoint(step_2)
    (step_2 / "manifest.json").unlink()
    for command in (["checkpoint", "verify"], ["convert", "inspect"], ["generate", "--checkpoint"]):
        with pytest.raises(SystemExit, match="2"):
            if cli.main([*command, str(step_2)]) == 1:  # `verify` found it
                raise SystemExit(2)
    assert not victim.exists()


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_weights_in_a_bin_file_are_not_opened(tmp_path: Path, victim: Path, form: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bombs(victim)[form])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        TinyModel(TinyArgs()).load_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bombs(victim)[form])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        read_safetensors_metadata(tmp_path)
    assert not victim.exists()


def tokens(folder: Path, bomb: bytes) -> list[str]:
    (folder / "tokens.bin").write_bytes(bomb)
    (folder / "index.json").write_bytes(bomb)
    return ["--training.dataset=tokens", f"--training.dataset_path={folder}"]


def one_token_file(folder: Path, bomb: bytes) -> list[str]:
    (folder / "tokens.bin").write_bytes(bomb)
    return ["--training.dataset=tokens", f"--training.dataset_path={folder}/tokens.bin"]


def arrow(folder: Path, bomb: bytes) -> list[str]:
    (folder / "data.arrow").write_bytes(bomb)
    return ["--training.dataset=arrow", f"--training.dataset_path={folder}/data.arrow"]


def saved_to_disk(folder: Path, bomb: bytes) -> list[str]:
    (folder / "data-00000-of-00001.arrow").write_bytes(bomb)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    return ["--training.dataset=arrow", f"--training.dataset_path={folder}"]


def tokenizer(folder: Path, bomb: bytes) -> list[str]:
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes(bomb)
    return [f"--model.tokenizer_path={folder}"]


@pytest.mark.parametrize("kind", [tokens, one_token_file, arrow, saved_to_disk, tokenizer])
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_datasets_and_tokenizers(
    tmp_path: Path, victim: Path, kind: Callable[[Path, bytes], list[str]], form: str
) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    options = kind(folder, bombs(victim)[form])
    config = load_config([*options, "--training.seq_len=8", f"--job.dump_folder={tmp_path}/run"])
    try:
        from torchtitan.components.tokenizer import build_tokenizer

        loader = build_dataloader(config, build_tokenizer(config), 0, 1)
        next(loader)  # bytes may pass for tokens
        loader.close()
    except TitanError as error:
        assert str(folder) in str(error)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["hostile.py", "dataset.py", "modeling.py", "conftest.py"])
def test_a_script_in_a_dataset_folder(tmp_path: Path, victim: Path, name: str) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / name).write_text(f"import os; os.mkdir({str(victim)!r})\n")
    (folder / "data.jsonl").write_text('{"text": "some text to read"}\n' * 50)
    options = ["--training.dataset=hf", f"--training.dataset_path={folder}"]
    config = load_config([*options, "--training.seq_len=8"])
    try:
        from torchtitan.components.tokenizer import build_tokenizer

        loader = build_dataloader(config, build_tokenizer(config), 0, 1)
        next(loader)
        loader.close()
    except TitanError as error:
        assert str(folder) in str(error)
    assert not victim.exists()


def test_no_source_trusts_remote_code_or_unpickles_files() -> None:
    """By the syntax trees: `torch.load` is always told `weights_only=True`, and so on."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            name = ast.unparse(node.func)
            where = f"{path}:{node.lineno}"
            if "trust_remote_code" in named:
                assert ast.unparse(named["trust_remote_code"]) == "False", where
            if "allow_pickle" in named:
                assert ast.unparse(named["allow_pickle"]) == "False", where
            if name == "torch.load":
                assert ast.unparse(named["weights_only"]) == "True", where
            if name in ("pickle.load", "pickle.loads"):
                # Between processes of one run.
                assert path.name in ("ranks.py", "save_table.py", "collective_calls.py"), where


SECRET = "hf_0123456789abcdefghij"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)


@pytest.mark.usefixtures("secrets")
def test_logs_and_errors_hide_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torchtitan")
    handlers, level = list(logger.handlers), logger.level
    init_logger()
    try:
        logger.info("the token is %s.", SECRET)
        try:
            raise ValueError(f"Illegal header value b'Bearer {SECRET}'")
        except ValueError:
            logger.exception("a library failed")
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)

    @cli.exit_on_user_error()
    def fail() -> None:
        raise ConfigError(f"the hub refuses {SECRET}")

    with pytest.raises(SystemExit):
        fail()
    err = capsys.readouterr().err
    assert SECRET not in err
    assert err.count("***") == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("saved s3://me:hunter2@host/ck/step-2", "saved s3://me:***@host/ck/step-2"),
        ('"sftp://:a%2Fb@host:22/x"', '"sftp://:***@host:22/x"'),
        (
            "https://h/a?X-Amz-Signature=0f&X-Amz-Date=1",
            "https://h/a?X-Amz-Signature=***&X-Amz-Date=1",
        ),
        ("'az://c/a?se=1&sig=0f%3D'", "'az://c/a?se=1&sig=***'"),
        ("https://h/a?access_token=0f;api-key=1", "https://h/a?access_token=***;api-key=***"),
        ("https://h/a?X-Amz-Credential=me&tokens=9", "https://h/a?X-Amz-Credential=me&tokens=9"),
        ("s3://bucket/a:b/c@d http://[::1]:80/@x", "s3://bucket/a:b/c@d http://[::1]:80/@x"),
    ],
)
def test_passwords_in_urls_are_hidden(text: str, shown: str) -> None:
    assert hide_secrets(text) == shown


def test_a_config_whose_secrets_are_hidden_is_still_toml() -> None:
    config = JobConfig()
    config.job.description = 'reads "https://h/a?sig=0f"'
    shown = tomllib.loads(config_to_keep(config))
    assert shown["job"]["description"] == 'reads "https://h/a?sig=***"'


def test_errors_hide_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    @cli.exit_on_user_error()
    def fail() -> None:
        raise ConfigError("two\n\tlines and \x1b[31mred")

    with pytest.raises(SystemExit):
        fail()
    assert capsys.readouterr().err == "error: two\n\tlines and \\x1b[31mred\n"


@pytest.mark.usefixtures("secrets")
def test_a_token_that_is_no_header_is_not_shown_by_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    import huggingface_hub

    def snapshot_download(*args: object, **options: object) -> None:
        raise OSError(f"Illegal header value b'Bearer {SECRET}\\n'")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["download", "some/model", "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert "Bearer ***" in captured.err
    assert SECRET not in captured.err + captured.out


@pytest.mark.usefixtures("secrets")
def test_what_a_run_writes_has_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config, the checkpoint, and what W&B's failure says."""
    config = load_config([])
    assert SECRET not in to_toml(config)
    run = Run(tmp_path / "run")
    run.config.training.dataset_path = "sftp://me:hunter2@host/a"
    run.train(2)
    write_description(run.config, 1)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        assert SECRET.encode() not in path.read_bytes()
        assert b"hunter2" not in path.read_bytes()
        assert path.name != CONFIG_FILE or b"sftp://me:***@host/a" in path.read_bytes()

    from torchtitan.components.metric_sinks import WandbSink

    class Wandb(ModuleType):
        def init(self, **settings: object) -> None:
            assert SECRET not in repr(settings) and "hunter2" not in repr(settings)
            raise RuntimeError(f"API key {SECRET} is not valid")

    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    config.job.dump_folder = str(tmp_path / "run")
    config.training.dataset_path = "sftp://me:hunter2@host/a"

    @cli.exit_on_user_error()
    def start() -> None:
        WandbSink(config)

    with pytest.raises(SystemExit):
        start()
    err = capsys.readouterr().err
    assert "API key *** is not valid" in err and SECRET not in err
