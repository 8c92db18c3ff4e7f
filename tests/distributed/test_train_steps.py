"""What the trainer's steps draw at random, wait for, and leave behind for the next one."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks

from torchtitan import train
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import load_config
from torchtitan.errors import ConfigError, TrainingError
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

CONFIG = [
    *["--training.seq_len=32", "--training.local_batch_size=2", "--training.steps=3"],
    *["--job.custom_import=poisoned_llama", "--model.name=poisoned_llama"],
    *["--activation_checkpoint.mode=none", "--training.mixed_precision_param=float32"],
]
STEPS = (1, 2, 3, 2)  # the last as in a run that goes back, or is resumed
WAIT = 0.02


def draws(folder: str, options: list[str]) -> tuple[list[float], list[float]]:
    """The numbers that the model draws in `STEPS`, and in the validations after them."""
    trainer: Any = Trainer(load_config([*CONFIG, *options, f"--job.dump_folder={folder}"]))
    (model,) = trainer.model_parts
    in_steps: list[float] = []
    in_validations: list[float] = []
    model.register_forward_pre_hook(lambda *_: in_steps.append(torch.rand(()).item()))
    trainer.validator = SimpleNamespace(
        validate=lambda *_: torch.rand(()).item(), close=lambda: None
    )
    trainer.metrics.log_validation = lambda step, loss, extra: in_validations.append(loss)
    next_batch = train.next_batch

    def late_batch(*args: Any) -> Any:
        time.sleep(WAIT)
        return next_batch(*args)

    stop = StopRequest()
    with patch.object(train, "next_batch", late_batch):
        for number, trainer.state.step in enumerate(STEPS):
            torch.rand(number)  # what else the process draws must not matter
            trainer.guard.allows = lambda *args, number=number: number > 0
            trainer.train_step(stop)
            assert not any(name.endswith("tally") and t.any() for name, t in model.named_buffers())
            trainer._validate()
    assert trainer.stats.data_wait >= len(STEPS) * WAIT

    def prompts(*args: Any) -> Any:
        batch = next_batch(*args)
        return batch | {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)}

    with patch.object(train, "next_batch", prompts):
        trainer.train_step(stop)
    *_, (_, loss, grad_norm) = trainer.stats.read(trainer.parallel_dims)
    assert loss == 0 and math.isfinite(grad_norm)  # there is no token to divide by
    if trainer.parallel_dims.tp_enabled:

        def own_batch(*args: Any) -> Any:
            batch = next_batch(*args)
            return batch | {"tokens": batch["tokens"].roll(dist.get_rank(), dims=1)}

        with (
            patch.object(train, "next_batch", own_batch),
            pytest.raises(ConfigError, match="ranks of one data rank were given different batches"),
        ):
            trainer.train_step(stop)
        trainer.evaluate(next_batch(trainer.dataloader, trainer.job_config, 0))
        trainer.agreement._validation_is_first = True
        with pytest.raises(ConfigError, match="build_validator_fn of poisoned_llama: ranks of one"):
            trainer.evaluate(own_batch(trainer.dataloader, trainer.job_config, 0))
    stop.close()
    trainer.close()
    return in_steps, in_validations


LAYOUTS = {
    "fsdp": (["--model.flavor=experts"], False),
    "cp": (["--model.flavor=tiny", "--parallelism.context_parallel_degree=2"], False),
    "tp": (["--model.flavor=tiny", "--parallelism.tensor_parallel_degree=2"], True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_draws_its_own_numbers_on_each_rank_that_has_other_tokens(
    name: str, tmp_path: Path
) -> None:
    options, alike = LAYOUTS[name]
    (one, validation), (two, _) = run_ranks(draws, 2, str(tmp_path), options)
    assert len(set(one[:3])) == 3 and one[3] == one[1]
    assert one == two if alike else not set(one) & set(two)
    assert len(validation) == 4 and len(set(validation)) == 1


def told_of_another_order(folder: str, options: list[str]) -> str:
    """How a run ends if the last rank calls its layers the other way round."""
    config = load_config([*CONFIG, *options, f"--job.dump_folder={folder}"])
    trainer: Any = Trainer(config)
    for part in trainer.model_parts:
        if dist.get_rank() == dist.get_world_size() - 1:
            part.layers = torch.nn.ModuleDict(reversed(part.layers.items()))
    try:
        trainer.train()
    except TrainingError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("steps", [1, 3])
def test_ranks_that_call_their_blocks_in_another_order_are_told(tmp_path: Path, steps: int) -> None:
    """All gathers have the same sizes, so without this the losses are silently wrong."""
    options = ["--model.flavor=tiny", f"--training.steps={steps}"]
    if steps > 1:
        options += ["--checkpoint.enable", "--checkpoint.interval=1"]
    for message in run_ranks(told_of_another_order, 2, str(tmp_path), options):
        assert message.startswith("in step 1, forward() called different modules, or in another")
    assert not list(tmp_path.glob("checkpoint/step-*"))
