"""Two runs never save into one folder."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace

import fsspec
import pytest
import torch
import torch.distributed as dist
from checkpoint_run import Run, TinyArgs, world_of_one  # noqa: F401
from harness import checkpoints_in, on_ranks

from torchtitan.components.checkpoint import owner as owner_module
from torchtitan.components.checkpoint.folder import checkpoint_root
from torchtitan.components.checkpoint.owner import (
    OWNER,
    Claim,
    Owner,
    TakenOverError,
    _process,
    claim_dump_folder,
)
from torchtitan.components.checkpoint.resume import check_resume
from torchtitan.components.checkpoint.storage import sizes_in, storage_path
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, OutageError
from torchtitan.runtime.host_sum import sum_over_ranks


@pytest.fixture(params=["checkpoint", "memory", "local"])
def folder(request, tmp_path):
    """`checkpoint.folder`."""
    name = request.param
    yield name if name == "checkpoint" else f"{name}://{tmp_path}/deep/run"
    fsspec.filesystem("memory").store.clear()


def root_of(tmp_path, folder):
    return storage_path(folder) if "://" in folder else tmp_path / folder


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_the_run_started_last_goes_on_alone(tmp_path, folder, async_mode):
    first = Run(tmp_path, folder=folder, async_mode=async_mode)
    first.manager.load()
    first.train(2)
    first.manager.wait()
    second = Run(tmp_path, seed=1, folder=folder)
    assert second.manager.load() == 2
    with pytest.raises(TakenOverError, match=r"taken over by another run \(process \d+ on .+, si"):
        first.train(4)
        first.manager.wait()
    assert first.manager.newest().name == "step-2"
    second.train(6)
    assert Run(tmp_path, folder=folder).manager.load() == 6


def test_a_run_that_hangs_in_a_save_does_not_complete_it(tmp_path, folder, monkeypatch):
    first = Run(tmp_path, folder=folder)
    first.manager.load()
    first.train(2)
    second = Run(tmp_path, seed=1, folder=folder)
    write = CheckpointWriter.write_data

    def hang(self, plan, planner):
        done = write(self, plan, planner)
        monkeypatch.undo()
        assert second.manager.load() == 2
        return done

    monkeypatch.setattr(CheckpointWriter, "write_data", hang)
    with pytest.raises(TakenOverError):
        first.train(4)
    assert "manifest.json" not in sizes_in(root_of(tmp_path, folder) / "step-4")
    assert Run(tmp_path, folder=folder).manager.load() == 2
    third = Run(tmp_path, folder=folder)
    third.manager.load()
    third.train(4)
    assert Run(tmp_path, folder=folder).manager.load() == 4


def test_a_job_that_torchrun_starts_again_does_not_take_back_what_another_has(tmp_path):
    store, root = dist.HashStore(), tmp_path / "checkpoint"
    Claim(root, dist.HashStore()).take()
    first = Claim(root, store)
    first.take()  # over from a job that is gone
    again = Claim(root, store)
    again.take()
    first.check()  # in the same process
    (root / OWNER).write_text(json.dumps(asdict(replace(Owner.of(root), host="another"))))
    with pytest.raises(TakenOverError):
        first.check()
    again.take()
    Claim(root, dist.HashStore()).take()
    for claim in again, Claim(root, store):
        with pytest.raises(TakenOverError):
            claim.take()
    (root / OWNER).unlink()
    Claim(root, store).take()


def test_runs_of_one_job_have_a_folder_each(tmp_path):
    store = dist.HashStore()
    Claim(tmp_path / "b", dist.HashStore()).take()  # of an earlier launch
    for name in "ab":
        Claim(tmp_path / name, store).take()


def test_replica_groups_have_a_folder_each_also_behind_a_url():
    config = JobConfig()
    config.checkpoint.folder = "memory://bucket/run/"
    assert str(checkpoint_root(config)) == "memory://bucket/run"
    config.fault_tolerance.enable, config.fault_tolerance.replica_id = True, 1
    assert str(checkpoint_root(config)) == "memory://bucket/run/replica-1"


def test_replica_groups_have_a_folder_each_in_an_absolute_one():
    config = JobConfig()
    config.job.dump_folder, config.checkpoint.folder = "out/replica-1", "/shared/ck"
    assert str(checkpoint_root(config)) == "/shared/ck"
    config.fault_tolerance.enable, config.fault_tolerance.replica_id = True, 1
    assert str(checkpoint_root(config)) == "/shared/ck/replica-1"
    config.checkpoint.folder = "/shared/replica-1/ck"  # the user's own way
    assert str(checkpoint_root(config)) == "/shared/replica-1/ck"
    config.checkpoint.folder = "ck"
    assert str(checkpoint_root(config)) == "out/replica-1/ck"


def test_the_export_at_the_end_is_saved_by_the_owner_alone(tmp_path):
    first = Run(tmp_path, interval=100, steps=2, last_save_model_only=True, last_save_in_hf=True)
    first.manager.load()
    Run(tmp_path).manager.load()
    with pytest.raises(TakenOverError):
        first.train(2, last=True)
    assert checkpoints_in(tmp_path / "checkpoint") == []


@pytest.mark.skipif(sys.platform != "linux", reason="processes are known from /proc")
def test_of_two_runs_that_start_at_the_same_time_one_goes_on(tmp_path, monkeypatch):
    first, second, third = (Claim(tmp_path) for _ in range(3))
    monkeypatch.setattr(owner_module, "_alone", nullcontext)  # as on two hosts
    sync = os.fsync

    def sync_while_another_claims(descriptor):
        monkeypatch.setattr(os, "fsync", sync)
        second.take()

    monkeypatch.setattr(os, "fsync", sync_while_another_claims)
    first.take()
    first.check()
    other = os.getpid() + 1
    monkeypatch.setattr(os, "getpid", lambda: other)
    with pytest.raises(CheckpointError, match="another run saves its checkpoints there"):
        third.take()
    first.check()
    assert [path.name for path in tmp_path.iterdir()] == [OWNER]


def test_a_folder_that_was_deleted_is_made_again(tmp_path):
    run = Run(tmp_path)
    run.manager.load()
    run.train(2)
    shutil.rmtree(tmp_path / "checkpoint")
    run.train(4)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [OWNER, "step-4"]


def test_a_name_that_cannot_be_read_is_nobody_s(tmp_path):
    run = Run(tmp_path)
    run.manager.load()
    (tmp_path / "checkpoint" / OWNER).write_bytes(b'{"job": ')
    run.train(2)
    assert Owner.of(tmp_path / "checkpoint").works_in(tmp_path / "checkpoint") is False
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2"]


def test_a_folder_that_cannot_be_written_is_named_at_the_start(tmp_path):
    (tmp_path / "checkpoint").write_text("a file in its place")
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/checkpoint: cannot write there: "):
        Run(tmp_path).manager.load()


def test_nothing_is_left_of_a_name_that_cannot_be_written(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OutageError, match="cannot write there"):
        Claim(tmp_path).take()
    assert not list(tmp_path.iterdir())


def test_a_disabled_manager_takes_no_folder(tmp_path):
    Run(tmp_path, enable=False).manager.load()
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are known from /proc")
@pytest.mark.parametrize("enable", [False, True])
def test_runs_do_not_mix_their_metrics(tmp_path, enable):
    config = JobConfig()
    config.job.dump_folder, config.checkpoint.enable = str(tmp_path), enable
    claim_dump_folder(config)
    claim_dump_folder(config)  # this process's own
    with subprocess.Popen(["sleep", "60"]) as other:
        owner = replace(Owner.new(tmp_path), pid=other.pid, process=_process(other.pid))
        (tmp_path / OWNER).write_text(json.dumps(asdict(owner)))
        with pytest.raises(CheckpointError, match=r"another run writes its metrics there \(proc"):
            claim_dump_folder(config)
        other.kill()
    claim_dump_folder(config)
    assert Owner.of(tmp_path).pid == os.getpid()


def _take(folder, kind):
    """Take `folder` with the other rank at the same time; then live on until it has tried, too."""
    config = JobConfig()
    config.job.dump_folder = str(folder)
    sum_over_ranks(torch.zeros(1))
    try:
        Claim(folder).take() if kind == "checkpoints" else claim_dump_folder(config)
        (folder / str(dist.get_rank())).touch()
    except CheckpointError:
        pass
    sum_over_ranks(torch.zeros(1))
    assert len(list(folder.glob("[01]"))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="processes are known from /proc")
@pytest.mark.parametrize("kind", ["checkpoints", "metrics"])
def test_of_runs_that_start_in_one_millisecond_one_goes_on(tmp_path, kind):
    on_ranks(2, _take, tmp_path, kind)


def test_the_two_claims_do_not_meet_in_one_folder(tmp_path):
    config, store = JobConfig(), dist.HashStore()
    config.job.dump_folder, config.checkpoint.enable = str(tmp_path), True
    config.checkpoint.folder = "."
    for _ in range(2):  # as torchrun starts a job again
        claim_dump_folder(config)
        Claim(checkpoint_root(config), store).take()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are known from /proc")
def test_a_run_at_work_on_this_machine_is_not_disturbed(tmp_path):
    config = JobConfig()
    config.job.dump_folder, config.checkpoint.enable = str(tmp_path), True
    root = tmp_path / "checkpoint"
    Claim(root).take()
    check_resume(config, TinyArgs())  # this process's own

    other = subprocess.Popen(["sleep", "60"])
    owner = replace(Owner.new(root), pid=other.pid, process=_process(other.pid))
    (root / OWNER).write_text(json.dumps(asdict(owner)))
    with pytest.raises(CheckpointError, match=rf"another run saves .*process {other.pid} on "):
        check_resume(config, TinyArgs())

    shutil.copytree(root, tmp_path / "copy" / "checkpoint")
    config.job.dump_folder = str(tmp_path / "copy")
    check_resume(config, TinyArgs())

    config.job.dump_folder = str(tmp_path)
    time.sleep(0.03)  # some ticks of the kernel's clock
    second = subprocess.Popen(["sleep", "60"])
    # The number of an owner that is gone, used again: after the machine started anew, or before.
    for process in ("another start of the machine", _process(other.pid)):
        earlier = replace(owner, pid=second.pid, process=process)
        (root / OWNER).write_text(json.dumps(asdict(earlier)))
        check_resume(config, TinyArgs())
    second.kill()
    second.wait()

    (root / OWNER).write_text(json.dumps(asdict(owner)))
    other.kill()
    while _process(other.pid):  # it has ended, though nobody has waited for it
        time.sleep(0.01)
    check_resume(config, TinyArgs())
    other.wait()
    check_resume(config, TinyArgs())
