"""Which checkpoint a run resumes from, and whether it is of the same model, as it must be.

What else has changed is shown.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from torchtitan.config import to_toml
from torchtitan.errors import CheckpointError, DamagedCheckpointError
from torchtitan.tools.run_folder import CONFIG_FILE

from .agreement import on_rank_zero
from .folder import (
    is_resumable,
    list_checkpoints,
    restore_replaced,
    step_folder,
    step_of,
)
from .huggingface import TOKENIZER_FILES, TRAINING_ONLY
from .manifest import Manifest, nested_differences, plain_args
from .owner import refuse_live_owner
from .patience import parse_again
from .storage import StoragePath, is_url, storage_path

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


_WITH_BUFFERS = ("aux_loss_weight", "use_bias")


def checkpoint_root(job_config: JobConfig) -> StoragePath:
    """The folder of the run's checkpoints; a replica group has its own, also behind a URL.

    Raises:
        ConfigError: nothing is known of such URLs.
    """
    folder = job_config.checkpoint.folder
    if is_url(folder):
        replica = job_config.fault_tolerance
        own = f"/replica-{replica.replica_id}" if replica.enable else ""
        return storage_path(f"{folder.rstrip('/')}{own}")
    return Path(job_config.job.dump_folder, folder)


def describe_model(job_config: JobConfig, args: Any) -> dict[str, Any]:
    """What a manifest says of the model, as JSON gives it back."""
    tokenizer = job_config.model.tokenizer_path
    return {
        "name": job_config.model.name,
        "flavor": job_config.model.flavor,
        "args": plain_args(args),
        "tokenizer": _absolute(tokenizer),
        "tokenizer_sha256": _tokenizer_digest(tokenizer),
        "seq_len": job_config.training.seq_len,
    }


def check_resume(job_config: JobConfig, args: Any, group: dist.ProcessGroup | None = None) -> None:
    """Refuse, before memory is taken, to go on from a checkpoint of another model, or of a run
    that is still at work.

    Rank 0 of `group`, which all ranks are in, looks for the others too; None: there is only this
    process.

    Raises:
        CheckpointError: on all ranks: name, flavor, args or tokenizer differ from the newest
            checkpoint of the run, or from that of `checkpoint.load_step`. It shows each difference.
            Or another process of this machine saves into the folder.
        OutageError: on all ranks: the checkpoints cannot be read.
    """
    if job_config.checkpoint.enable:
        on_rank_zero(lambda: _check_folder(job_config, args), group)


def _check_folder(job_config: JobConfig, args: Any) -> None:
    root, step = checkpoint_root(job_config), job_config.checkpoint.load_step
    refuse_live_owner(root)
    folder = next((path for path in _in_turn(root, step) if is_resumable(path)), None)
    if folder is None:
        return  # nothing to resume from, or damaged, which is told where it is loaded
    try:
        model = Manifest.read(folder).model
    except DamagedCheckpointError:
        return
    found = list(model_differences(model, describe_model(job_config, args)))
    if found:
        lines = "".join(f"\n  {name} = {was} (now {now})" for name, was, now in found)
        raise CheckpointError(
            f"{folder} is of another model, so this run cannot resume from it:{lines}\nRestore the "
            "model, or start a new run in another job.dump_folder; checkpoint.initial_load_path "
            "gives it weights"
        )


def folders_to_resume(root: StoragePath, load_step: int) -> list[StoragePath]:
    """The first one that is good is to be resumed from.

    `load_step`: -1, the newest first; else what was saved since the run went back to that step, and
    last that step itself. So the key counts once: else each restart would go back again.
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
    """What runs with this `load_step` have saved last, and damaged ones between."""
    since: list[StoragePath] = []
    damaged: list[StoragePath] = []
    for folder in newest_first:
        try:
            manifest = Manifest.read(folder)
            manifest.check_sizes(folder)
            saved = saved_config(folder, manifest)
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
    """Why a run goes on from `folder` and not from `load_step`; "" if it goes on from that.

    `in_turn`: see `folders_to_resume`.
    """
    names = [path.name for path in in_turn]
    asked_for = f"step-{load_step}"
    if load_step == -1 or folder.name == asked_for:
        return ""
    note = (
        f"checkpoint.load_step = {load_step} counted before {folder.name} was saved, so the run "
        "goes on from that"
    )
    if asked_for not in names:
        return note
    since = ", ".join(name for name in names if name != asked_for)
    return f"{note}. To go back to {asked_for} once more, first move or delete {since}"


def steps_to_resume(root: StoragePath, damaged: Collection[str]) -> list[int]:
    """In their order. `damaged`: names of checkpoints that are, though their sizes are right."""
    return sorted(
        step_of(path)
        for path in list_checkpoints(root)
        if path.name not in damaged and is_resumable(path)
    )


def model_differences(
    saved: dict[str, Any], current: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Each field in which two descriptions are of another model, its old and new value.

    How attention is computed and how strongly a router is balanced make no other model. Whether it
    is, does: checkpoints have buffers for it. Of a tokenizer, its files count and not the place
    where they are.
    """
    for name in ("name", "flavor"):
        if saved.get(name) != current[name]:
            yield f"model.{name}", saved.get(name), current[name]
    if saved.get("tokenizer_sha256") != current["tokenizer_sha256"]:
        was, now = saved.get("tokenizer"), current["tokenizer"]
        yield "model.tokenizer_path", was, now if now != was else f"{now} with other files"
    was, now = saved.get("args", {}), current["args"]
    for name, a, b in nested_differences(was, now):
        field = name.rpartition(".")[2]
        if field not in TRAINING_ONLY or (field in _WITH_BUFFERS and bool(a) != bool(b)):
            yield name, a, b


def saved_config(folder: StoragePath, manifest: Manifest) -> dict[str, Any]:
    """The configuration of the run that saved a checkpoint; empty where it has none.

    Raises:
        DamagedCheckpointError: nothing can be made of the file, or it is missing.
        OutageError: it cannot be read.
    """
    if CONFIG_FILE not in manifest.files:
        return {}
    path = folder / CONFIG_FILE
    return parse_again(path, lambda: tomllib.loads(path.read_bytes().decode()))


def parts_to_exclude(
    folder: StoragePath, saved: dict[str, Any], parts: list[str]
) -> tuple[list[str], str]:
    """Which of `checkpoint.exclude_from_loading` to begin anew, all or none, and why none.

    The key counts once: if the run that saved the checkpoint had the same one, that run has begun
    the parts anew, or went on from one that had. Else each restart would begin them anew.

    Args:
        folder: the checkpoint.
        saved: its `saved_config`.
        parts: value of the key.
    """
    if not parts or saved.get("checkpoint", {}).get("exclude_from_loading") != parts:
        return parts, ""
    return [], (
        f"checkpoint.exclude_from_loading = {_shown(parts)} counted before {folder.name} was "
        "saved, so what has been trained since is loaded. To begin these parts anew once more, "
        f"write it another way, such as {_shown([*parts, parts[-1]])}"
    )


def tell_changes(saved: dict[str, Any], job_config: JobConfig) -> str:
    """The end of a sentence on a checkpoint: in what the run's config differs from its own.

    Args:
        saved: `saved_config` of the checkpoint.
    """
    if not saved:
        return ", whose configuration is not known"
    changes = nested_differences(saved, tomllib.loads(to_toml(job_config)))
    lines = [f"\n  {name} = {_shown(now)} (was {_shown(was)})" for name, was, now in changes]
    return f". The configuration has changed since:{''.join(lines)}" if lines else ""


def _shown(value: Any) -> str:
    return "unset" if value is None else json.dumps(value, ensure_ascii=False)


def _absolute(tokenizer: str) -> str:
    return tokenizer if tokenizer == "bytes" else str(Path(tokenizer).expanduser().absolute())


def _tokenizer_digest(tokenizer: str) -> str:
    """Digest of the files that make a tokenizer; "" for `bytes`, which has none."""
    if tokenizer == "bytes":
        return ""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = Path(tokenizer).expanduser() / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()
