"""Checks that a saved run resumes as if it had never stopped, also on another layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan.components.checkpoint.folder import step_folder
from torchtitan.components.checkpoint.model_tensors import model_state
from torchtitan.distributed.dtensor import whole_tensor
from torchtitan.errors import ConfigError
from torchtitan.train import Trainer

from .check import CheckFailedError, Checks, NotApplicableError
from .compare import Difference, compare_tensors
from .layouts import LAYOUTS, PRECISION, REFERENCE, options_of, reference_path
from .reference import (
    LEARNING_RATE,
    STEPS,
    Recording,
    Tensors,
    build_trainer,
    tensors_of,
    train,
    trainer_or_skip,
)
from .subject import Subject
from .verdict import largest_relative, limits

CHECKS = Checks()

SAVED_STEP = STEPS // 2
SAVE = "checkpoints.save"
ONE = "accumulation"
"""The layout of one process, which accumulates gradients over parts of each batch."""
LOADED_ON = (ONE, "tp2", "pp2")
"""Layouts that load what `SAVE` saved."""


def runs_without_a_stop(layout: str, subject: Subject) -> str:
    """Leave a checkpoint from the middle of a run, and the run's recording from there on."""
    trainer = trainer_or_skip(subject, *_options(subject, layout, f"resume_{layout}"))
    recording = train(trainer, observe=False, dropout=True)
    weights, optimizer = _whole(recording.weights), _whole(_optimizer_state(trainer))
    if dist.get_rank() == 0:
        losses = recording.losses[SAVED_STEP:]
        torch.save((losses, weights, optimizer), _straight_path(subject, layout))
    return f"{STEPS} steps, saved after {SAVED_STEP}"


def resumes_bitwise(layout: str, subject: Subject) -> str:
    """Resume that checkpoint: losses, weights and optimizer must equal an uninterrupted run's."""
    options = _options(subject, layout, f"resume_{layout}")
    trainer = trainer_or_skip(subject, *options, f"--checkpoint.load_step={SAVED_STEP}")
    resumed = train(trainer, observe=False, dropout=True)
    losses, weights, optimizer = torch.load(
        _straight_path(subject, layout), mmap=True, weights_only=True
    )
    _require_equal(resumed.weights, weights, "the weight")
    _require_equal(_optimizer_state(trainer), optimizer, "the state")
    if resumed.losses != losses:
        raise CheckFailedError(
            f"the losses after a resume are {resumed.losses}, not {losses}",
            "forward() uses something that checkpoints do not contain: a buffer with "
            "persistent=False that training changes, or an attribute.",
        )
    return f"{len(weights)} tensors of the model, {len(optimizer)} of the optimizer"


_TIMEOUT = 180.0

for _layout, _suffix in ((ONE, ""), ("fsdp2", "_fsdp2")):
    _fields = {"ranks": LAYOUTS[_layout].ranks, "timeout": _TIMEOUT, "quick": not _suffix}
    CHECKS.of(f"checkpoints.run{_suffix}", "a run saves a checkpoint", **_fields)(
        partial(runs_without_a_stop, _layout)
    )
    CHECKS.of(
        f"checkpoints.resume{_suffix}",
        "a run that stops and resumes there ends with the same bits",
        needs=(f"checkpoints.run{_suffix}",),
        **_fields,
    )(partial(resumes_bitwise, _layout))


@CHECKS.of(
    SAVE,
    "four ranks that shard and split the weights save a checkpoint",
    ranks=4,
    timeout=_TIMEOUT,
    quick=False,
    float64=True,
    needs=(PRECISION,),
)
def save(subject: Subject) -> str:
    """Leave a checkpoint of four ranks in `subject.folder`, and its content as whole tensors."""
    reasons = []
    for name in ("fsdp2_tp2", "hsdp2x2"):
        try:
            trainer = build_trainer(subject, *_options(subject, name, "shared"))
            break
        except ConfigError as error:
            reasons.append(str(error))
            if dist.is_initialized():
                raise NotApplicableError(reasons[-1]) from error
    else:
        raise NotApplicableError(reasons[0])
    train(trainer, steps=SAVED_STEP, observe=False)
    full = _whole(tensors_of(trainer))
    if dist.get_rank() == 0:
        torch.save(full, _saved_path(subject))
        for layout in LOADED_ON:  # a folder of checkpoints has one run at a time, but checks do not
            link = step_folder(subject.folder / f"load_{layout}", SAVED_STEP)
            link.parent.mkdir()
            link.symlink_to(step_folder(subject.folder / "shared", SAVED_STEP))
    return f"saved on {name} after step {SAVED_STEP}"


def loads_on(layout: str, subject: Subject) -> str:
    """Resume the checkpoint on other ranks: the weights and the next losses must be the same."""
    options = _options(subject, layout, f"load_{layout}")
    trainer = trainer_or_skip(subject, *options, "--checkpoint.interval=1000")
    saved = torch.load(_saved_path(subject), mmap=True, weights_only=True)
    trainer.checkpointer.load()
    # Buffers that are in no checkpoint are not compared: the next losses show whether they matter.
    wrong, _ = compare_tensors(model_state(trainer.model_parts), saved, tolerance=0.0)
    if wrong:
        raise CheckFailedError(
            f"the checkpoint loaded on {layout} gives a different {wrong[0].name}: "
            f"{wrong[0]}{_others(wrong)}",
            "Parameters must be DTensors whose placements say which part a rank has, and have the "
            "same name and meaning in every layout.",
        )
    resumed = train(trainer, observe=False)
    reference = Recording.load(reference_path(subject))
    error = largest_relative(resumed.losses, reference.losses[SAVED_STEP:])
    different, _ = compare_tensors(
        resumed.weights, reference.weights, limits().weight, LEARNING_RATE * STEPS
    )
    if not error <= limits().loss or different:
        weight = f"; {different[0].name} is off {different[0]}" if different else ""
        raise CheckFailedError(
            f"resumed on {layout} with the weights that were saved, the next losses are off by "
            f"{error:.2g}{weight}",
            "The optimizer's state belongs to other parameters, or forward() uses something that "
            "checkpoints do not contain.",
        )
    return f"weights exact, next losses off by {error:.0e}"


for _layout in LOADED_ON:
    CHECKS.of(
        f"checkpoints.load_{'one' if _layout == ONE else _layout}",
        "that checkpoint resumes here: weights exact, next losses equal to those of one process",
        ranks=LAYOUTS[_layout].ranks,
        timeout=_TIMEOUT,
        quick=False,
        float64=True,
        needs=(SAVE, REFERENCE),
    )(partial(loads_on, _layout))


def _options(subject: Subject, layout: str, folder: str) -> tuple[str, ...]:
    """Return the options of a job that saves checkpoints in a folder of `subject.folder`."""
    return (
        *options_of(LAYOUTS[layout]),
        "--checkpoint.enable",
        f"--checkpoint.folder={subject.folder / folder}",
        f"--checkpoint.interval={SAVED_STEP}",
    )


def _optimizer_state(trainer: Trainer) -> Tensors:
    state = trainer.optimizers.state_dict()
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _whole(tensors: Tensors) -> Tensors:
    return {name: whole_tensor(tensor) for name, tensor in tensors.items()}


def _require_equal(tensors: Tensors, expected: Tensors, kind: str) -> None:
    for name in sorted(tensors.keys() ^ expected.keys()):
        where = "after the resume" if name in tensors else "without a stop"
        raise CheckFailedError(f"{kind} {name} exists only {where}")
    wrong, _ = compare_tensors(tensors, expected, tolerance=0.0)
    if wrong:
        raise CheckFailedError(
            f"after a resume, {kind} {wrong[0].name} differs: {wrong[0]}{_others(wrong)}",
            "Everything that training changes must be a parameter, a persistent buffer or "
            "optimizer state, so that it is saved.",
        )


def _others(differences: list[Difference]) -> str:
    return f"; {len(differences) - 1} others differ too" if len(differences) > 1 else ""


def _straight_path(subject: Subject, layout: str) -> Path:
    return subject.folder / f"straight_{layout}.pt"


def _saved_path(subject: Subject) -> Path:
    return subject.folder / "saved.pt"
