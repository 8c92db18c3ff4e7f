"""An object store that does not answer: nothing is lost, and nothing counts as damaged."""

from __future__ import annotations

import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from object_store import EndpointConnectionError, IncompleteReadError, ObjectStore

from torchtitan.components.checkpoint import folder as folders
from torchtitan.components.checkpoint import retry
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.owner import Claim
from torchtitan.components.checkpoint.resume import check_resume
from torchtitan.components.checkpoint.retry import parse_again
from torchtitan.components.checkpoint.storage import storage_path
from torchtitan.config import JobConfig
from torchtitan.errors import CheckpointError, OutageError

URL = "objects://bucket/run"
FILES = [".metadata", "__0_0.distcp", "config.resolved.toml", "manifest.json"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_AFTER", (0, 0, 0))
    yield
    ObjectStore.store.clear()


@pytest.fixture
def fail(monkeypatch):
    """Call it with what says of a call, by method and path, whether it fails, and how often."""

    def fail(says, times=1000, error=EndpointConnectionError):
        left = [times]

        def fails(method, path):
            if not says(method, path) or not left[0]:
                return False
            left[0] -= 1
            return True

        monkeypatch.setattr(ObjectStore, "fails", staticmethod(fails))
        monkeypatch.setattr(ObjectStore, "error", error)

    return fail


def everything(method, path):
    return True


def nothing(method, path):
    return False


def run(tmp_path, **options):
    return Run(tmp_path, folder=URL, **options)


def complete():
    return [path.name for path in folders.list_checkpoints(storage_path(URL))]


def test_a_deletion_that_fails_leaves_the_checkpoint_just_saved(tmp_path, fail, caplog):
    first = run(tmp_path, keep_latest_k=1)
    first.train(2)
    fail(lambda method, path: method in ("rm", "rm_file") and "step-2" in path)
    first.train(4)
    assert complete()[-1] == "step-4"
    assert first.manager.last_saved == 4
    assert "step-2 could not be deleted: OSError: [Errno 5] EndpointConnectionError" in caplog.text
    fail(nothing)
    first.train(6)
    assert complete() == ["step-6"]
    assert run(tmp_path).manager.load() == 6


def test_whatever_pruning_raises_the_checkpoint_just_saved_stays(tmp_path, monkeypatch, caplog):
    def crash(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(folders, "to_prune", crash)
    first = run(tmp_path, keep_latest_k=1)
    first.train(4)
    assert first.manager.last_saved == 4
    assert "old checkpoints cannot be listed for deletion: a bug" in caplog.text


def test_an_outage_while_saving_is_outlived(tmp_path, fail, caplog):
    first = run(tmp_path)
    first.train(2)
    fail(everything)
    first.train(4)
    assert "step 4 could not be saved" in caplog.text and "newest is" not in caplog.text
    with pytest.raises(
        OutageError, match=r"step 5 could not be saved.* newest checkpoint is step-2"
    ):
        first.train(5, last=True)
    fail(nothing)
    first.train(6)
    assert complete() == ["step-2", "step-6"]


@pytest.mark.parametrize("method", ["open", "pipe_file"])
def test_a_failed_write_at_the_end_is_an_outage(tmp_path, fail, method):
    first = run(tmp_path)
    first.train(2)
    fail(lambda called, path: called == method and "step-3" in path)
    with pytest.raises(OutageError, match="step 3 could not be saved"):
        first.train(3, last=True)
    fail(nothing)
    assert run(tmp_path).manager.load() == 2


def test_a_save_that_does_not_begin_leaves_an_older_one_of_that_step(tmp_path, monkeypatch):
    run(tmp_path).train(6)
    again = run(tmp_path, load_step=2)
    assert again.manager.load() == 2

    def fail(self):
        raise OutageError("the owner cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(Claim, "check", fail)
        again.train(4)
    assert complete() == ["step-2", "step-4", "step-6"]
    again.train(6)
    assert complete() == ["step-2", "step-4", "step-6"]
    assert run(tmp_path).manager.load() == 6


def of_file(name):
    return lambda method, path: path.endswith(f"step-4/{name}") and method in ("cat_file", "read")


@pytest.mark.parametrize("error", [EndpointConnectionError, IncompleteReadError])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_an_outage_while_loading_is_no_damage(tmp_path, fail, name, verify, error):
    run(tmp_path).train(4)
    resumed = run(tmp_path, verify=verify)
    fail(of_file(name), error=error)
    with pytest.raises(OutageError, match=rf"{name} cannot be read: .*{error.__name__}"):
        resumed.manager.load()
    assert not resumed.manager._series.damaged
    fail(of_file(name), times=3, error=error)
    assert resumed.manager.load() == 4


def test_a_storage_that_is_gone_at_the_start_is_an_outage(tmp_path, fail):
    run(tmp_path).train(2)
    resumed, model = run(tmp_path), TinyModel(TinyArgs())
    fail(everything)
    with pytest.raises(OutageError, match="Could not connect"):
        resumed.manager.load()
    with pytest.raises(OutageError, match="Could not connect"):
        model.load_checkpoint(f"{URL}/step-2")
    fail(lambda method, path: method == "info", times=3)  # fsspec would say there is no such file
    model.load_checkpoint(f"{URL}/step-2")


def test_what_hides_an_outage_is_no_damage():
    def parse():
        try:
            raise EndpointConnectionError("gone")
        except EndpointConnectionError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error

    with pytest.raises(OutageError, match=r"file cannot be read: RuntimeError"):
        parse_again("file", parse)


def test_a_damaged_one_of_the_last_step_is_set_aside(tmp_path):
    run(tmp_path).train(4)
    file = storage_path(URL) / "step-4" / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = run(tmp_path)
    assert resumed.manager.load() == 2
    resumed.train(4, last=True)
    names = {path.name for path in folders.folders_in(storage_path(URL))}
    assert names == {"step-2", "step-4", "step-4.damaged"}
    aside = storage_path(URL) / "step-4.damaged"
    Manifest.read(aside).check_sizes(aside)
    with pytest.raises(CheckpointError, match="CRC-32"):
        Manifest.read(aside).check_contents(aside, ["__0_0.distcp"])
    assert torch.equal(
        TinyModel(TinyArgs()).load_checkpoint(f"{URL}/step-4").output.weight,
        resumed.model.output.weight,
    )


def test_a_path_that_no_file_can_have_is_a_mistake(tmp_path):
    config = JobConfig()
    config.job.dump_folder, config.checkpoint.enable = str(tmp_path / ("x" * 300)), True
    with pytest.raises(CheckpointError, match=r"x/checkpoint/.owner.json cannot be read: File na"):
        check_resume(config, TinyArgs())
