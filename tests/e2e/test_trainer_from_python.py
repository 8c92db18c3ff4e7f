"""`Trainer` within a program: one after the other, whatever became of the one before."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_llama
import torch
import torch.distributed as dist
from harness import read_lines, run_ranks

from torchtitan.config import JobConfig, load_config
from torchtitan.config.optimizer import ParamRule
from torchtitan.errors import CheckpointError, ConfigError
from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.runtime import process_group
from torchtitan.train import Trainer


def config_of(folder: Path, *options: str) -> JobConfig:
    options = ("--training.steps=2", *options, f"--job.dump_folder={folder}")
    return load_config([*tiny_llama.OPTIONS, *options])


def fail_and_train(folder: Path) -> None:
    before = threading.enumerate()

    # With values that the command line would refuse.
    config = config_of(folder / "values")
    config.training.seq_len = "64"
    with pytest.raises(ConfigError, match=r"^training.seq_len: must be an integer, not '64'"):
        Trainer(config)
    config = config_of(folder / "values")
    config.optimizer.learning_rate = 1e-3
    with pytest.raises(ConfigError, match=r"^optimizer.learning_rate: unknown key"):
        Trainer(config)
    config = config_of(folder / "values")
    config.optimiser = config.optimizer
    with pytest.raises(ConfigError, match=r"^optimiser: unknown section. Did you mean 'optimizer'"):
        Trainer(config)

    # In the set-up, after the process has joined its group.
    config = config_of(folder / "set_up")
    config.optimizer.rules = [ParamRule("nothing", lr_scale=0.5)]
    with pytest.raises(ConfigError, match="matches no parameter"):
        Trainer(config)

    # With a part that is refused because it cannot be closed.
    spec = replace(tiny_llama.get_train_spec("tiny"), build_dataloader_fn=lambda *_: iter([]))
    register_train_spec("unclosed", lambda flavor: spec)
    with pytest.raises(ConfigError, match=r"build_dataloader_fn of unclosed .* has no close"):
        Trainer(config_of(folder / "unclosed", "--model.name=unclosed"))

    # Before the first step.
    config = config_of(folder / "load", "--checkpoint.enable", "--checkpoint.load_step=7")
    with pytest.raises(CheckpointError, match="there is no"):
        Trainer(config).train()
    assert not dist.is_initialized() and threading.enumerate() == before

    # On a GPU too: it is alone in its group, so nothing can hang.
    trainer = Trainer(config_of(folder / "gpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "device_type", lambda: "cuda")
        trainer.close(failed=True)
    assert not dist.is_initialized()

    # One part fails to close: the others are closed all the same.
    trainer = Trainer(config_of(folder / "close"))
    trainer.replicas.close = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not dist.is_initialized() and threading.enumerate() == before

    # Two at a time, as where a cell of a notebook is run again.
    first = Trainer(config_of(folder / "first"))
    with pytest.raises(RuntimeError, match=r"another Trainer's with its train\(\) or close\(\)"):
        Trainer(config_of(folder / "second"))
    assert first.train() and threading.enumerate() == before
    with pytest.raises(RuntimeError, match="this trainer is closed"):
        first.train()

    # In another thread, to which Python gives no signals.
    finished = []
    trainer = Trainer(config_of(folder / "thread"))
    first.close()  # which was over before
    thread = threading.Thread(target=lambda: finished.append(trainer.train()))
    thread.start()
    thread.join()
    assert finished == [True]
    lines = [(folder / name / "metrics.jsonl").read_text() for name in ("first", "thread")]
    assert len({line.partition('"max_loss"')[0] for line in lines}) == 1


def test_a_trainer_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    run_ranks(fail_and_train, 1, tmp_path)


class LosesSteps:
    """A replica group's `should_commit` that is False for the first and third step that it ends."""

    def __init__(self) -> None:
        self.answers = iter([False, True, False])

    def start_quorum(self) -> None:
        pass

    def should_commit(self) -> bool:
        return next(self.answers, True)

    def errored(self) -> None:
        pass

    def num_participants(self) -> int:
        return 1

    def allreduce(self, tensor: torch.Tensor, reduce_op: object) -> dist.Work:
        return dist.all_reduce(tensor, async_op=True)

    def shutdown(self, wait: bool) -> None:
        pass


def lose_steps(folder: Path) -> None:
    lr = "--lr_scheduler.warmup_steps=2", "--lr_scheduler.decay_ratio=0"
    trainer = Trainer(config_of(folder, *lr, "--training.skip_batches=2", "--training.steps=3"))
    trainer.replicas._manager = LosesSteps()
    step, taken = trainer.optimizers.step, []
    trainer.optimizers.step = lambda: (step(), taken.append(trainer.state.step))
    assert trainer.train() and taken == [1, 3]
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["steps_skipped"] for line in lines] == [0, 1, 1]
    assert [line["lr"] / lines[1]["lr"] for line in lines] == [0.5, 1, 1]
    of_a_step = lines[0]["tokens_seen"]
    assert [line["tokens_seen"] for line in lines] == [of_a_step, of_a_step, 2 * of_a_step]


def test_a_lost_step_is_repeated_and_counts_once(tmp_path: Path) -> None:
    run_ranks(lose_steps, 1, tmp_path)
