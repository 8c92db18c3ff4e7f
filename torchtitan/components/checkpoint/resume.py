"""Choose the checkpoint that a run resumes from.

By default this is the newest complete one, which must be of the same model. Two config keys,
`load_step` and `exclude_from_loading`, change that. Each applies once: a checkpoint that was saved
with the same value has already applied it. Otherwise every restart of a long run would go back
again. With `load_step = 2` and saves every 2 steps, a run starts from step-2; restarted after
step-6, it resumes from step-6, not from step-2.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from torchtitan.components.lr_scheduler import build_lr_scheduler, schedule_of
from torchtitan.components.run_folder import config_to_keep
from torchtitan.config.lr_scheduler import LRScheduler
from torchtitan.errors import CheckpointError, DamagedCheckpointError
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.tools.differences import nested_differences, told
from torchtitan.tools.logging import logger
from torchtitan.tools.secrets import hide_secrets

from .folder import (
    checkpoint_root,
    is_resumable,
    list_checkpoints,
    manifest_if_whole,
    restore_replaced,
    step_folder,
    step_of,
)
from .manifest import Manifest
from .model_identity import describe_model, model_differences
from .owner import refuse_live_owner
from .storage import StoragePath

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

    from .opened import OpenCheckpoint
    from .series import CheckpointSeries


def check_resume(
    job_config: JobConfig,
    args: Any,
    group: dist.ProcessGroup | None = None,
    tokenizer: Any = None,
) -> None:
    """Refuse a checkpoint of another model or of a live run, before memory is allocated.

    Rank 0 of `group`, which holds all ranks, checks for all; None: there is only this process.

    Raises:
        CheckpointError: on all ranks: name, flavor, args or tokenizer differ from the newest
            checkpoint of the run, or from that of `checkpoint.load_step`; the message lists the
            differences. Or another process of this machine saves into the folder.
        OutageError: on all ranks: the checkpoints cannot be read.
    """
    if job_config.checkpoint.enable:
        on_rank_zero(lambda: _check_folder(job_config, args, tokenizer), group)


def _check_folder(job_config: JobConfig, args: Any, tokenizer: Any) -> None:
    root, step = checkpoint_root(job_config), job_config.checkpoint.load_step
    refuse_live_owner(root)
    for folder in _in_turn(root, step):
        manifest = manifest_if_whole(folder)
        if manifest is not None and not manifest.model_only:
            break
    else:
        _tell_of_checkpoints_above(root, job_config)
        return  # nothing to resume from, or damage, which loading reports
    found = told(model_differences(manifest.model, describe_model(job_config, args, tokenizer)))
    if found:
        lines = "\n  ".join(["", *found])
        raise CheckpointError(
            f"{folder} is of another model, so this run cannot resume from it:{lines}\nRestore "
            "the model, or start a new run in another job.dump_folder; "
            "checkpoint.initial_load_path gives it weights"
        )


def _tell_of_checkpoints_above(root: StoragePath, job_config: JobConfig) -> None:
    """Warn if a replica group finds no checkpoints, but the folder that the user named has some."""
    replicas = job_config.fault_tolerance
    if not replicas.enable or root.name != replicas.replica or list_checkpoints(root):
        return
    others = list_checkpoints(root.parent)
    if others:
        logger.warning(
            "this replica group starts at step 0, since there are no checkpoints in %s. %s has "
            "%s, which is not resumed. If it is this group's own, move it to %s and start again",
            *(root, root.parent, others[-1].name, root),
        )


def folders_to_resume(root: StoragePath, load_step: int) -> list[StoragePath]:
    """Return checkpoints in order of preference; the run resumes from the first good one.

    With `load_step` -1 they are all, newest first. Otherwise they are those saved since the run
    went back to `load_step`, newest first, and finally that step itself.
    """
    restore_replaced(root)
    return _in_turn(root, load_step)


def _in_turn(root: StoragePath, load_step: int) -> list[StoragePath]:
    newest_first = list_checkpoints(root)[::-1]
    if load_step == -1:
        return newest_first
    since = _saved_since(newest_first, load_step)
    asked_for = step_folder(root, load_step)
    return since + [path for path in newest_first if path == asked_for and path not in since]


def _saved_since(newest_first: list[StoragePath], load_step: int) -> list[StoragePath]:
    """Return the newest checkpoints of runs with this `load_step`, and damaged ones between."""
    since: list[StoragePath] = []
    damaged: list[StoragePath] = []
    for folder in newest_first:
        try:
            manifest = Manifest.read_whole(folder)
            saved = manifest.read_config(folder)
        except DamagedCheckpointError:
            damaged.append(folder)
            continue
        if manifest.model_only:
            continue
        if saved.get("checkpoint", {}).get("load_step") != load_step:
            break
        since += [*damaged, folder]
        damaged = []
    return since


def gone_on_since(folder: StoragePath, in_turn: list[StoragePath], load_step: int) -> str:
    """Return why a run resumes from `folder` instead of `load_step`, or "" if it does not.

    `in_turn`: see `folders_to_resume`.
    """
    names = [path.name for path in in_turn]
    asked_for = f"step-{load_step}"
    if load_step == -1 or folder.name == asked_for:
        return ""
    note = (
        f"checkpoint.load_step = {load_step} was already applied before {folder.name} was saved, "
        "so the run resumes from that checkpoint"
    )
    if asked_for not in names:
        return note
    since = ", ".join(name for name in names if name != asked_for)
    return f"{note}. To go back to {asked_for} again, first move or delete {since}"


def steps_to_resume(series: CheckpointSeries) -> str:
    """Return a sentence that lists the steps of resumable checkpoints."""
    steps = sorted(
        step_of(path)
        for path in list_checkpoints(series.root)
        if path.name not in series.damaged and is_resumable(path)
    )
    return f"Steps to resume from: {', '.join(map(str, steps)) or '(none)'}"


def parts_to_exclude(checkpoint: OpenCheckpoint, parts: Sequence[str]) -> tuple[Sequence[str], str]:
    """Return the parts of `checkpoint.exclude_from_loading` to reset, or none and the reason.

    If the run that saved the checkpoint had the same value, that run has reset the parts, or
    continued from one that had.

    Args:
        parts: value of the key.
    """
    applied = checkpoint.config.get("checkpoint", {}).get("exclude_from_loading")
    if not parts or applied != parts:
        return parts, ""
    return [], (
        f"checkpoint.exclude_from_loading = {_shown(parts)} was already applied before "
        f"{checkpoint.folder.name} was saved, so these parts are loaded as trained since. To reset "
        f"them again, write the key differently, such as {_shown([*parts, parts[-1]])}"
    )


def tell_resumed(
    checkpoint: OpenCheckpoint, job_config: JobConfig, exclude: Collection[str]
) -> None:
    """Log which checkpoint a run resumes from, and changes of its config that are overlooked.

    Args:
        exclude: parts of the state that were not loaded.
    """
    saved, step = checkpoint.config, checkpoint.manifest.step
    logger.info("resumed from %s%s", checkpoint.folder, describe_changes(saved, job_config))
    jump = "" if "lr_scheduler" in exclude else describe_jump_of_lr(saved, job_config, step)
    for warning in filter(None, (jump, describe_other_start(saved, job_config))):
        logger.warning("%s", warning)


def describe_changes(saved: dict[str, Any], job_config: JobConfig) -> str:
    """Return the end of a sentence on how the run's config differs from that of a checkpoint."""
    if not saved:
        return ", whose configuration is not known"
    changes = nested_differences(saved, tomllib.loads(config_to_keep(job_config)))
    lines = [f"\n  {name} = {_shown(now)} (was {_shown(was)})" for name, was, now in changes]
    return f". The configuration has changed since:{''.join(lines)}" if lines else ""


def describe_jump_of_lr(saved: dict[str, Any], job_config: JobConfig, step: int) -> str:
    """Return a warning if the learning rate jumps after `step` because the schedule changed.

    Changing `training.steps` changes the whole schedule, which is easily overlooked. Only for the
    schedule of `[lr_scheduler]`: a model's own may be any function.

    Args:
        saved: config of the checkpoint of `step`.
    """
    spec = train_spec_of(job_config)
    if spec.build_lr_scheduler_fn is not build_lr_scheduler:
        return ""
    try:
        names = {field.name for field in fields(LRScheduler)}
        was = {key: value for key, value in saved["lr_scheduler"].items() if key in names}
        before = schedule_of(LRScheduler(**was), saved["training"]["steps"])
        peak = saved["optimizer"]["lr"]
    except KeyError:  # the config is missing or of another version
        return ""
    after = schedule_of(job_config.lr_scheduler, job_config.training.steps)
    if step == 0 or abs(before(step) - after(step)) < 0.01:
        return ""
    return (
        "The learning rate schedule has changed: the learning rate goes from "
        f"{peak * before(step - 1):.2g} at step {step} to "
        f"{job_config.optimizer.lr * after(step):.2g} at step {step + 1}"
    )


def describe_other_start(saved: dict[str, Any], job_config: JobConfig) -> str:
    """Return a warning if the job names initial weights that the resumed run did not start from."""
    was = saved.get("checkpoint", {})
    for key in ("initial_load_path", "initial_load_in_hf"):
        value = getattr(job_config.checkpoint, key)
        if value and was.get(key, value) not in (value, hide_secrets(str(value))):
            return (
                f"checkpoint.{key} = {_shown(value)} has no effect, since the run resumes from a "
                "checkpoint of its own. To start from these weights, choose another job.dump_folder"
            )
    return ""


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
