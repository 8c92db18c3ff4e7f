"""In which order the trainer does what no quick run shows: beginning, stopping, losing a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch

from torchtitan import train
from torchtitan.config import load_config
from torchtitan.distributed.pipeline_parallel import pipeline_of
from torchtitan.errors import ConfigError
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.train import Trainer


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """It has done 4 steps, has state to save, and saw no trouble."""
    trainer = MagicMock(_can_save=True, first_step=False)
    trainer.state.step = 4
    trainer.guard.troubled = False
    monkeypatch.setattr(train, "on_rank_zero", lambda function, group: function())
    monkeypatch.setattr(train.dist, "get_world_size", lambda: 1)
    return trainer


def names(calls: list[MagicMock]) -> list[str]:
    return [name for name, *_ in calls]


@pytest.mark.parametrize("step", [0, 4])
def test_a_run_begins_from_the_weights_that_all_stages_have(
    step: int, trainer: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage may load no copy of another's weight: Hugging Face files hold a tied one once."""
    warned, described = MagicMock(), MagicMock()
    monkeypatch.setattr(train, "warn_of_initial_weights", warned)
    monkeypatch.setattr(train, "write_description", described)
    trainer.state.step = trainer.checkpointer.load.return_value = step
    trainer.checkpointer.branched = False
    Trainer._begin(trainer)
    assert names(trainer.mock_calls) == [
        *("watch.start", "checkpointer.load", "stage_copies.spread_weights"),
        *("metrics.start", "semi_sync.begin", "replicas.start"),
    ]
    assert trainer.resumed == (step > 0) and warned.called == (step == 0) and described.called
    trainer.metrics.start.assert_called_with(step)
    assert trainer.replicas.start.call_args.args[0] == step
    trainer.checkpointer.branched = True  # what is in the dump folder is not of the steps before
    Trainer._begin(trainer)
    trainer.metrics.start.assert_called_with(0)
    assert trainer.replicas.start.call_args.args[0] == step


def test_a_run_that_is_stopped_before_a_step_saves_it_unless_it_is_saved(
    trainer: MagicMock,
) -> None:
    cases = (Path("step-2"), True), (None, True), (Path("stable"), True), (Path("step-4"), False)
    for newest, saves in cases:
        trainer.reset_mock()
        trainer.checkpointer.newest.return_value = newest
        Trainer._save_before_step(trainer)
        saving = ["_refuse_nonfinite_steps", "checkpointer.save"] if saves else []
        assert names(trainer.mock_calls) == ["checkpointer.wait", "checkpointer.newest", *saving]
    trainer.checkpointer.newest.return_value = None
    Trainer._save_before_step(trainer)
    assert trainer.checkpointer.save.mock_calls == [call(4, last=True)]
    trainer._can_save = False
    Trainer._save_before_step(trainer)
    assert trainer.checkpointer.save.call_count == 1


def test_the_balance_of_experts_is_that_of_all_replica_groups_and_of_steps_that_count(
    trainer: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "clip_grad_norm", MagicMock())
    balance, added = trainer.expert_balance, call.add_up(trainer.replicas.sum)
    for commits, allows, then in (
        (False, True, call.discard()),
        (True, False, call.discard()),
        (True, True, call.step()),
    ):
        trainer.reset_mock()
        trainer.replicas.commit.return_value = commits
        trainer.guard.allows.return_value = allows
        assert Trainer._train_on(trainer, [], torch.tensor(8)) == commits
        assert balance.mock_calls == [added, then]
        taken = [trainer.optimizers.step, trainer.model_converters.post_optimizer_hook]
        for done in (*taken, trainer.semi_sync.count, trainer.stats.add):
            assert done.called == (then == call.step())


@pytest.mark.parametrize("saves", [True, False])
def test_what_the_first_step_shows_is_told_then_alone(
    saves: bool, trainer: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = MagicMock()
    shown = ["warn_of_unequal_gradients", "warn_of_unequal_buffers", "check_optimizer_state"]
    for name in shown:
        monkeypatch.setattr(train, name, getattr(told, name))
    monkeypatch.setattr(train, "clip_grad_norm", MagicMock())
    trainer.first_step, trainer.job_config.checkpoint.enable = True, saves
    for _ in range(2):
        assert Trainer._train_on(trainer, [], torch.tensor(8))
    assert sorted(names(told.mock_calls)) == sorted(shown if saves else shown[:2])


def test_steps_without_labels_are_counted(
    trainer: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "clip_grad_norm", MagicMock())
    trainer.stats.without_labels = 0
    for labels in 0, 8, 0:
        assert Trainer._train_on(trainer, [], torch.tensor(labels))
    assert trainer.stats.without_labels == 2


CHECKS = ["_refuse_nonfinite_steps", "block_calls.compare"]
SAVE, LOG, VALIDATE = "checkpointer.save", "metrics.log", "_validate"
AFTER = {
    "first": (1, {}, [CHECKS[0], LOG, SAVE]),
    "usual": (2, {}, [SAVE]),
    "saved": (3, {}, [*CHECKS, SAVE]),
    "validated": (4, {}, [CHECKS[0], VALIDATE, SAVE]),
    "no validator": (4, {"validator": None}, [SAVE]),
    "logged": (5, {}, [CHECKS[0], LOG, SAVE]),
    "stopping": (8, {"stopping": True}, [*CHECKS, LOG, SAVE]),
    "last": (9, {}, [*CHECKS, LOG, VALIDATE, SAVE]),
    "last, stopping": (9, {"stopping": True}, [*CHECKS, LOG, SAVE, VALIDATE]),
    "troubled": (3, {"troubled": True}, []),
    "last, troubled": (9, {"troubled": True}, [*CHECKS, LOG, VALIDATE, "weights", SAVE]),
    "nothing to save": (9, {"can_save": False}, [*CHECKS, LOG, VALIDATE]),
}


@pytest.mark.parametrize("case", AFTER)
def test_what_follows_a_step(
    case: str, trainer: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It logs every 5, validates every 4, and saves every 3."""
    step, given, expected = AFTER[case]
    stopping = given.get("stopping", False)
    for name in ("highest_of_ranks", "loader_metrics", "loss_metrics"):
        monkeypatch.setattr(train, name, MagicMock())
    monkeypatch.setattr(train, "refuse_nonfinite_weights", trainer.weights)
    config = trainer.job_config
    config.training.steps, config.metrics.log_freq, config.validation.freq = 9, 5, 4
    trainer.state.step, trainer._can_save = step, given.get("can_save", True)
    trainer.guard.troubled = given.get("troubled", False)
    trainer.validator = given.get("validator", trainer.validator)
    trainer.checkpointer.is_due.side_effect = lambda step, last: last or step % 3 == 0
    stats = trainer.stats
    Trainer._after_step(trainer, stopping)
    known = {*CHECKS, SAVE, LOG, VALIDATE, "weights"}
    assert [name for name in names(trainer.mock_calls) if name in known] == expected
    trainer.metrics.show_checkpoint.assert_called_once_with(trainer.checkpointer.last_saved)
    if SAVE in expected:
        trainer.checkpointer.save.assert_called_once_with(step, last=step == 9 or stopping)
    assert (trainer.stats is stats) == (LOG not in expected)
    if LOG in expected:
        told = trainer.metrics.log.call_args.kwargs
        assert (told["loss"], told["max_loss"]) == (stats.mean_loss, stats.max_loss)
        assert told["tokens_seen"] is trainer.state.tokens_seen


def test_a_metrics_processor_or_pipeline_of_another_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As upstream's are, which have other methods; else each would fail at its first use."""

    class Other:
        def log(self) -> None: ...

    spec = replace(get_train_spec("llama3", "debugmodel"), build_metrics_processor_fn=Other)
    monkeypatch.setattr(Other, "__init__", lambda self, *args: None)
    config = load_config(["--model.name=llama3", "--model.flavor=debugmodel"])
    monkeypatch.setattr(train, "fitting_model", lambda *_: (spec, spec.model_args, None))
    lacks = "start, pause, log_validation, show_checkpoint, close, flops_per_token; see"
    maker = "build_metrics_processor_fn of llama3"
    with pytest.raises(ConfigError, match=f"^{maker} returns Other, which has no {lacks} "):
        Trainer(config)

    lacks = "model_parts, forward_backward, evaluate. Return what .*build_pipeline returns"
    with pytest.raises(ConfigError, match=f"^pipeline_fn of llama3 returns tuple, .* no {lacks}"):
        pipeline_of(("schedule", [], True, False), config)
