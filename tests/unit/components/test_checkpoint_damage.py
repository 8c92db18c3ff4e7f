"""Damaged checkpoints are found, skipped, kept, and never the last that is left."""

import logging
import random
import shutil
from threading import Barrier

import pytest
import torch
from checkpoint_run import Run, world_of_one  # noqa: F401
from harness import checkpoints_in

from torchtitan.components.checkpoint import folder as folders
from torchtitan.components.checkpoint import storage
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.opened import OpenCheckpoint
from torchtitan.components.checkpoint.storage import FileRecord
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.errors import CheckpointError, DamagedCheckpointError

FILES = [".metadata", "__0_0.distcp", "config.resolved.toml", "manifest.json"]


def steps_in(tmp_path):
    return checkpoints_in(tmp_path / "checkpoint")


def flip(path, bit=None):
    content = bytearray(path.read_bytes())
    bit = len(content) * 4 if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def damaged(tmp_path, step, name="__0_0.distcp"):
    file = tmp_path / "checkpoint" / f"step-{step}" / name
    flip(file)
    return file


def warnings_in(caplog):
    records = [r for r in caplog.records if r.name.startswith("torchtitan")]
    return [r.getMessage() for r in records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("name", FILES)
def test_each_flipped_bit_is_found_and_the_file_named(tmp_path, name):
    """In the manifest every bit, in the others 200, both ends among them."""
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    OpenCheckpoint.open(folder, None)
    file = folder / name
    bits = range(8 * file.stat().st_size)
    if name != "manifest.json":
        bits = [*random.Random(0).sample(bits, 198), bits[0], bits[-1]]
    for bit in bits:
        flip(file, bit)
        with pytest.raises(DamagedCheckpointError) as error:
            OpenCheckpoint.open(folder, None)
        assert str(file) in str(error.value), bit
        flip(file, bit)
    OpenCheckpoint.open(folder, None)


def test_the_manifest_has_the_checksum_of_the_bytes_on_the_disk(tmp_path):
    """They are made while a file is written; here the file is read."""
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    manifest = Manifest.read(folder)
    assert sorted([*manifest.files, "manifest.json"]) == FILES
    assert manifest.damaged_files(folder) == []


def test_files_are_read_side_by_side_and_only_those_of_a_rank(tmp_path, monkeypatch):
    """One process converts what thousands of ranks have saved, after reading all of it."""
    names = [f"__{rank}_0.distcp" for rank in range(storage.AT_ONCE)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    manifest = Manifest(1, False, {}, files={n: FileRecord.of(tmp_path / n) for n in names})
    all_threads, read = Barrier(storage.AT_ONCE, timeout=10), FileRecord.of
    monkeypatch.setattr(FileRecord, "of", lambda path: all_threads.wait() >= 0 and read(path))
    manifest.check_contents(tmp_path, names)
    monkeypatch.setattr(FileRecord, "of", None)
    manifest.check_contents(tmp_path, [])


@pytest.mark.parametrize("name", FILES)
def test_the_newest_good_one_is_loaded_in_place_of_a_damaged_one(tmp_path, caplog, name):
    whole = Run(tmp_path / "whole", enable=False).train(6)
    Run(tmp_path).train(6)
    files = [damaged(tmp_path, step, name) for step in (4, 6)]
    contents = [file.read_bytes() for file in files]
    caplog.set_level(logging.WARNING, "torchtitan")
    run = Run(tmp_path, seed=1)
    assert run.manager.load() == 2
    texts = warnings_in(caplog)
    assert len(texts) == 2 and all("skipped" in text for text in texts)
    for file in files:
        assert any(str(file) in text for text in texts)
    assert steps_in(tmp_path) == ["step-2", "step-4", "step-6"]
    assert run.manager.newest().name == "step-2"

    caplog.clear()
    assert run.train(6) == whole[2:]
    assert [text.rpartition(" ")[2] for text in warnings_in(caplog)] == [
        "step-4.damaged",
        "step-6.damaged",
    ]
    kept = [tmp_path / "checkpoint" / f"step-{n}.damaged" / name for n in (4, 6)]
    assert [file.read_bytes() for file in kept] == contents
    assert Run(tmp_path).manager.load() == 6


def test_those_with_a_damaged_manifest_count_as_the_newest_by_their_steps(tmp_path):
    root = tmp_path / "checkpoint"
    for step in 8, 10, 4, 6:
        folder = folders.step_folder(root, step)
        folder.mkdir(parents=True)
        Manifest(step, False, {}).write(folder)
    for step in 4, 10:
        (root / f"step-{step}" / "manifest.json").write_text("{}")
    assert [folders.step_of(path) for path in folders.list_checkpoints(root)] == [8, 6, 4, 10]


def test_a_second_damaged_one_does_not_take_the_place_of_the_first(tmp_path):
    for _ in range(3):
        run = Run(tmp_path)
        run.manager.load()
        run.train(4)
        damaged(tmp_path, 4)
    assert steps_in(tmp_path) == ["step-2", "step-4", "step-4.damaged", "step-4.damaged-2"]


def test_if_all_are_damaged_nothing_starts_anew(tmp_path):
    Run(tmp_path).train(4)
    file = damaged(tmp_path, 4)
    damaged(tmp_path, 2)
    with pytest.raises(CheckpointError) as error:
        Run(tmp_path).manager.load()
    assert str(file) in str(error.value) and "2 are damaged" in str(error.value)
    assert "no intact checkpoint" in str(error.value)
    assert steps_in(tmp_path) == ["step-2", "step-4"]


def test_a_damaged_one_that_was_asked_for_is_an_error(tmp_path):
    Run(tmp_path).train(6)
    damaged(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"load_step = 4: .*__0_0.*resume from: 2, 6$"):
        Run(tmp_path, load_step=4).manager.load()


def test_without_verify_sizes_are_checked_still(tmp_path):
    Run(tmp_path).train(4)
    config = tmp_path / "checkpoint" / "step-4" / "config.resolved.toml"
    flip(config, 8 * config.read_bytes().index(b"default job"))  # TOML still
    assert Run(tmp_path, verify=False).manager.load() == 4
    config.write_text("short")
    assert Run(tmp_path, verify=False).manager.load() == 2


def test_damage_that_shows_while_tensors_are_read_is_passed_over_too(tmp_path):
    """Without checksums, by the bytes of PyTorch's own format."""
    Run(tmp_path).train(4)
    file = tmp_path / "checkpoint" / "step-4" / "__0_0.distcp"
    file.write_bytes(b"\x93" * file.stat().st_size)
    whole = Run(tmp_path / "whole", enable=False).train(4)
    run = Run(tmp_path, seed=1, verify=False)
    assert run.manager.load() == 2
    assert run.train(4) == whole[2:]


def test_metadata_that_leads_out_of_the_folder_is_refused(tmp_path):
    import pickle

    from torchtitan.components.checkpoint.reader import read_metadata
    from torchtitan.components.checkpoint.storage import FileRecord

    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    shutil.copy(folder / "__0_0.distcp", tmp_path / "elsewhere")
    metadata, manifest = read_metadata(folder), Manifest.read(folder)
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest.files[".metadata"] = FileRecord.of(folder / ".metadata")
    manifest.write(folder)
    with pytest.raises(DamagedCheckpointError, match=r"names '\.\./\.\./elsewhere'"):
        OpenCheckpoint.open(folder, None)


@pytest.mark.parametrize("damage", ["size", "found when loaded"])
def test_pruning_does_not_count_damaged_ones(tmp_path, damage):
    Run(tmp_path).train(8)
    for step in (6, 8):
        file = damaged(tmp_path, step)
        if damage == "size":
            file.write_bytes(b"short")
    run = Run(tmp_path, keep_latest_k=2)
    assert run.manager.load() == 4
    run.train(5)
    run.manager.save(5, last=True)
    assert steps_in(tmp_path) == ["step-4", "step-5", "step-6", "step-8"]


def test_a_step_that_is_saved_anew_is_no_longer_damaged(tmp_path):
    Run(tmp_path).train(4)
    damaged(tmp_path, 4)
    run = Run(tmp_path, keep_latest_k=1)
    assert run.manager.load() == 2
    run.train(6)
    assert steps_in(tmp_path) == ["step-4.damaged", "step-6"]


def test_pruning_that_is_cut_off_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    run = Run(tmp_path, keep_latest_k=1)
    run.train(2)

    def delete_one_file(path):
        (path / ".metadata").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "rmtree", delete_one_file)
        with pytest.raises(KeyboardInterrupt):
            run.train(4)
    assert steps_in(tmp_path) == ["step-2.partial", "step-4"]
    run = Run(tmp_path)
    assert run.manager.load() == 4
    run.train(6)
    assert steps_in(tmp_path) == ["step-4", "step-6"]


def test_files_and_folders_are_synced_before_a_checkpoint_appears(tmp_path, monkeypatch):
    """In this order: each file's bytes, once, the names in the folder, the rename, its name.

    A rank tells rank 0 of its file when its bytes are on the disk.
    """
    import os

    events = []
    write_data = CheckpointWriter.write_data

    def spy_write_data(writer, plan, planner):
        future = write_data(writer, plan, planner)
        events.append("told")
        return future

    monkeypatch.setattr(CheckpointWriter, "write_data", spy_write_data)
    fsync, rename = os.fsync, type(tmp_path).rename

    def spy_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def spy_rename(path, target):
        events.append(f"{path} -> {target}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(type(tmp_path), "rename", spy_rename)
    Run(tmp_path, keep_latest_k=1).train(4)
    root = tmp_path / "checkpoint"
    at = events.index(f"{root}/step-2.partial -> {root}/step-2")
    before = events[:at]
    for name in FILES:
        assert before.count(f"{root}/step-2.partial/{name}") == 1
    assert before.index(f"{root}/step-2.partial/__0_0.distcp") < before.index("told")
    assert before[-1] == f"{root}/step-2.partial"
    assert str(tmp_path) in before  # the new folder `checkpoint` in it
    assert events[at + 1] == str(root)
    pruned = events.index(f"{root}/step-2 -> {root}/step-2.partial")
    assert events[pruned + 1] == str(root)  # before its files are deleted


def test_a_run_goes_back_again_and_again(tmp_path):
    """Bitwise, and to what the run itself saved."""
    whole = Run(tmp_path / "whole", enable=False).train(8)
    Run(tmp_path).train(6)  # of an older attempt
    run = Run(tmp_path, load_step=2, async_mode="async")
    assert run.manager.load() == 2
    run.train(3)
    assert run.manager.roll_back() == 2  # step 4 and step 6 are of the older attempt
    assert run.train(5) == whole[2:5]
    assert run.manager.roll_back() == 4
    assert run.state.step == 4
    assert run.train(8) == whole[4:8]
    run.manager.wait()
    damaged(tmp_path, 8)
    assert run.manager.roll_back() == 6
    assert run.train(8) == whole[6:8]


def test_what_is_excluded_stays_when_going_back(tmp_path):
    run = Run(tmp_path)
    run.manager.load()
    run.train(3)
    rows = run.loader.state_dict()["rows"]
    assert run.manager.roll_back(exclude=("dataloader",)) == 2
    assert run.state.step == 2
    assert torch.equal(run.loader.state_dict()["rows"], rows)


def test_without_a_checkpoint_there_is_no_going_back(tmp_path):
    run = Run(tmp_path)
    assert run.manager.load() == 0
    run.train(1)
    assert run.manager.roll_back() is None


def test_if_all_to_go_back_to_are_damaged_load_step_is_not_blamed(tmp_path):
    """It was applied long ago."""
    Run(tmp_path).train(2)
    run = Run(tmp_path, load_step=2)
    assert run.manager.load() == 2
    run.train(4)
    for step in (2, 4):
        damaged(tmp_path, step)
    with pytest.raises(CheckpointError, match=r"^\S*step-4\S* is damaged.*no intact .*\(2 are"):
        run.manager.roll_back()
