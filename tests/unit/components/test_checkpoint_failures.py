"""Damaged checkpoints are detected, and failed saves lose nothing."""

import errno
import gc
import logging
import os
import pickle
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from harness import checkpoints_in

from torchtitan.components.checkpoint import folder as folders
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.owner import Claim
from torchtitan.components.checkpoint.reader import read_metadata
from torchtitan.components.checkpoint.storage import CheckpointFiles, FileRecord
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.errors import CheckpointError, OutageError

FILES = [".metadata", "__0_0.distcp", "config.resolved.toml", "manifest.json"]


@pytest.fixture
def saved(tmp_path):
    """The folder of a checkpoint of step 2."""
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    return folder


def assert_refused(tmp_path, file):
    """Resuming and loading weights both fail with one message that names the file."""
    with pytest.raises(CheckpointError) as resuming:
        Run(tmp_path).manager.load()
    with pytest.raises(CheckpointError) as loading:
        TinyModel(TinyArgs()).load_checkpoint(file.parent)
    for error in resuming, loading:
        assert str(file) in str(error.value) or not file.exists()
        assert "\n" not in str(error.value)
    assert str(file) in str(resuming.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 10, -1])
def test_a_truncated_file_is_named(tmp_path, saved, name, size):
    file = saved / name
    file.write_bytes(file.read_bytes()[:size])
    assert_refused(tmp_path, file)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, saved, name):
    (saved / name).unlink()
    assert_refused(tmp_path, saved / name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_full_of_garbage_is_named(tmp_path, saved, name):
    file = saved / name
    file.write_bytes(b"\x93" * file.stat().st_size)
    assert_refused(tmp_path, file)


def test_metadata_that_is_something_else_is_damaged(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(torch.Size([1])))
    with pytest.raises(CheckpointError, match=r"metadata is damaged: it holds no checkpoint"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"step": 2, "unknown": 1}'])
def test_a_manifest_of_another_form_is_named(tmp_path, saved, text):
    (saved / "manifest.json").write_text(text)
    assert_refused(tmp_path, saved / "manifest.json")


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_metadata_cannot_run_code(tmp_path, saved):
    victim = tmp_path / "executed"
    manifest = Manifest.read(saved)
    (saved / ".metadata").write_bytes(pickle.dumps(Malicious(str(victim))))
    manifest.files[".metadata"] = FileRecord.of(saved / ".metadata")
    manifest.write(saved)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged: .*mkdir"):
        Run(tmp_path).manager.load()
    assert not victim.exists()


def test_a_saved_object_cannot_run_code(tmp_path):
    victim = tmp_path / "executed"
    run = Run(tmp_path)
    run.state.state_dict = lambda: {"step": Malicious(str(victim))}
    run.train(2)
    with pytest.raises(CheckpointError, match=r"distcp.*train_state\.step is .* more than plain"):
        Run(tmp_path).manager.load()
    assert not victim.exists()


def warnings_in(caplog):
    records = [r for r in caplog.records if r.name.startswith("torchtitan")]
    return [r for r in records if r.levelno >= logging.WARNING]


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize("where", ["write_data", "finish", "prepare_global_plan"])
def test_training_outlives_a_failed_save(tmp_path, saved, monkeypatch, caplog, where, async_mode):
    run = Run(tmp_path, async_mode=async_mode)
    run.manager.load()
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, where, no_space)
        run.train(4)
        run.manager.wait()
    [record] = warnings_in(caplog)
    assert record.getMessage() == (
        f"The checkpoint of step 4 could not be saved in {saved.parent}: OSError: [Errno 28] No "
        "space left on device. The newest checkpoint is step-2. Training continues"
    )
    assert checkpoints_in(saved.parent) == ["step-2"]

    run.train(6)  # there is space again
    run.manager.wait()
    assert Run(tmp_path).manager.load() == 6


def test_a_failed_last_save_is_an_error(tmp_path, saved, monkeypatch):
    run = Run(tmp_path)
    run.manager.load()
    monkeypatch.setattr(CheckpointWriter, "write_data", no_space)
    found = r"step 3 .*No space left.* newest .* is step-2\. Free some space, then try again$"
    with pytest.raises(CheckpointError, match=found):
        run.train(3, last=True)
    assert Run(tmp_path).manager.load() == 2


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ECONNRESET, OutageError, 1),
        (errno.EIO, OutageError, 1),
        (errno.ESTALE, OutageError, 1),
        (errno.ENOSPC, CheckpointError, 2),
        (errno.EDQUOT, CheckpointError, 2),
        (errno.EROFS, CheckpointError, 2),
        (errno.EACCES, CheckpointError, 2),
        (errno.ENOSYS, CheckpointError, 2),  # as of mounts of object stores, which rename nothing
        (errno.ENOTSUP, CheckpointError, 2),
    ],
)
def test_an_outage_at_the_end_has_the_run_started_again(
    tmp_path, saved, monkeypatch, caplog, number, kind, code
):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    run = Run(tmp_path)
    run.manager.load()
    monkeypatch.setattr(CheckpointWriter, "write_data", fail)
    run.train(4)
    assert caplog.messages[-1].endswith("newest checkpoint is step-2. Training continues")
    with pytest.raises(kind, match=r"step 5 could not be saved.* newest .* is step-2") as error:
        run.train(5, last=True)
    assert type(error.value) is kind and error.value.exit_code == code
    assert ("This may be temporary" in str(error.value)) == (code == 1)


def test_a_claim_that_cannot_be_read_at_the_end_is_an_outage(tmp_path, saved, monkeypatch):
    run = Run(tmp_path)
    run.manager.load()

    def fail(self):
        raise OutageError("it cannot be read")

    monkeypatch.setattr(Claim, "check", fail)
    with pytest.raises(
        OutageError, match=r"step 3 could not be saved .*it cannot be read.*step-2$"
    ):
        run.train(3, last=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoint").write_text("a file in its place")
    with pytest.raises(CheckpointError, match=rf"saved in {tmp_path}/checkpoint: \w+Error"):
        Run(tmp_path).train(1, last=True)


def test_a_write_error_that_pytorch_hides_is_shown(tmp_path, monkeypatch):
    """`torch.save` turns a failed write into "unexpected pos", and leaves views of buffers."""

    class FullDisk:
        def __init__(self, stream):
            self._stream = stream

        def write(self, data):
            return self._stream.write(data) if len(data) < 64 else no_space()

        def __getattr__(self, name):
            return getattr(self._stream, name)

    create_stream = CheckpointFiles.create_stream

    @contextmanager
    def create_on_full_disk(self, path, mode):
        with create_stream(self, path, mode) as stream:
            yield FullDisk(stream)

    monkeypatch.setattr(CheckpointFiles, "create_stream", create_on_full_disk)
    with pytest.raises(CheckpointError, match=r"OSError: \[Errno 28\] No space left on device"):
        Run(tmp_path).train(1, last=True)
    gc.collect()  # would crash some versions of Python if such views were still there


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """On a real file system of 1 MiB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the tests above simulate a full disk")
    try:
        run = Run(disk, args=TinyArgs(dim=16))
        run.train(2)
        ballast = disk / "ballast"
        ballast.write_bytes(b"0" * (shutil.disk_usage(disk).free - 24_000))
        with pytest.raises(CheckpointError, match=r"No space left on device"):
            run.train(3, last=True)
        ballast.unlink()
        assert Run(disk, args=TinyArgs(dim=16)).manager.load() == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_old_checkpoint_that_cannot_be_deleted_does_no_harm(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    run = Run(tmp_path, keep_latest_k=1)
    run.train(2)
    monkeypatch.setattr(folders, "rmtree", refuse)
    run.train(4)
    assert [r.getMessage() for r in warnings_in(caplog)] == [
        f"{tmp_path}/checkpoint/step-2 could not be deleted: PermissionError: [Errno 13] "
        "Permission denied"
    ]
    assert run.manager.newest().name == "step-4"


@pytest.fixture
def in_use(monkeypatch):
    """Call it with a folder: a file in that is as one on NFS that somebody reads."""
    held = []
    rmtree = folders.rmtree

    def keep_held(path):
        if any((path / name).exists() for name in held):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), ".nfs0001")
        rmtree(path)

    def hold(folder):
        folder.mkdir(parents=True)
        (folder / ".nfs0001").write_text("in use")
        held.append(".nfs0001")

    monkeypatch.setattr(folders, "rmtree", keep_held)
    return hold


@pytest.mark.parametrize("left", ["step-3.partial", "step-2.replaced", "step-3.replaced.partial"])
def test_a_leftover_that_cannot_be_deleted_stops_nothing(tmp_path, saved, in_use, caplog, left):
    in_use(saved.with_name(left))
    run = Run(tmp_path)
    assert run.manager.load() == 2
    run.train(6, last=True)
    assert Run(tmp_path).manager.load() == 6
    texts = {r.getMessage() for r in warnings_in(caplog)}
    assert any(text.startswith(f"{saved.parent}/{left} could not be deleted: ") for text in texts)


def test_a_step_can_be_replaced_again_while_the_one_before_is_in_use(tmp_path, saved, in_use):
    in_use(saved.with_name("step-2.replaced"))
    run = Run(tmp_path)
    run.train(2)
    assert Run(tmp_path).manager.load() == 2
    assert checkpoints_in(saved.parent) == ["step-2", "step-2.replaced.partial"]


def test_a_place_that_cannot_be_cleared_is_named(tmp_path, saved, in_use):
    partial = saved.with_name("step-4.partial")
    in_use(partial)
    run = Run(tmp_path)
    run.manager.load()
    with pytest.raises(OutageError, match=rf"Device or resource busy: '{partial}'"):
        run.train(4, last=True)
    run.train(6)
    assert Run(tmp_path).manager.load() == 6


def test_a_checkpoint_that_cannot_have_its_name_back_is_named(tmp_path, saved, monkeypatch):
    replaced = saved.rename(saved.with_name("step-2.replaced"))

    def refuse(self, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError, match=rf"{replaced} cannot be renamed to step-2: "):
            Run(tmp_path).manager.load()
    assert Run(tmp_path).manager.load() == 2


def test_a_folder_is_deleted_with_all_that_is_in_it(tmp_path):
    folder, elsewhere = tmp_path / "step-2.partial", tmp_path / "elsewhere"
    for path in folder / "inside", elsewhere:
        path.mkdir(parents=True)
        (path / "file").write_text("some")
    for number in range(100):
        (folder / f"__{number}_0.distcp").write_bytes(b"")
    (folder / "link").symlink_to(elsewhere)
    folders.rmtree(folder)
    assert not folder.exists() and (elsewhere / "file").exists()
    with pytest.raises(FileNotFoundError):
        folders.rmtree(folder)
    folder.symlink_to(elsewhere)
    with pytest.raises(OSError):  # without a message in Python 3.14
        folders.rmtree(folder)
    assert (elsewhere / "file").exists()


def test_where_all_are_kept_none_is_looked_at(tmp_path, saved, monkeypatch):
    monkeypatch.setattr(folders, "list_checkpoints", no_space)
    assert folders.to_prune(saved.parent, 0) == []


def test_a_checkpoint_that_was_moved_and_is_a_link_now_is_pruned(tmp_path, caplog):
    Run(tmp_path / "run").train(4)
    root, elsewhere = tmp_path / "run" / "checkpoint", tmp_path / "elsewhere"
    (root / "step-2").rename(elsewhere)
    (root / "step-2").symlink_to(elsewhere)
    run = Run(tmp_path / "run", keep_latest_k=2)
    assert run.manager.load() == 4
    run.train(8)
    assert checkpoints_in(root) == ["step-6", "step-8"]
    assert not warnings_in(caplog)
    assert Manifest.read(elsewhere).step == 2


def test_a_link_that_leads_nowhere_is_told_and_in_the_way_of_nothing(tmp_path, caplog):
    root = tmp_path / "checkpoint"
    Run(tmp_path).train(2)
    for name in "step-4", "step-4.damaged":
        (root / name).symlink_to(tmp_path / "unmounted")
    run = Run(tmp_path)
    assert run.manager.load() == 2
    [told] = warnings_in(caplog)
    problem = f"{root}/step-4 is a link to {tmp_path}/unmounted, which does not exist"
    assert problem in told.getMessage()
    run.train(4)
    assert Manifest.read(root / "step-4").step == 4
    links = ["step-4.damaged", "step-4.damaged-2"]
    assert sorted(path.name for path in root.iterdir() if path.is_symlink()) == links

    caplog.clear()
    shutil.rmtree(root / "step-4")
    (root / "step-4").symlink_to(tmp_path / "unmounted")
    assert run.manager.roll_back() == 2
    assert problem in warnings_in(caplog)[0].getMessage()


def test_a_run_does_not_start_anew_where_all_checkpoints_are_out_of_reach(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "step-4").symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=r"step-4 is a link to .*unmounted"):
        Run(tmp_path).manager.load()
