"""Saves and resumes the whole state of a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from torchtitan.errors import CheckpointError
from torchtitan.tools.text import first_line

from .agreement import first_failure, on_rank_zero
from .folder import (
    Manifest,
    is_resumable,
    list_checkpoints,
    partial_folder,
    restore_replaced,
    step_folder,
    step_of,
)
from .huggingface import ExportAssets, initial_load_path
from .huggingface_save import save_huggingface
from .load import OpenCheckpoint, load_weights_of_parts, model_args, model_state
from .writer import CheckpointWriter

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torchtitan.config import JobConfig

logger = logging.getLogger("torchtitan")


class CheckpointManager:
    """Saves every `checkpoint.interval` steps, and resumes from the newest checkpoint.

    A checkpoint does not depend on the layout: it can be resumed on another number of ranks and
    with other degrees of parallelism. All ranks call each method together.

    Args:
        job_config: sections `checkpoint`, `job`, `model` and `training`.
        model_parts: this rank's parts of the model (one, without pipeline parallelism).
        optimizers: its `state_dict()` is flat, and keyed by parameter name.
        lr_schedulers: as it is after `steps` steps of the optimizers.
        dataloader: its `state_dict()` is `{"rows": [rows of this rank, k] int64}`.
        train_state: the trainer's own counters.
        dp_mesh: the data ranks, `world_mesh["dp"]`.
    """

    def __init__(
        self,
        job_config: JobConfig,
        *,
        model_parts: list[nn.Module],
        optimizers: Stateful,
        lr_schedulers: Stateful,
        dataloader: Any,
        train_state: Stateful,
        dp_mesh: DeviceMesh,
    ) -> None:
        self._config = job_config.checkpoint
        self._initial_load_path = initial_load_path(job_config)
        self._export_assets = ExportAssets.of_job(job_config)
        self._root = Path(job_config.job.dump_folder, self._config.folder)
        self._total_steps = job_config.training.steps
        self._model_parts = model_parts
        self._dataloader = dataloader
        self._dp_mesh = dp_mesh
        self._stateful = {
            "optimizer": optimizers,
            "lr_scheduler": lr_schedulers,
            "train_state": train_state,
        }
        self._model_description = {
            "name": job_config.model.name,
            "flavor": job_config.model.flavor,
            "args": model_args(model_parts[0]),
            "tokenizer": _absolute(job_config.model.tokenizer_path),
            "seq_len": job_config.training.seq_len,
        }
        # Of its own, so that background saves do not get between the collectives of training.
        self._group = dist.new_group(backend="gloo")
        self._pending: tuple[int, Future] | None = None
        self.last_saved: int | None = None
        """Step of the last checkpoint that this process saved and completed."""

    def is_due(self, step: int, last: bool = False) -> bool:
        """Whether `save` would save."""
        return self._config.enable and (last or step % self._config.interval == 0)

    def save(self, step: int, last: bool = False) -> None:
        """Save the state after `step` steps if it is time to. Call it after every step.

        A failed save leaves the older checkpoints as they are; it is logged, and training goes on.

        Args:
            step: optimizer steps done.
            last: the run ends here, as planned or because it was told to stop: save in any case,
                and wait for it. Only a planned end is saved as an export
                (`checkpoint.last_save_model_only`, `checkpoint.last_save_in_hf`), since a stopped
                run is to be resumed.

        Raises:
            CheckpointError: the last save failed.
        """
        if self._pending is not None and self._pending[1].done():
            self.wait()
        if not self.is_due(step, last):
            return
        self.wait()

        finished = last and step >= self._total_steps
        export = finished and self._config.last_save_model_only
        in_hf = finished and self._config.last_save_in_hf
        if export and in_hf:
            self._save_huggingface(step)
            return
        state = self._export_state() if export else self._state()
        manifest = Manifest(step=step, model_only=export, model=self._model_description)
        folder = step_folder(self._root, step)
        writer = CheckpointWriter(folder, manifest, self._config.keep_latest_k)
        if self._config.async_mode == "async" and not last:
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
            self._pending = step, future
            return
        try:
            dcp.save(state, storage_writer=writer, process_group=self._group)
            self.last_saved = step
        except CheckpointException as failure:
            message = self._clean_up(step, failure)
            if last:
                raise CheckpointError(message) from failure
            _log_failure(message)
        if in_hf:
            self._save_huggingface(step)

    def _save_huggingface(self, step: int) -> None:
        folder = step_folder(self._root, step)
        save_huggingface(
            self._model_parts,
            folder.with_name(f"{folder.name}-hf"),
            getattr(torch, self._config.export_dtype),
            self._export_assets,
            self._group,
        )

    def wait(self) -> None:
        """Wait for the save in the background, if there is one."""
        if self._pending is None:
            return
        step, future = self._pending
        self._pending = None
        try:
            future.result()
            self.last_saved = step
        except CheckpointException as failure:
            _log_failure(self._clean_up(step, failure))

    def close(self) -> None:
        """Finish what is under way. Call it at the end of the run."""
        self.wait()
        dist.destroy_process_group(self._group)

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        checkpoints = list_checkpoints(self._root)
        return checkpoints[-1] if checkpoints else None

    def load(self) -> int:
        """Resume, or else start from the weights in `checkpoint.initial_load_path` if it is set.

        With `checkpoint.initial_load_in_hf`, these are in a Hugging Face folder, by default that
        of the tokenizer.

        Returns:
            The number of steps done when the checkpoint was saved; 0 for a new run.

        Raises:
            CheckpointError: on all ranks: `checkpoint.load_step` does not exist, or the checkpoint
                is damaged, cannot resume a run, or does not fit the model or the batch size.
        """
        if self._config.enable:
            folder = on_rank_zero(self._folder_to_resume, self._group)
            if folder is not None:
                return self._resume(OpenCheckpoint.open(folder, self._group))
        path = self._initial_load_path
        if path is not None:
            load_weights_of_parts(self._model_parts, path, self._group)
            logger.info("started from the weights in %s", path)
        return 0

    def _folder_to_resume(self) -> Path | None:
        restore_replaced(self._root)
        step = self._config.load_step
        if step == -1:
            return self.newest()
        folder = step_folder(self._root, step)
        if not folder.is_dir():
            raise CheckpointError(
                f"checkpoint.load_step = {step}: there is no {folder}. {self._resumable_steps()}"
            )
        return folder

    def _resumable_steps(self) -> str:
        steps = sorted(step_of(path) for path in list_checkpoints(self._root) if is_resumable(path))
        return f"Steps to resume from: {', '.join(map(str, steps)) or '(none)'}"

    def _resume(self, checkpoint: OpenCheckpoint) -> int:
        if checkpoint.manifest.model_only:
            raise CheckpointError(
                f"{checkpoint.folder} holds the model alone and cannot resume a run. Set "
                "checkpoint.load_step, or start a new run in another job.dump_folder with "
                f"checkpoint.initial_load_path. {self._resumable_steps()}"
            )
        state = self._state(exclude=self._config.exclude_from_loading)
        if "dataloader" in state:
            self._check_batch_size(checkpoint)
        checkpoint.read_into(state, self._model_parts[0], self._group)  # the model's in place
        for name, stateful in self._stateful.items():
            if name in state:
                stateful.load_state_dict(state[name])
        if "dataloader" in state:
            rows = state["dataloader"]["rows"].to_local().cpu()
            self._dataloader.load_state_dict({"rows": rows})
        logger.info("resumed from %s", checkpoint.folder)
        return checkpoint.manifest.step

    def _check_batch_size(self, checkpoint: OpenCheckpoint) -> None:
        rows = checkpoint.metadata.state_dict_metadata.get("dataloader.rows")
        current = self._dataloader.global_batch_size
        if rows is not None and (saved := rows.size[0]) != current:
            raise CheckpointError(
                f"{checkpoint.folder} was saved with a global batch of {saved} sequences, but "
                f"training.global_batch_size is {current} now. Set it to {saved}, or set "
                'checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'
            )
        columns = self._dataloader.state_dict()["rows"].shape[1]
        if rows is not None and rows.size[1] != columns:
            raise CheckpointError(
                f"{checkpoint.folder} was saved with another number of data.sources or another "
                "data.packing. Restore them, or set "
                'checkpoint.exclude_from_loading = ["dataloader"] to begin the data anew'
            )

    def _state(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """All that a run resumes from, by part: nested dicts of tensors and plain values."""
        state = {name: s.state_dict() for name, s in self._stateful.items() if name not in exclude}
        state["model"] = model_state(self._model_parts)
        if "dataloader" not in exclude:
            # As one tensor [global_batch_size, k] sharded over the data ranks, so that another
            # number of ranks finds its rows.
            rows = self._dataloader.state_dict()["rows"]
            state["dataloader"] = {"rows": DTensor.from_local(rows, self._dp_mesh, [Shard(0)])}
        return state

    def _export_state(self) -> dict[str, Any]:
        dtype = getattr(torch, self._config.export_dtype)
        model = model_state(self._model_parts)
        return {"model": {k: t.to(dtype) if t.is_floating_point() else t for k, t in model.items()}}

    def _clean_up(self, step: int, failure: CheckpointException) -> str:
        """Remove what a failed save has written; return what to tell the user."""
        error = first_failure(failure)
        if not isinstance(error, Exception):
            raise error
        if dist.get_rank() == 0:
            partial = partial_folder(step_folder(self._root, step))
            shutil.rmtree(partial, ignore_errors=True)
        newest = self.newest()
        return (
            f"The checkpoint of step {step} could not be saved in {self._root}: "
            f"{first_line(error)}. The newest checkpoint is {newest.name if newest else '(none)'}"
        )


def _absolute(tokenizer: str) -> str:
    return tokenizer if tokenizer == "bytes" else str(Path(tokenizer).expanduser().absolute())


def _log_failure(message: str) -> None:
    if dist.get_rank() == 0:
        logger.error("%s. Training goes on", message)
