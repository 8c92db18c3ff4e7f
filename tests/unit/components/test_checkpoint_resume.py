"""The model must be the same when a run is resumed; what else changed is shown."""

import dataclasses
import logging
import shutil
import tomllib

import own_parts_llama
import pytest
from checkpoint_run import Run, TinyArgs, world_of_one  # noqa: F401

from torchtitan.components.checkpoint.resume import (
    check_resume,
    describe_jump_of_lr,
    describe_other_start,
)
from torchtitan.components.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig, to_toml
from torchtitan.errors import CheckpointError
from torchtitan.protocols.train_spec import MODEL_REGISTRY, get_train_spec


def config_of(tmp_path, **checkpoint):
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    for key, value in ({"enable": True} | checkpoint).items():
        setattr(config.checkpoint, key, value)
    return config


@pytest.fixture
def saved(tmp_path):
    Run(tmp_path).train(4)
    return tmp_path


def test_the_same_model_is_resumed(saved):
    check_resume(config_of(saved), TinyArgs())


def test_each_difference_has_a_line(saved):
    config = config_of(saved)
    config.model.flavor = "large"
    with pytest.raises(CheckpointError) as error:
        check_resume(config, TinyArgs(dim=8, n_layers=3))
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{saved}/checkpoint/step-4 is of another model")
    assert lines[1:4] == [
        "  model.flavor = debugmodel (now large)",
        "  dim = 4 (now 8)",
        "  n_layers = 2 (now 3)",
    ]
    assert "initial_load_path" in lines[4]


def test_only_a_checkpoint_that_would_be_resumed_counts(saved, tmp_path):
    other = TinyArgs(dim=8)
    check_resume(config_of(saved, enable=False), other)
    check_resume(config_of(saved / "new"), other)
    with pytest.raises(CheckpointError, match="step-2 is of another model"):
        check_resume(config_of(saved, load_step=2), other)
    for step in (2, 4):
        (saved / "checkpoint" / f"step-{step}" / ".metadata").unlink()
    check_resume(config_of(saved), other)  # `load` will tell that all are damaged


def test_a_replica_group_tells_of_checkpoints_where_it_looked_before(saved, caplog):
    folder = saved / "checkpoint"
    config = config_of(saved, folder=str(folder))
    check_resume(config, TinyArgs())
    assert not caplog.records
    config.fault_tolerance.enable = True
    check_resume(config, TinyArgs())
    assert f"no checkpoints in {folder}/replica-0. {folder} has step-4" in caplog.text
    caplog.clear()
    (folder / "replica-0").mkdir()
    (folder / "step-4").rename(folder / "replica-0" / "step-4")
    check_resume(config, TinyArgs())
    assert not caplog.records


def test_load_step_that_has_counted_is_checked_where_the_run_goes_on(saved):
    run = Run(saved, load_step=2)
    run.manager.load()
    run.train(6)
    with pytest.raises(CheckpointError, match="step-6 is of another model"):
        check_resume(config_of(saved, load_step=2), TinyArgs(dim=8))


@dataclasses.dataclass
class Later(TinyArgs):
    """With options that the code did not have when the checkpoint was saved."""

    depth: int = 0
    window: int | None = None
    names: tuple[str, ...] = ()


def test_an_option_that_is_off_may_have_been_added_since(saved):
    check_resume(config_of(saved), Later())
    with pytest.raises(CheckpointError, match=r"depth = None \(now 2\)"):
        check_resume(config_of(saved), Later(depth=2))
    with pytest.raises(CheckpointError, match=r"dim = 4 \(now 0\)"):
        check_resume(config_of(saved), Later(dim=0))


@dataclasses.dataclass
class Nested(TinyArgs):
    attention: str = "sdpa"
    moe: TinyArgs = dataclasses.field(default_factory=TinyArgs)


def test_nested_args_are_named_and_how_attention_is_computed_is_no_other_model(tmp_path):
    Run(tmp_path, args=Nested()).train(2)
    check_resume(config_of(tmp_path), Nested(attention="flex"))
    with pytest.raises(CheckpointError, match=r"\n  moe\.dim = 4 \(now 8\)\n"):
        check_resume(config_of(tmp_path), Nested(moe=TinyArgs(dim=8)))


@dataclasses.dataclass
class Balanced(TinyArgs):
    use_bias: bool = True
    aux_loss_weight: float = 0.01
    z_loss_weight: float = 0.0


def test_how_strongly_experts_are_balanced_may_change_but_not_whether(tmp_path):
    Run(tmp_path, args=Balanced()).train(2)
    check_resume(config_of(tmp_path), Balanced(aux_loss_weight=0.02))
    check_resume(config_of(tmp_path), Balanced(z_loss_weight=0.02))
    check_resume(config_of(tmp_path), Balanced(aux_loss_weight=0, z_loss_weight=0.02))
    with pytest.raises(CheckpointError, match=r"\n  aux_loss_weight = 0\.01 \(now 0\)\n"):
        check_resume(config_of(tmp_path), Balanced(aux_loss_weight=0))
    with pytest.raises(CheckpointError, match=r"\n  use_bias = True \(now False\)\n"):
        check_resume(config_of(tmp_path), Balanced(use_bias=False))


def test_of_a_tokenizer_its_files_count_and_not_their_place(tmp_path):
    files = tmp_path / "tokenizer"
    files.mkdir()
    (files / "tokenizer.json").write_text("{}")
    tokenizer = object.__new__(HuggingFaceTokenizer)  # its files need not make one here
    tokenizer.path = str(files)
    Run(tmp_path, tokenizer=tokenizer).train(2)
    config = config_of(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.tokenizer_path = .*tokenizer \(now bytes\)"):
        check_resume(config, TinyArgs(), tokenizer=BytesTokenizer())
    tokenizer.path = str(shutil.copytree(files, tmp_path / "copy"))
    check_resume(config, TinyArgs(), tokenizer=tokenizer)
    (files / "tokenizer.json").write_text('{"added": 1}')
    tokenizer.path = str(files)
    with pytest.raises(CheckpointError, match="with other files"):
        check_resume(config, TinyArgs(), tokenizer=tokenizer)


def test_an_authors_tokenizer_is_known_by_its_ids_and_its_fingerprint(tmp_path):
    Run(tmp_path, tokenizer=own_parts_llama.Letters()).train(2)
    config = config_of(tmp_path)
    check_resume(config, TinyArgs(), tokenizer=own_parts_llama.Letters())
    with pytest.raises(CheckpointError, match=r"tokenizer_path = .*'Letters'.* \(now bytes\)"):
        check_resume(config, TinyArgs(), tokenizer=BytesTokenizer())
    other = own_parts_llama.Letters()
    other.fingerprint = "other letters"
    with pytest.raises(CheckpointError, match=r"\(now .*'other letters'"):
        check_resume(config, TinyArgs(), tokenizer=other)


def test_the_configuration_is_in_the_checkpoint_and_its_changes_are_shown(saved, caplog):
    caplog.set_level(logging.INFO, "torchtitan")
    Run(saved).manager.load()
    assert "configuration has changed" not in caplog.text
    caplog.clear()
    Run(saved, steps=20, keep_latest_k=3).manager.load()
    [message] = [r.getMessage() for r in caplog.records if "resumed" in r.getMessage()]
    assert message.splitlines() == [
        f"resumed from {saved}/checkpoint/step-4. The configuration has changed since:",
        "  training.steps = 20 (was 10)",
        "  checkpoint.keep_latest_k = 3 (was 10)",
    ]


def test_another_password_is_no_change(tmp_path, caplog):
    caplog.set_level(logging.INFO, "torchtitan")
    for password in ("hunter2", "hunter3"):
        run = Run(tmp_path)
        run.config.training.dataset_path = f"sftp://me:{password}@host/a"
        run.manager.load()
        run.train(4)
    assert "resumed from" in caplog.text and "has changed" not in caplog.text


def test_a_jump_of_the_learning_rate_is_told():
    config = JobConfig()
    config.training.steps, config.lr_scheduler.warmup_steps, config.optimizer.lr = 14, 4, 1e-3
    saved = tomllib.loads(to_toml(config))
    assert describe_jump_of_lr(saved, config, 14) == ""
    config.optimizer.lr = 5e-4  # on purpose: it has its line in the list of changes
    assert describe_jump_of_lr(saved, config, 14) == ""
    config.training.steps = 24
    assert describe_jump_of_lr(saved, config, 2) == ""  # both warm up
    assert describe_jump_of_lr(saved, config, 14) == (
        "The learning rate schedule has changed: the learning rate goes from 0.0001 at step 14 to "
        "0.00025 at step 15"
    )
    config.lr_scheduler.total_steps = 14
    assert describe_jump_of_lr(saved, config, 14) == ""
    assert describe_jump_of_lr({}, config, 14) == ""


def test_initial_weights_that_a_resumed_run_ignores_are_told():
    config = JobConfig()
    config.checkpoint.initial_load_path = "base/checkpoint/step-8"
    saved = {"checkpoint": {"initial_load_path": "base/checkpoint/step-8"}}
    assert describe_other_start({}, config) == describe_other_start(saved, config) == ""
    saved["checkpoint"]["initial_load_path"] = ""
    assert describe_other_start(saved, config).startswith(
        'checkpoint.initial_load_path = "base/checkpoint/step-8" has no effect, since'
    )


def test_a_branch_of_a_run_that_has_checkpoints_is_told():
    config = JobConfig()
    config.checkpoint.initial_load_path = "base/checkpoint/step-8"
    config.checkpoint.initial_load_model_only = False
    saved = {"checkpoint": {"initial_load_path": "base/checkpoint/step-8"}}
    saved["checkpoint"]["initial_load_model_only"] = False
    assert describe_other_start(saved, config) == ""
    saved["checkpoint"]["initial_load_model_only"] = True
    assert describe_other_start(saved, config).startswith(
        "checkpoint.initial_load_model_only = false has no effect, since"
    )


def test_no_jump_is_told_of_a_schedule_of_the_models_own(monkeypatch):
    config = JobConfig()
    config.training.steps, config.lr_scheduler.warmup_steps = 14, 4
    saved = tomllib.loads(to_toml(config))
    config.training.steps = 24
    assert describe_jump_of_lr(saved, config, 14)
    spec = get_train_spec(config.model.name, config.model.flavor)
    own = dataclasses.replace(spec, build_lr_scheduler_fn=lambda *of: None)
    monkeypatch.setitem(MODEL_REGISTRY, config.model.name, lambda flavor: own)
    assert describe_jump_of_lr(saved, config, 14) == ""


def test_it_is_told_of_the_step_that_is_resumed(saved, caplog):
    def schedule(run):
        run.config.lr_scheduler.warmup_steps = 0
        return run

    shutil.rmtree(saved)
    schedule(Run(saved)).train(4)
    schedule(Run(saved, steps=40)).manager.load()
    assert "the learning rate goes from" in caplog.text
    caplog.clear()
    schedule(Run(saved, steps=40, exclude_from_loading=["lr_scheduler"])).manager.load()
    assert "the learning rate goes from" not in caplog.text
