"""Choose the checkpoint that a run resumes from.

By default this is the newest complete one, which must be of the same model. Two config keys,
`load_step` and `exclude_from_loading`, change that. Each applies once: a checkpoint that was saved
with the same value has already applied it. Otherwise every restart of a long run would go back
again. With `load_step = 2` and saves every 2 steps, a run starts from step-2; restarted after
step-6, it resumes from step-6, not from step-2.

A run without checkpoints of its own may branch (`initial_load_model_only = false`): it goes on from
the checkpoint of `initial_load_path`, which may be another run's, as if that were in its folder.
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
from torchtitan.config.checkpoint import Checkpoint
from torchtitan.config.load import fail
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
from .huggingface import initial_load_path
from .manifest import Manifest
from .model_identity import describe_model, model_differences
from .owner import refuse_live_owner
from .storage import StoragePath, storage_path

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
            checkpoint of the run, or from that of `checkpoint.load_step`, or from the one that it
            branches from; the message lists the differences. Or another process of this machine
            saves into the folder. Or the run cannot branch from an export or a damaged checkpoint.
        ConfigError: on all ranks: the run branches, and has no steps left.
        OutageError: on all ranks: the checkpoints cannot be read.
    """
    checkpoint = job_config.checkpoint
    if checkpoint.enable or not checkpoint.initial_load_model_only:
        on_rank_zero(lambda: _check_folders(job_config, args, tokenizer), group)


def _check_folders(job_config: JobConfig, args: Any, tokenizer: Any) -> None:
    checkpoint, root = job_config.checkpoint, checkpoint_root(job_config)
    own: list[StoragePath] = []
    if checkpoint.enable:
        refuse_live_owner(root)
        own = _in_turn(root, checkpoint.load_step)
    model = describe_model(job_config, args, tokenizer)
    if not (own or checkpoint.initial_load_model_only):
        _check_parent(job_config, model)
        return
    for folder in own:
        manifest = manifest_if_whole(folder)
        if manifest is not None and not manifest.model_only:
            way_out = "start a new run in another job.dump_folder; checkpoint.initial_load_path "
            way_out += "gives it weights"
            _refuse_other_model(folder, manifest.model, model, way_out)
            return
    _tell_of_checkpoints_above(root, job_config)
    # Nothing to resume from, or damage, which loading reports.


def _check_parent(job_config: JobConfig, model: dict[str, Any]) -> None:
    """Refuse a checkpoint that the run cannot branch from. `model`: see `describe_model`."""
    config = job_config.checkpoint
    folder = storage_path(config.initial_load_path)
    manifest = Manifest.read_whole(folder)
    way_out = "set checkpoint.initial_load_model_only = true to start at step 0 with its weights"
    if manifest.model_only:
        raise CheckpointError(
            f"{folder} holds only the model, so this run cannot branch from it. Take another "
            f"checkpoint, or {way_out}"
        )
    _refuse_other_model(folder, manifest.model, model, way_out)
    step = 0 if "train_state" in config.exclude_from_loading else manifest.step
    if step >= job_config.training.steps:
        problem = f"no step is left to train, since this run goes on from step {step}: {folder}"
        fail(job_config, "training.steps", problem)


def _refuse_other_model(
    folder: StoragePath, saved: dict[str, Any], model: dict[str, Any], way_out: str
) -> None:
    if found := told(model_differences(saved, model)):
        lines = "\n  ".join(["", *found])
        raise CheckpointError(
            f"{folder} is of another model, so this run cannot resume from it:{lines}\nRestore "
            f"the model, or {way_out}"
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


def parts_to_exclude(
    checkpoint: OpenCheckpoint, job_config: JobConfig
) -> tuple[Sequence[str], str]:
    """Return the parts of `checkpoint.exclude_from_loading` to reset, or none and the reason.

    If the run that saved the checkpoint had the same value, that run has reset the parts, or
    continued from one that had. A run that branches from it has not.
    """
    parts = job_config.checkpoint.exclude_from_loading
    applied = checkpoint.config.get("checkpoint", {}).get("exclude_from_loading")
    if not parts or applied != parts or branches_from(checkpoint.folder, job_config):
        return parts, ""
    return [], (
        f"checkpoint.exclude_from_loading = {_shown(parts)} was already applied before "
        f"{checkpoint.folder.name} was saved, so these parts are loaded as trained since. To reset "
        f"them again, write the key differently, such as {_shown([*parts, parts[-1]])}"
    )


def branches_from(folder: StoragePath, job_config: JobConfig) -> bool:
    """Return whether the run of `job_config` begins with the checkpoint `folder` by branching."""
    config = job_config.checkpoint
    return not config.initial_load_model_only and folder == initial_load_path(job_config)


def tell_resumed(
    checkpoint: OpenCheckpoint, job_config: JobConfig, exclude: Collection[str]
) -> None:
    """Log which checkpoint a run resumes from, and changes of its config that are overlooked.

    Args:
        exclude: parts of the state that were not loaded.
    """
    saved, step = checkpoint.config, checkpoint.manifest.step
    branches = branches_from(checkpoint.folder, job_config)
    done, changes = "branched" if branches else "resumed", describe_changes(saved, job_config)
    logger.info("%s from %s%s", done, checkpoint.folder, changes)
    jump = "" if "lr_scheduler" in exclude else describe_jump_of_lr(saved, job_config, step)
    other_start = "" if branches else describe_other_start(saved, job_config)
    for warning in filter(None, (jump, other_start)):
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
    """Return a warning if the job names another start than the one that the resumed run had."""
    was, defaults = saved.get("checkpoint", {}), Checkpoint()
    for key in ("initial_load_path", "initial_load_in_hf", "initial_load_model_only"):
        value = getattr(job_config.checkpoint, key)
        is_set = value != getattr(defaults, key)
        if is_set and was.get(key, value) not in (value, hide_secrets(str(value))):
            return (
                f"checkpoint.{key} = {_shown(value)} has no effect, since the run resumes from a "
                "checkpoint of its own. To start from these weights, choose another job.dump_folder"
            )
    return ""


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)
