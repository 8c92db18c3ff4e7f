"""Checkpoints in storages that fsspec knows: the same promises without a rename."""

import errno
import itertools
import logging
import os
import stat
import sys
from contextlib import suppress
from threading import Barrier

import fsspec
import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from object_store import ObjectStore

from torchtitan.components.checkpoint import folder as folders
from torchtitan.components.checkpoint import storage
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.storage import FileRecord, RemotePath, sizes_in, storage_path
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.errors import CheckpointError, ConfigError


@pytest.fixture(params=["memory", "local", "objects"])
def url(request, tmp_path):
    yield f"{request.param}://{tmp_path}/bucket/run"
    fsspec.filesystem("memory").store.clear()
    ObjectStore.store.clear()


@pytest.fixture
def root(url):
    return storage_path(url)


def steps_in(root):
    return sorted(path.name for path in folders.folders_in(root))


def run(tmp_path, url, **options):
    return Run(tmp_path, folder=url, **options)


def test_the_files_of_many_ranks_are_looked_at_side_by_side(tmp_path, monkeypatch):
    for rank in range(64):
        (tmp_path / f"__{rank}_0.distcp").write_bytes(b"x" * rank)
    all_threads, look = Barrier(storage.AT_ONCE, timeout=10), storage._size_of
    monkeypatch.setattr(storage, "_size_of", lambda entry: all_threads.wait() >= 0 and look(entry))
    assert sizes_in(tmp_path) == {f"__{rank}_0.distcp": rank for rank in range(64)}


@pytest.mark.parametrize("look", [folders.list_checkpoints, lambda root: folders.to_prune(root, 1)])
def test_checkpoints_are_looked_at_side_by_side(tmp_path, monkeypatch, look):
    """Else a run that keeps a thousand in an object store would take minutes to start."""
    for step in range(storage.AT_ONCE):
        (tmp_path / f"step-{step}").mkdir()
        Manifest(step, False, {}).write(tmp_path / f"step-{step}")
    all_threads, read = Barrier(storage.AT_ONCE, timeout=10), Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda path: all_threads.wait() >= 0 and read(path))
    assert [folders.step_of(path) for path in look(tmp_path)][:15] == [*range(15)]


def test_a_run_resumes_bitwise_and_prunes(tmp_path, url, root):
    expected = Run(tmp_path / "whole", enable=False).train(9)
    first = run(tmp_path, url, async_mode="async", keep_latest_k=2)
    first.train(6)
    first.manager.close()
    assert steps_in(root) == ["step-4", "step-6"]
    assert folders.PARTIAL not in sizes_in(root / "step-6")
    assert sizes_in(root / "step-6").keys() == {
        *Manifest.read(root / "step-6").files,
        "manifest.json",
    }

    resumed = run(tmp_path, url, seed=1)
    assert resumed.manager.load() == 6
    assert resumed.train(9) == expected[6:]
    assert not (tmp_path / "checkpoint").exists()


def test_weights_are_loaded_by_url(tmp_path, url, root):
    first = run(tmp_path, url)
    first.train(2)
    model = TinyModel(TinyArgs()).load_checkpoint(f"{url}/step-2")
    for name, value in first.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    start = Run(tmp_path / "other", seed=1, initial_load_path=f"{url}/step-2")
    assert start.manager.load() == 0
    torch.testing.assert_close(start.model.state_dict(), first.model.state_dict())


def test_a_run_goes_back_to_a_step(tmp_path, url, root):
    run(tmp_path, url).train(4)
    assert run(tmp_path, url, load_step=2).manager.load() == 2
    assert storage_path(f"{url}/step-2/") == root / "step-2"


@pytest.mark.parametrize("method", ["write_data", "finish"])
def test_a_folder_without_its_manifest_is_no_checkpoint(tmp_path, url, root, monkeypatch, method):
    def die(*args):
        raise KeyboardInterrupt

    first = run(tmp_path, url)
    first.train(2)
    with monkeypatch.context() as patch:
        target = CheckpointWriter if method == "write_data" else Manifest
        patch.setattr(target, "write_data" if method == "write_data" else "write", die)
        with pytest.raises(KeyboardInterrupt):
            first.train(4)
    assert steps_in(root) == ["step-2", "step-4"]
    assert [path.name for path in folders.list_checkpoints(root)] == ["step-2"]

    resumed = run(tmp_path, url)
    assert resumed.manager.load() == 2
    resumed.train(6)
    assert steps_in(root) == ["step-2", "step-4", "step-6"]
    assert [path.name for path in folders.list_checkpoints(root)] == steps_in(root)


def test_a_save_that_was_cut_off_after_its_manifest_is_whole(tmp_path, url, root):
    run(tmp_path, url).train(4)
    (root / "step-4" / folders.PARTIAL).write_bytes(b"")
    resumed = run(tmp_path, url)
    assert resumed.manager.load() == 4
    resumed.train(6)
    assert steps_in(root) == ["step-2", "step-4", "step-6"]


@pytest.mark.parametrize("where", ["second file", "all files but the manifest"])
def test_a_deletion_that_is_cut_off_leaves_no_checkpoint(tmp_path, url, root, monkeypatch, where):
    run(tmp_path, url).train(4)

    def die(*args):
        raise KeyboardInterrupt

    def die_at_the_second(path, names):
        (path / min(names)).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            RemotePath, "unlink_files", die_at_the_second if where == "second file" else die
        )
        with pytest.raises(KeyboardInterrupt):
            folders.delete(root / "step-2")
    assert len(sizes_in(root / "step-2")) > 2
    assert "manifest.json" not in sizes_in(root / "step-2")
    assert folders.was_deleted(root / "step-2") and not folders.was_deleted(root / "step-4")
    assert [path.name for path in folders.list_checkpoints(root)] == ["step-4"]
    run(tmp_path, url, keep_latest_k=1).train(2)
    assert steps_in(root) == ["step-2"]


def test_a_save_looks_at_no_older_checkpoint_again(tmp_path, monkeypatch):
    """A request takes up to a second, and a long run keeps a thousand."""
    url, looked_at, sizes = "objects://bucket/run", [], folders.sizes_in
    run(tmp_path, url).train(8)
    resumed = run(tmp_path, url, keep_every=1)
    assert resumed.manager.load() == 8
    resumed.train(10)
    monkeypatch.setattr(
        folders, "sizes_in", lambda folder: looked_at.append(folder.name) or sizes(folder)
    )
    resumed.train(14)
    assert looked_at == []
    assert len(steps_in(storage_path(url))) == 7
    ObjectStore.store.clear()


def save_alone(folder, content):
    folders.begin(folder)
    (folder / "file").write_bytes(content)
    Manifest(4, False, {}, files={"file": FileRecord.of(folder / "file")}).write(folder)
    folders.commit(folder)


def test_a_crash_at_any_moment_of_replacing_a_step_leaves_one_of_the_two(monkeypatch):
    """As in a run that began its steps anew, of which this is the only checkpoint."""
    root, whole = storage_path("objects://bucket/run"), False
    for calls in itertools.count():
        ObjectStore.store.clear()
        save_alone(root / "step-4", b"old")
        left = iter(range(calls))
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(ObjectStore, "error", KeyboardInterrupt)
            patch.setattr(ObjectStore, "fails", lambda *call, left=left: next(left, None) is None)
            save_alone(root / "step-4", b"new")
            whole = True
        folders.restore_replaced(root)
        [found] = folders.list_checkpoints(root)
        Manifest.read_whole(found)
        assert (found / "file").read_bytes() in ([b"new"] if whole else [b"old", b"new"])
        folders.begin(root / "step-6")
        assert steps_in(root) == ["step-4", "step-6"]
        if whole:
            break
    assert calls > 40
    ObjectStore.store.clear()


def test_all_files_but_the_manifest_are_deleted_at_once_and_after_it(
    tmp_path, url, root, monkeypatch
):
    run(tmp_path, url).train(4)
    fs, deleted = root.fs, []
    for name in ("rm_file", "rm"):
        method = getattr(fs, name)
        monkeypatch.setattr(
            fs, name, lambda path, method=method, **kw: (deleted.append(path), method(path, **kw))
        )
    folders.delete(root / "step-2")
    # What the file system itself calls for `rm` counts too.
    manifest, several = deleted[:2]
    assert manifest.endswith("step-2/manifest.json")
    assert sorted(path.rpartition("/")[2] for path in several) == [
        ".metadata",
        "__0_0.distcp",
        "config.resolved.toml",
    ]
    assert steps_in(root) == ["step-4"]


@pytest.mark.parametrize("name", ["run[12]", "run*", "run?"])
def test_a_name_that_is_a_pattern_is_refused(name):
    """Else to delete a file of `run[12]` would delete that of `run1`."""
    with pytest.raises(ConfigError, match=r"must not contain \*, \? or \["):
        storage_path(f"memory://bucket/{name}")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "manifest.json"])
def test_a_damaged_one_is_passed_over_and_kept(tmp_path, url, root, caplog, name):
    run(tmp_path, url).train(4)
    file = root / "step-4" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(bytes(content))
    caplog.set_level(logging.WARNING, "torchtitan")
    resumed = run(tmp_path, url)
    assert resumed.manager.load() == 2
    assert f"{file} is damaged" in caplog.text
    resumed.train(4)
    assert steps_in(root) == ["step-2", "step-4", "step-4.damaged"]
    assert (root / "step-4.damaged" / name).read_bytes() == content
    assert run(tmp_path, url).manager.load() == 4


def test_a_file_is_read_once_from_its_begin_to_its_end(tmp_path):
    """Each jump would be a request, which reads ahead what is not used."""
    run(tmp_path, "objects://bucket/run").train(2)
    ObjectStore.read.clear()
    resumed = run(tmp_path, "objects://bucket/run", verify=False)
    assert resumed.manager.load() == 2
    places = [(start, end) for path, start, end in ObjectStore.read if path.endswith(".distcp")]
    assert len(places) > 10
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    ObjectStore.store.clear()


def test_an_incomplete_one_alone_is_an_error(tmp_path, url, root):
    run(tmp_path, url).train(2)
    (root / "step-2" / "manifest.json").unlink()
    message = r"neither .*step-2/manifest\.json \(complete torchtitan checkpoint; for upstream"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path, url).manager.load()


def test_file_urls_are_local_folders(tmp_path):
    Run(tmp_path / "dump", folder=f"file://{tmp_path}/elsewhere").train(2)
    assert (tmp_path / "elsewhere" / "step-2" / "manifest.json").is_file()
    assert Run(tmp_path / "dump", folder=f"file://{tmp_path}/elsewhere").manager.load() == 2


def test_urls_that_cannot_be_opened_are_told(monkeypatch):
    with pytest.raises(ConfigError, match=r"nothing://a/b: fsspec does not support nothing://"):
        storage_path("nothing://a/b")

    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"s3://bucket/run: .*[Ii]nstall s3fs"):
        storage_path("s3://bucket/run")


@pytest.mark.parametrize(("number", "saved"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_may_be_unable_to_sync_folders(tmp_path, monkeypatch, number, saved):
    fsync = os.fsync

    def fsync_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    run = Run(tmp_path)
    run.manager.load()
    monkeypatch.setattr(os, "fsync", fsync_files)
    run.train(2)
    assert (tmp_path / "checkpoint" / "step-2").exists() == saved
