"""A storage that fails for a while is no damage: reading is tried again, else the run ends."""

from __future__ import annotations

import errno
import io
import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from harness import checkpoints_in

from torchtitan.cli import exit_on_user_error
from torchtitan.components.checkpoint import retry, storage
from torchtitan.components.checkpoint.folder import list_checkpoints
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.reader import read_metadata, read_whole
from torchtitan.components.checkpoint.saved_tensors import SavedTensor
from torchtitan.components.checkpoint.storage import RemotePath
from torchtitan.errors import DamagedCheckpointError, OutageError

FILES = [".metadata", "__0_0.distcp", "manifest.json"]
ALWAYS = 1000


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_AFTER", (0, 0, 0))


class FailingFile(io.FileIO):
    """Its first reads are good; the one after them fails."""

    def __init__(self, path, good_reads, error):
        super().__init__(path)
        self._left, self._error = good_reads, error

    def readinto(self, buffer):
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().readinto(buffer)

    def read(self, size=-1):
        self._left -= 1
        if self._left < 0:
            raise self._error
        return super().read(size)


def fail(monkeypatch, name, error, times=ALWAYS, good_reads=0):
    """Reading files called `name` fails so many times. Returns a list of how often it was tried."""
    path_open, tried = Path.open, []

    def open_failing(path, mode="r", *args, **kwargs):
        if path.name != name or "r" not in mode:
            return path_open(path, mode, *args, **kwargs)
        tried.append(path)
        if len(tried) > times:
            return path_open(path, mode, *args, **kwargs)
        if not good_reads:
            raise error
        return FailingFile(path, good_reads, error)

    monkeypatch.setattr(Path, "open", open_failing)
    return tried


def os_error(number):
    return OSError(number, os.strerror(number))


def assert_nothing_is_damaged(tmp_path, run):
    assert not run.manager._series.damaged
    assert Run(tmp_path).manager.load() == 4
    run = Run(tmp_path, load_step=2)
    run.manager.load()
    run.train(4)
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2", "step-4"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE])
def test_a_file_that_cannot_be_read_for_a_while_is_read_later(tmp_path, monkeypatch, name, number):
    Run(tmp_path).train(4)
    tried = fail(monkeypatch, name, os_error(number), times=3)
    assert Run(tmp_path).manager.load() == 4
    assert len(tried) > 3


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_a_file_that_cannot_be_read_at_all_ends_the_run(tmp_path, monkeypatch, name, number):
    Run(tmp_path).train(4)
    run = Run(tmp_path)
    with monkeypatch.context() as patch:
        tried = fail(patch, name, os_error(number))
        with pytest.raises(OutageError, match=rf"{name} cannot be read: .*may be intact"):
            run.manager.load()
    tries = set(Counter(tried).values())  # of each file: manifests are read side by side
    assert tries == {1 if number == errno.EACCES else 4}
    assert_nothing_is_damaged(tmp_path, run)


@pytest.mark.parametrize("times", [2, ALWAYS])
@pytest.mark.parametrize("good_reads", [1, 3, 6])
def test_a_read_that_fails_within_a_tensor_is_no_damage(tmp_path, monkeypatch, times, good_reads):
    """PyTorch's C++ reads the file, through a view."""
    Run(tmp_path).train(4)
    run = Run(tmp_path, verify=False)
    with monkeypatch.context() as patch:
        fail(patch, "__0_0.distcp", os_error(errno.EIO), times, good_reads)
        if times == ALWAYS:
            with pytest.raises(OutageError, match=r"distcp cannot be read.*Errno 5"):
                run.manager.load()
        else:
            assert run.manager.load() == 4
    assert_nothing_is_damaged(tmp_path, run)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("uncorrectable ECC error"),
        KeyboardInterrupt(),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_too_little_memory_a_broken_device_and_ctrl_c_are_no_damage(
    tmp_path, monkeypatch, error, verify
):
    Run(tmp_path).train(4)
    run = Run(tmp_path, verify=verify)
    with monkeypatch.context() as patch:
        fail(patch, "__0_0.distcp", error)
        with pytest.raises(type(error)):
            run.manager.load()
    assert_nothing_is_damaged(tmp_path, run)


def test_memory_that_pytorch_cannot_have_is_no_damage(tmp_path, monkeypatch):
    Run(tmp_path).train(4)
    run = Run(tmp_path, verify=False)
    with monkeypatch.context() as patch:
        error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate")
        fail(patch, "__0_0.distcp", error)
        with pytest.raises(MemoryError):
            run.manager.load()
    assert_nothing_is_damaged(tmp_path, run)


def test_a_folder_that_cannot_be_listed_has_no_damaged_checkpoints(tmp_path, monkeypatch):
    Run(tmp_path).train(4)
    run, scandir, left = Run(tmp_path), os.scandir, [3]

    @contextmanager
    def failing(folder):
        if str(folder).endswith("step-4") and left[0]:
            left[0] -= 1
            raise os_error(errno.ESTALE)
        with scandir(folder) as entries:
            yield entries

    monkeypatch.setattr(storage.os, "scandir", failing)
    assert Run(tmp_path).manager.load() == 4
    left[0] = ALWAYS
    with pytest.raises(OutageError, match=r"step-4 cannot be read: OSError: \[Errno 116\]"):
        run.manager.load()
    left[0] = 0
    assert_nothing_is_damaged(tmp_path, run)


def test_a_remote_file_that_cannot_be_read_is_no_damage(tmp_path, monkeypatch):
    url = f"local://{tmp_path}/bucket"
    Run(tmp_path, folder=url).train(4)
    read_bytes = RemotePath.read_bytes

    def refuse(path):
        if path.parent.name == "step-4":
            raise TimeoutError("the storage does not answer")
        return read_bytes(path)

    monkeypatch.setattr(RemotePath, "read_bytes", refuse)
    with pytest.raises(OutageError, match="does not answer"):
        Run(tmp_path, folder=url).manager.load()
    with pytest.raises(OutageError, match="does not answer"):
        list_checkpoints(storage.storage_path(url))


def test_a_failed_read_while_it_saves_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    """To know which old checkpoints may go, rank 0 reads the manifests that it does not know."""
    Run(tmp_path).train(4)
    (tmp_path / "checkpoint" / "step-2" / ".metadata").write_bytes(b"short")
    run = Run(tmp_path, keep_latest_k=1)
    assert run.manager.load() == 4
    run.train(6)
    read = Manifest.read

    def refuse(folder):
        if folder.name == "step-2":
            raise OutageError("step-2 cannot be read")
        return read(folder)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "read", refuse)
        run.train(8)
    assert run.manager.last_saved == 8
    assert "old checkpoints cannot be listed for deletion: step-2 cannot be read" in caplog.text
    assert Run(tmp_path).manager.load() == 8


def test_tools_and_weights_tell_it_too(tmp_path, monkeypatch):
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    manifest, metadata = Manifest.read(folder), read_metadata(folder)
    key = "model.output.weight"
    fail(monkeypatch, "__0_0.distcp", os_error(errno.EIO))
    with pytest.raises(OutageError):
        TinyModel(TinyArgs()).load_checkpoint(folder)
    with pytest.raises(OutageError):
        read_whole(folder, metadata, [key])
    with pytest.raises(OutageError):
        SavedTensor.find(folder, metadata, key)
    with pytest.raises(OutageError):
        manifest.damaged_files(folder)


def test_hugging_face_weights_that_cannot_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    import builtins

    from safetensors.torch import save_file

    from torchtitan.components.checkpoint.safetensors_files import SafetensorsFile

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    builtin_open = builtins.open

    def refuse(file, *args, **kwargs):
        if Path(str(file)) == path:
            raise os_error(errno.EIO)
        return builtin_open(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        with pytest.raises(OutageError):
            SafetensorsFile(path)
    path.write_bytes(b"")
    with pytest.raises(DamagedCheckpointError):
        SafetensorsFile(path)


def test_the_exit_code_has_launchers_start_the_run_again(capsys):
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise OutageError("/data/step-2/manifest.json cannot be read")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: /data/step-2/manifest.json cannot be read\n"
