"""Saving and resuming in one process."""

import json
import logging
import re
import shutil
import threading
import zlib
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch
from checkpoint_run import Run, TinyArgs, TinyModel, world_of_one  # noqa: F401
from harness import checkpoints_in

from torchtitan.components.checkpoint import manifest
from torchtitan.components.checkpoint.folder import list_checkpoints
from torchtitan.components.checkpoint.load import load_weights_of_parts
from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.components.checkpoint.reader import read_metadata
from torchtitan.components.checkpoint.writer import CheckpointWriter
from torchtitan.config import JobConfig
from torchtitan.config.data import DataSource
from torchtitan.errors import CheckpointError


def steps_in(tmp_path):
    return checkpoints_in(tmp_path / "checkpoint")


KINDS = [("AdamW", "float32"), ("SGD", "float32"), ("Muon", "float32")]
KINDS += [("AdamW", "bfloat16"), ("Muon", "bfloat16")]


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
@pytest.mark.parametrize(("optimizer", "state_dtype"), KINDS)
def test_a_resumed_run_continues_bitwise(tmp_path, optimizer, state_dtype, async_mode):
    kind = {"optimizer": optimizer, "state_dtype": state_dtype}
    expected = Run(tmp_path / "whole", **kind, enable=False).train(9)
    first = Run(tmp_path, **kind, async_mode=async_mode)
    first.train(6)
    first.manager.close()

    resumed = Run(tmp_path, seed=1, **kind)
    assert resumed.manager.load() == 6
    assert resumed.state.step == 6
    assert resumed.train(9) == expected[6:]


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
@pytest.mark.parametrize(("was", "now"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_state_in_another_precision_is_resumed(tmp_path, optimizer, was, now):
    whole = Run(tmp_path / "whole", optimizer=optimizer, enable=False)
    losses = whole.train(6)
    first = Run(tmp_path, optimizer=optimizer, state_dtype=was)
    first.train(2)
    expected = moments(first)
    saved = read_metadata(tmp_path / "checkpoint" / "step-2").state_dict_metadata
    assert {saved[f"optimizer.{name}"].properties.dtype for name in expected} == {
        getattr(torch, was)
    }

    resumed = Run(tmp_path, seed=1, optimizer=optimizer, state_dtype=now)
    assert resumed.manager.load() == 2
    found = moments(resumed)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, value in expected.items():
        assert found[name].dtype == getattr(torch, now)
        assert torch.equal(found[name], value.to(found[name].dtype)), name
    assert resumed.train(6) == pytest.approx(losses[2:], rel=1e-2)


def moments(run):
    state = run.optimizers.state_dict()
    return {k: v.clone() for k, v in state.items() if k.startswith("state.") and v.ndim}


def test_a_new_run_starts_at_step_0(tmp_path):
    assert Run(tmp_path).manager.load() == 0
    assert Run(tmp_path).manager.newest() is None


def test_saves_at_the_interval_and_at_the_end(tmp_path):
    Run(tmp_path, interval=3).train(7, last=True)
    assert steps_in(tmp_path) == ["step-3", "step-6", "step-7"]


def test_a_disabled_manager_saves_and_resumes_nothing(tmp_path):
    Run(tmp_path).train(2)
    disabled = Run(tmp_path, enable=False)
    assert disabled.manager.load() == 0
    disabled.train(4, last=True)
    assert steps_in(tmp_path) == ["step-2"]


def test_load_step_chooses_the_checkpoint(tmp_path):
    Run(tmp_path).train(6)
    assert Run(tmp_path, load_step=4).manager.load() == 4
    with pytest.raises(CheckpointError, match=r"load_step = 5.*step-5.*Steps.*: 2, 4, 6"):
        Run(tmp_path, load_step=5).manager.load()


def test_a_run_that_went_back_is_newer_than_what_it_left_behind(tmp_path):
    Run(tmp_path).train(6)
    back = Run(tmp_path, load_step=2, keep_latest_k=2)
    back.manager.load()
    back.train(4)
    assert steps_in(tmp_path) == ["step-4", "step-6"]
    resumed = Run(tmp_path, keep_latest_k=1)
    assert resumed.manager.load() == 4
    resumed.manager.save(5, last=True)
    assert steps_in(tmp_path) == ["step-5"]


def test_load_step_counts_once(tmp_path, caplog):
    """Each restart of a job has the same arguments."""
    whole = Run(tmp_path / "whole", enable=False).train(10)
    Run(tmp_path).train(4)
    for until in (6, 8):
        run = Run(tmp_path, seed=1, load_step=2, keep_latest_k=2)
        start = run.manager.load()
        assert run.train(until) == whole[start:until]
    assert start == 6 and steps_in(tmp_path) == ["step-6", "step-8"]
    text = "load_step = 2 was already applied before step-8 was saved, so the run resumes from "
    text += "that checkpoint"
    caplog.clear()
    assert Run(tmp_path, load_step=2).manager.load() == 8  # though step-2 is gone
    assert caplog.messages[-1] == f"checkpoint.{text}"


def test_the_log_tells_how_to_go_back_to_a_step_again(tmp_path, caplog):
    Run(tmp_path).train(4)
    back = Run(tmp_path, load_step=2)
    back.manager.load()
    assert "already applied" not in caplog.text
    back.train(6)
    assert Run(tmp_path, load_step=2).manager.load() == 6
    how = "To go back to step-2 again, first move or delete step-6, step-4"
    assert caplog.messages[-1].endswith(how)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoint" / f"step-{step}")
    assert Run(tmp_path, load_step=2).manager.load() == 2


def test_load_step_counts_anew_after_a_checkpoint_without_it(tmp_path):
    Run(tmp_path).train(4)
    for load_step, start, until in ((2, 2, 4), (-1, 4, 6), (2, 2, 4), (3, None, 4)):
        run = Run(tmp_path, load_step=load_step)
        if start is None:
            with pytest.raises(CheckpointError, match=r"load_step = 3.*Steps.*: 2, 4, 6"):
                run.manager.load()
        else:
            assert run.manager.load() == start
            run.train(until)


def test_load_step_passes_over_what_is_damaged_or_an_export(tmp_path, caplog):
    Run(tmp_path).train(4)
    run = Run(tmp_path, load_step=2, steps=10, last_save_model_only=True)
    run.manager.load()
    run.train(10, last=True)
    (tmp_path / "checkpoint" / "step-8" / ".metadata").unlink()
    assert Run(tmp_path, load_step=2).manager.load() == 6
    assert re.search(r"step-8/\.metadata is missing.*skipped", caplog.text)
    for step in (4, 6):
        (tmp_path / "checkpoint" / f"step-{step}" / "manifest.json").write_text("no manifest")
    assert Run(tmp_path, load_step=2).manager.load() == 2


class Ahead(datetime):
    """The clock of a host that is ten minutes ahead."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(minutes=10)


def test_what_was_saved_last_is_the_newest_whatever_clocks_say(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "datetime", Ahead)
        Run(tmp_path).train(4)
    for start, until in ((4, 8), (8, 10)):
        run = Run(tmp_path, keep_latest_k=2)
        assert run.manager.load() == start
        run.train(until)
    assert steps_in(tmp_path) == ["step-10", "step-8"]
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoint")][-1] == "step-10"


@pytest.mark.parametrize("saved_at", ["", "yesterday", "2026-01-01", "9999-12-31T23:59:59.999999Z"])
def test_a_manifest_without_a_time_disturbs_no_save(tmp_path, monkeypatch, saved_at):
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    saved = Manifest.read(folder)
    saved.saved_at = saved_at
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "time_after", lambda earlier: "")
        saved.write(folder)
    assert Manifest.read(folder).saved_at == saved_at
    run = Run(tmp_path)
    assert run.manager.load() == 2
    run.train(4)
    assert steps_in(tmp_path) == ["step-2", "step-4"]


def test_keeps_the_newest_k(tmp_path):
    Run(tmp_path, keep_latest_k=2).train(10)
    assert steps_in(tmp_path) == ["step-10", "step-8"]


def test_a_run_looks_once_at_a_checkpoint_to_prune_and_not_at_its_own(tmp_path, monkeypatch):
    """In a long run with `keep_every` there are many, each with the names of thousands of files."""
    Run(tmp_path).train(4)
    (tmp_path / "checkpoint" / "step-4" / ".metadata").write_bytes(b"short")
    run = Run(tmp_path, keep_latest_k=3, load_step=2)
    assert run.manager.load() == 2
    run.manager.save(3, last=True)
    looked_at = []
    read = Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda path: looked_at.append(path.name) or read(path))
    for step in 5, 7, 9:
        run.manager.save(step, last=True)
    assert looked_at == ["step-4"] * 3  # again, since it is not whole
    assert steps_in(tmp_path) == ["step-4", "step-5", "step-7", "step-9"]


def test_those_of_every_so_many_steps_are_kept_for_good(tmp_path):
    Run(tmp_path, keep_latest_k=2, keep_every=6).train(16)
    assert sorted(steps_in(tmp_path)) == ["step-12", "step-14", "step-16", "step-6"]


def test_more_steps_are_saved_and_kept_for_good(tmp_path):
    Run(tmp_path, keep_latest_k=2, keep_steps=[1, 2, 5]).train(10)
    assert sorted(steps_in(tmp_path)) == ["step-1", "step-10", "step-2", "step-5", "step-8"]


def test_keep_0_keeps_all(tmp_path):
    Run(tmp_path, keep_latest_k=0, interval=1).train(12)
    assert len(steps_in(tmp_path)) == 12


def test_exports_are_not_counted_as_kept_checkpoints(tmp_path):
    Run(tmp_path, keep_latest_k=1, last_save_model_only=True, steps=4).train(4, last=True)
    assert steps_in(tmp_path) == ["step-2", "step-4"]


def test_a_save_is_invisible_until_it_is_committed(tmp_path, monkeypatch):
    seen = []
    finish = CheckpointWriter.finish

    def spy(self, metadata, results):
        seen.extend(steps_in(tmp_path))
        return finish(self, metadata, results)

    monkeypatch.setattr(CheckpointWriter, "finish", spy)
    Run(tmp_path).train(2)
    assert seen == ["step-2.partial"]
    assert steps_in(tmp_path) == ["step-2"]


def test_a_crash_while_saving_leaves_the_older_checkpoint_the_newest(tmp_path, monkeypatch):
    def die(self, folder):
        raise KeyboardInterrupt

    run = Run(tmp_path)
    run.train(2)
    with monkeypatch.context() as patch:
        patch.setattr("torchtitan.components.checkpoint.manifest.Manifest.write", die)
        with pytest.raises(KeyboardInterrupt):
            run.train(4)
    assert steps_in(tmp_path) == ["step-2", "step-4.partial"]

    resumed = Run(tmp_path)
    assert resumed.manager.load() == 2
    resumed.train(6)
    assert steps_in(tmp_path) == ["step-2", "step-4", "step-6"]


def test_a_crash_while_replacing_a_step_keeps_the_old_one(tmp_path):
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    folder.rename(folder.with_name("step-2.replaced"))
    assert Run(tmp_path).manager.load() == 2
    assert steps_in(tmp_path) == ["step-2"]


def test_async_save_holds_the_state_of_its_step_while_training_goes_on(tmp_path, monkeypatch):
    writing, training_went_on = threading.Event(), threading.Event()
    write_data = CheckpointWriter.write_data

    def write_late(self, plan, planner):
        writing.set()
        assert training_went_on.wait(timeout=60)
        return write_data(self, plan, planner)

    run = Run(tmp_path, async_mode="async")
    run.train(1)
    monkeypatch.setattr(CheckpointWriter, "write_data", write_late)
    expected = Run(tmp_path / "whole", enable=False).train(5)
    run.train(3)  # saves step 2
    assert writing.wait(timeout=60)
    assert steps_in(tmp_path) == ["step-2.partial"]
    training_went_on.set()
    run.manager.wait()
    assert steps_in(tmp_path) == ["step-2"]

    resumed = Run(tmp_path)
    assert resumed.manager.load() == 2
    assert resumed.train(5) == expected[2:]


def test_the_next_async_save_waits_for_the_one_before(tmp_path):
    run = Run(tmp_path, async_mode="async", interval=1)
    run.train(4, last=True)
    assert steps_in(tmp_path) == ["step-1", "step-2", "step-3", "step-4"]


def test_the_end_of_a_background_save_is_seen_at_the_next_step(tmp_path):
    run = Run(tmp_path, async_mode="async", interval=2)
    run.train(2)
    assert run.manager.last_saved is None and run.manager._background.wait(60)
    assert run.manager.newest().name == "step-2"
    run.train(3)
    assert run.manager.last_saved == 2


def test_a_part_that_a_run_has_since_keeps_its_state(tmp_path):
    """As of a guard that is turned on in the middle of a run."""
    Run(tmp_path).train(2)
    resumed, loaded = Run(tmp_path), []
    state = resumed.manager._state
    state._optional["guard"] = state._stateful["guard"] = SimpleNamespace(
        state_dict=lambda: {"json": ""}, load_state_dict=loaded.append
    )
    assert resumed.manager.load() == 2 and loaded == []


@pytest.mark.parametrize("part", ["optimizer", "lr_scheduler", "dataloader", "train_state"])
def test_excluded_parts_start_anew(tmp_path, part):
    first = Run(tmp_path)
    first.train(2)
    resumed = Run(tmp_path, seed=1, exclude_from_loading=[part])
    assert resumed.manager.load() == 2
    loaded = resumed.loaded_parts()
    assert loaded == {name: name != part for name in loaded}
    begun = Run(tmp_path / "begun", enable=False) if part == "lr_scheduler" else first
    assert resumed.schedule.last_lr == begun.schedule.last_lr
    torch.testing.assert_close(resumed.model.state_dict(), first.model.state_dict())


@pytest.mark.parametrize("part", ["optimizer", "lr_scheduler", "dataloader", "train_state"])
def test_an_exclusion_counts_once(tmp_path, part, caplog):
    caplog.set_level(logging.INFO, "torchtitan")
    Run(tmp_path).train(2)
    again = Run(tmp_path, exclude_from_loading=[part])
    again.manager.load()
    assert "already applied" not in caplog.text
    first = again.state.step
    expected = again.train(first + 4)
    shutil.rmtree(tmp_path / "checkpoint" / f"step-{first + 4}")

    restarted = Run(tmp_path, seed=1, exclude_from_loading=[part])
    assert restarted.manager.load() == restarted.state.step == first + 2
    assert restarted.train(first + 4) == expected[2:]
    assert (
        f'exclude_from_loading = ["{part}"] was already applied before step-{first + 2}'
        in caplog.text
    )
    assert f'such as ["{part}", "{part}"]' in caplog.text


def test_data_begun_anew_knows_of_the_steps_before(tmp_path):
    Run(tmp_path).train(2)
    told = []
    for parts in (["dataloader"], ["dataloader", "train_state"], ["optimizer"]):
        run = Run(tmp_path, exclude_from_loading=parts)
        run.loader.begin_at = told.append
        run.manager.load()
        run.manager.roll_back(exclude=("dataloader",))
    assert told == [2, 0]


def test_another_exclusion_or_an_older_checkpoint_counts_anew(tmp_path):
    def place(**checkpoint):
        run = Run(tmp_path, **checkpoint)
        run.manager.load()
        return int(run.loader.state_dict()["rows"][0, 1])

    Run(tmp_path).train(2)
    once, twice = ["dataloader"], ["dataloader", "dataloader"]
    excluding = Run(tmp_path, exclude_from_loading=once)
    excluding.manager.load()
    excluding.train(4)
    assert place() == place(exclude_from_loading=once) == 2
    assert place(exclude_from_loading=twice) == 0
    assert place(exclude_from_loading=once, load_step=2) == 0
    assert place(load_step=2) == 2


def test_what_does_not_fit_tells_how_to_exclude_again(tmp_path):
    Run(tmp_path, exclude_from_loading=["dataloader"]).train(2)
    message = r'global_batch_size is 6.*such as \["dataloader", "dataloader"\]'
    with pytest.raises(CheckpointError, match=message):
        Run(tmp_path, global_batch_size=6, exclude_from_loading=["dataloader"]).manager.load()


def test_another_global_batch_size_is_refused_by_name(tmp_path):
    Run(tmp_path).train(2)
    with pytest.raises(CheckpointError, match=r"4 seq.*training.global_batch_size is 6.*exclude"):
        Run(tmp_path, global_batch_size=6).manager.load()
    assert Run(tmp_path, global_batch_size=6, exclude_from_loading=["dataloader"]).manager.load()


def test_another_seq_len_is_refused_where_documents_were_packed_for_one(tmp_path):
    Run(tmp_path).train(2)
    saved = JobConfig().training.seq_len

    def longer(packing, **checkpoint):
        run = Run(tmp_path, **checkpoint)
        run.config.training.seq_len, run.config.data.packing = 2 * saved, packing
        return run

    assert longer("contiguous").manager.load() == 2
    message = rf"training.seq_len = {saved}, but it is {2 * saved} now.*best_fit.*exclude_from_load"
    with pytest.raises(CheckpointError, match=message):
        longer("best_fit").manager.load()
    assert longer("best_fit", exclude_from_loading=["dataloader"]).manager.load() == 2


def test_packed_documents_keep_their_bos(tmp_path):
    Run(tmp_path).train(2)
    for packing in ("contiguous", "best_fit"):
        run = Run(tmp_path)
        run.config.data.add_bos, run.config.data.packing = True, packing
        if packing == "contiguous":
            assert run.manager.load() == 2
            continue
        with pytest.raises(CheckpointError, match=r"data.add_bos = false, and .*best_fit.*exclude"):
            run.manager.load()


def of_sources(tmp_path, *names, documents=(10, 20), **checkpoint):
    run = Run(tmp_path, **checkpoint)
    run.config.data.sources = [DataSource(name=name, dataset="text") for name in names]
    sizes = zip(names, documents, strict=True)
    told = {"sources": [{"name": name, "documents": size} for name, size in sizes]}
    run.loader.describe = lambda: told
    return run


def test_replica_groups_keep_their_sources(tmp_path):
    of_sources(tmp_path, "a", "b").train(2)
    for names in (("b", "a"), ("a", "c")):
        run = of_sources(tmp_path, *names)
        run.config.fault_tolerance.enable = True
        now = re.escape(json.dumps(names))
        with pytest.raises(
            CheckpointError, match=rf'\["a", "b"\], but they are {now} now.*fault_tol.*exclude'
        ):
            run.manager.load()
    excluding = of_sources(tmp_path, "b", "a", exclude_from_loading=["dataloader"])
    assert excluding.manager.load() == 2


def test_a_loader_is_told_what_it_described(tmp_path):
    of_sources(tmp_path, "a", "b").train(2)
    again, told = of_sources(tmp_path, "a", "b", documents=(1, 2)), []
    again.loader.load_state_dict = told.append
    again.manager.load()
    sources = [{"name": "a", "documents": 10}, {"name": "b", "documents": 20}]
    assert told[0]["described"] == {"sources": sources}


def test_data_of_another_size_is_told(tmp_path, caplog):
    of_sources(tmp_path, "a", "b").train(2)
    of_sources(tmp_path, "a", "b").manager.load()
    excluding = of_sources(
        tmp_path, "a", "b", documents=(1, 2), exclude_from_loading=["dataloader"]
    )
    excluding.manager.load()
    assert "data has changed since" not in caplog.text
    of_sources(tmp_path, "a", "b", documents=(10, 2100)).manager.load()
    [warning] = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "step-2 was saved: b had 20 documents, now 2,100. The run" in warning


def test_a_checkpoint_that_says_nothing_of_the_data_is_resumed(tmp_path, caplog):
    Run(tmp_path).train(2)
    folder = tmp_path / "checkpoint" / "step-2"
    (folder / "config.resolved.toml").unlink()
    old = json.loads((folder / "manifest.json").read_text())
    del old["data"], old["files"]["config.resolved.toml"], old["model"]["seq_len"]
    text = json.dumps(old | {"crc32": "00000000"}, indent=1) + "\n"
    checksum = f"{zlib.crc32(text.encode()):08x}"
    (folder / "manifest.json").write_text(text.replace('"00000000"\n}', f'"{checksum}"\n}}'))
    run = of_sources(tmp_path, "a", "b")
    run.config.data.packing = "best_fit"
    assert run.manager.load() == 2
    assert "data has changed since" not in caplog.text


def test_another_model_is_refused_with_the_difference(tmp_path):
    Run(tmp_path).train(2)
    with pytest.raises(CheckpointError, match=r"step-2 has different shapes.*dim = 4 \(now 8\)"):
        Run(tmp_path, args=TinyArgs(dim=8)).manager.load()
    with pytest.raises(CheckpointError, match=r"lacks .*layers\.2.*n_layers = 2 \(now 3\)"):
        Run(tmp_path, args=TinyArgs(n_layers=3)).manager.load()
    with pytest.raises(CheckpointError, match=r"layers\.1.*does not use.*n_layers = 2 \(now 1\)"):
        Run(tmp_path, args=TinyArgs(n_layers=1)).manager.load()


def test_another_optimizer_is_refused_by_key(tmp_path):
    Run(tmp_path).train(2)
    with pytest.raises(CheckpointError, match=r"lacks optimizer\..*frozen\? .*; .*exclude_from"):
        Run(tmp_path, optimizer="SGD").manager.load()


def test_an_export_has_the_dtype_asked_for_and_cannot_resume(tmp_path):
    run = Run(tmp_path, last_save_model_only=True, export_dtype="bfloat16", steps=4)
    run.loader.describe = lambda: {"sources": [{"name": "a"}]}
    run.loader.has_conversations = True
    run.train(4, last=True)
    manifest = json.loads((tmp_path / "checkpoint" / "step-4" / "manifest.json").read_text())
    assert manifest["model_only"]
    assert manifest["data"] == {"has_conversations": True}  # it has no place in the sources
    with pytest.raises(CheckpointError, match=r"step-4.*cannot resume.*resume from: 2$"):
        Run(tmp_path).manager.load()
    assert Run(tmp_path, load_step=2).manager.load() == 2

    weights = TinyModel(TinyArgs()).load_checkpoint(tmp_path / "checkpoint" / "step-4")
    for name, value in run.model.state_dict().items():
        assert torch.equal(weights.state_dict()[name], value.bfloat16().float())


def test_an_export_rounds_no_buffer(tmp_path):
    def build():
        model = TinyModel(TinyArgs())
        model.register_buffer("bias", torch.full((8,), 1.001))
        return model

    options = {"last_save_model_only": True, "export_dtype": "bfloat16", "steps": 2}
    Run(tmp_path, model=build(), **options).train(2, last=True)
    weights = build()
    weights.bias.zero_()
    weights.load_checkpoint(tmp_path / "checkpoint" / "step-2")
    assert torch.equal(weights.bias, torch.full((8,), 1.001))


def test_a_run_that_was_stopped_early_is_saved_whole(tmp_path):
    Run(tmp_path, last_save_model_only=True, steps=10).train(3, last=True)
    assert Run(tmp_path).manager.load() == 3


def test_initial_load_path_gives_weights_to_a_new_run_only(tmp_path):
    first = Run(tmp_path / "a")
    first.train(2)
    path = str(tmp_path / "a" / "checkpoint" / "step-2")
    second = Run(tmp_path / "b", seed=1, initial_load_path=path)
    assert second.manager.load() == 0
    assert second.state.step == 0
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict())

    second.train(4)
    resumed = Run(tmp_path / "b", initial_load_path=path)
    assert resumed.manager.load() == 4
    torch.testing.assert_close(resumed.model.state_dict(), second.model.state_dict())


def test_a_compiled_model_is_saved_under_its_own_names(tmp_path):
    compiled = torch.compile(TinyModel(TinyArgs()), backend="eager")
    Run(tmp_path, model=compiled).train(2)
    plain = Run(tmp_path)
    assert plain.manager.load() == 2
    for name, value in compiled._orig_mod.state_dict().items():
        assert torch.equal(plain.model.state_dict()[name], value)
    assert Run(tmp_path, model=torch.compile(TinyModel(TinyArgs()))).manager.load() == 2


def test_a_tied_weight_that_is_excluded_is_not_read_under_its_second_name(tmp_path):
    Run(tmp_path, args=TinyArgs(tied=True)).train(2)
    model = Run(tmp_path / "new", seed=1, args=TinyArgs(tied=True)).model
    before = model.output.weight.detach().clone()
    folder = tmp_path / "checkpoint" / "step-2"
    load_weights_of_parts([model], folder, None, exclude="tok_embeddings")
    assert torch.equal(model.output.weight, before)


def test_tied_weights_stay_tied(tmp_path):
    first = Run(tmp_path, args=TinyArgs(tied=True))
    expected = first.train(2)
    expected = first.train(4)
    resumed = Run(tmp_path, seed=1, args=TinyArgs(tied=True), load_step=2)
    resumed.manager.load()
    assert resumed.model.output.weight is resumed.model.tok_embeddings.weight
    assert resumed.train(4) == expected


def test_groups_that_trained_apart_do_not_go_on_together(tmp_path):
    first = Run(tmp_path)
    first.manager._state._stateful["semi_sync"] = first.state
    first.train(2)
    assert Run(tmp_path).manager.load() == 2
    together = Run(tmp_path)
    together.config.fault_tolerance.enable = True
    with pytest.raises(CheckpointError, match="trained apart from the others"):
        together.manager.load()
