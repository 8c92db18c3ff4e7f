"""Save and resume the whole state of a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.errors import CheckpointError, DamagedCheckpointError
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.runtime.process_group import patient_group
from torchtitan.tools.logging import logger, rank0
from torchtitan.tools.text import first_line

from .background import BackgroundSaves
from .final_export import FinalExport
from .folder import delete_unfinished, restore_replaced
from .huggingface import initial_load_path
from .load import load_weights_of_parts
from .manifest import Manifest
from .model_identity import describe_model
from .opened import OpenCheckpoint
from .owner import TakenOverError, require_shared
from .reader import MisfitError, first_failure
from .resume import (
    describe_changes,
    folders_to_resume,
    gone_on_since,
    parts_to_exclude,
    steps_to_resume,
    tell_resumed,
)
from .run_state import RunState
from .save_planner import LastSave, SharingSavePlanner
from .series import CheckpointSeries
from .storage import StoragePath, is_there
from .writer import CheckpointWriter, error_of_failed_save

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer

SAVE_TIMEOUT = timedelta(hours=2)
"""Timeout while one rank writes or reads its files, or rank 0 prunes. A busy file server, or a
failover to another, may take far longer than a training step."""


class CheckpointManager:
    """Saves every `checkpoint.interval` steps, and resumes from the newest checkpoint.

    Checkpoints do not depend on the layout: a run can resume on another number of ranks and with
    other degrees of parallelism. All ranks call each method together.

    Args:
        state: what to save and to restore.
        tokenizer: tokenizer of the model, or None.
    """

    def __init__(self, state: RunState, tokenizer: Tokenizer | None = None) -> None:
        job_config, model_parts = state.job_config, state.model_parts
        self._config = job_config.checkpoint
        self._initial_load_path = initial_load_path(job_config)
        self._series = CheckpointSeries(job_config)
        self._total_steps = job_config.training.steps
        self._state = state
        self._model_description = describe_model(
            job_config, getattr(model_parts[0], "args", None), tokenizer
        )
        # A separate group, so that background saves do not mix with the collectives of training.
        self._group = patient_group(SAVE_TIMEOUT)
        self._final_export = FinalExport(state, tokenizer, self._series, self._group)
        self._background = BackgroundSaves(model_parts, state.optimizers, self._group)
        self._last_save = LastSave()
        self.last_saved: int | None = None
        """Step of the last checkpoint that this process saved and completed."""
        self.branched = False
        """Whether `load` went on from a checkpoint outside of the run's own folder."""

    def is_due(self, step: int, last: bool = False) -> bool:
        """Return whether `save` would save."""
        config = self._config
        return config.enable and (last or step % config.interval == 0 or step in config.keep_steps)

    def save(self, step: int, last: bool = False) -> None:
        """Save the state after `step` steps if it is due. Call this after every step.

        A failed save leaves older checkpoints intact; it is logged, and training continues.

        Args:
            step: optimizer steps done.
            last: the run ends here, as planned or because it was stopped: always save, and wait for
                the save. Only a planned end is saved as an export
                (`checkpoint.last_save_model_only`, `checkpoint.last_save_in_hf`), since a stopped
                run will be resumed.

        Raises:
            CheckpointError: on all ranks: the last save failed, or another run saves there now.
            OutageError: on all ranks: the last save failed, but may succeed after a restart.
        """
        if self._background.done:
            self.wait()
        if not self.is_due(step, last):
            return
        self.wait()

        finished = last and step >= self._total_steps
        export = finished and self._config.last_save_model_only
        in_hf = last and self._final_export.is_due(step)
        if export and in_hf:
            self._final_export.save(step)
            return
        state = self._state.export() if export else self._state.state_dict()
        data = self._state.describe_data()
        if export:
            data.pop("sources", None)  # an export has no position in them
        manifest = Manifest(step, export, self._model_description, data)
        writer = CheckpointWriter(self._series, manifest, self._last_save, self._state.job_config)
        planner = SharingSavePlanner(self._group, self._last_save)
        if self._config.async_mode == "async" and not last:
            self._background.start(step, state, writer, planner)
            return
        save = partial(
            dcp.save, state, storage_writer=writer, planner=planner, process_group=self._group
        )
        self._finish(step, save, last)
        if in_hf:
            self._final_export.save(step)

    def wait(self) -> None:
        """Wait for the background save, if there is one."""
        if self._background.step is not None:
            self._finish(self._background.step, self._background.finish)

    def wait_for_copy(self) -> None:
        """Wait until weights may change outside of the optimizer's step."""
        self._background.wait_for_copy()

    def _finish(self, step: int, save: Callable[[], object], last: bool = False) -> None:
        """Call `save`, and record how it ends. Raises the error of a failed `last` save."""
        try:
            save()
        except CheckpointException as failure:
            message, error = self._clean_up(step, failure)
            if last:
                raise error_of_failed_save(message, error) from failure
            rank0.error("%s. Training continues", message)
            return
        self._last_save.ended_well = True
        self._series.go_on_from(self._series.folder(step))
        self.last_saved = step

    def close(self, timeout: float | None = None) -> bool:
        """Finish the save in progress. Call this at the end of the run.

        Args:
            timeout: seconds to wait for a background save; None: as long as it takes.

        Returns:
            False if that save still runs: it may wait for a rank that is gone.
        """
        if timeout is not None and not self._background.wait(timeout):
            return False
        self.wait()
        self._background.close()
        dist.destroy_process_group(self._group)
        return True

    def newest(self) -> StoragePath | None:
        """Return the checkpoint that this run saved last, or else resumed from.

        Does not access the storage.
        """
        if self._background.completed is not None:
            return self._series.folder(self._background.completed)
        return self._series.lineage[-1] if self._series.lineage else None

    def load(self) -> int:
        """Resume, or else start from `checkpoint.initial_load_path` if it is set.

        That gives the weights or, with `initial_load_model_only = false`, all of the state.
        With `checkpoint.initial_load_in_hf`, the weights are in a Hugging Face folder, by default
        the tokenizer's. Damaged checkpoints are skipped with a warning, in favor of the newest good
        one. If that is of the last step, and the Hugging Face folder of `last_save_in_hf` is
        missing, the folder is saved now.

        `load_step` and `exclude_from_loading` apply once, also across restarts of a run.

        Returns:
            The number of steps done when the checkpoint was saved; 0 for a new run.

        Raises:
            CheckpointError: on all ranks: `checkpoint.load_step` does not exist or is damaged; all
                checkpoints are damaged; the one to resume from is an export, or does not fit the
                model or the batch size; or the folder of checkpoints is not writable, or not the
                same on all hosts.
            OutageError: on all ranks: a checkpoint cannot be read, which does not count as damage,
                or the folder cannot be written now.
        """
        step = self._load_first()
        if self._config.enable:
            require_shared(self._series.root, self._series.claim, self._group)
            self._final_export.save_if_missing(self._state.step)
        return step

    def _load_first(self) -> int:
        if self._config.enable:
            load_step = self._config.load_step
            root = self._series.root
            folders = on_rank_zero(lambda: folders_to_resume(root, load_step), self._group)
            if not folders and load_step != -1:
                raise CheckpointError(
                    f"checkpoint.load_step = {load_step}: there is no "
                    f"{self._series.folder(load_step)}. {self._steps_to_resume()}"
                )
            step = self._resume_first_good(folders, exclude=None)
            if step is not None:
                if note := gone_on_since(self._series.lineage[-1], folders, load_step):
                    rank0.warning("%s", note)
                return step
        path = self._initial_load_path
        if path is not None and not self._config.initial_load_model_only:
            step = self._resume(OpenCheckpoint.open(path, self._group, self._config.verify), None)
            self._series.go_on_from(path)
            self.branched = True
            return step
        if path is not None:
            exclude = self._config.initial_load_exclude
            try:
                load_weights_of_parts(
                    self._state.model_parts, path, self._group, self._config.verify, exclude
                )
            except MisfitError as error:
                raise CheckpointError(
                    f"{error}. Parameters that match checkpoint.initial_load_exclude are not read "
                    "and keep their initial values"
                ) from error
            apart = f", except for parameters that match {exclude!r}" if exclude else ""
            logger.info("started from the weights in %s%s", path, apart)
        return 0

    def roll_back(self, exclude: Collection[str] = ()) -> int | None:
        """Go back to the newest good checkpoint in the middle of a run.

        This is one that the run has saved (after waiting for a background save) or resumed from, so
        checkpoints of other runs in the folder do not matter.

        Args:
            exclude: parts of the state to leave unchanged, `"dataloader"` for example.

        Returns:
            The number of steps done when the checkpoint was saved; None, without any change, if
            there is no checkpoint.

        Raises:
            CheckpointError: on all ranks: all checkpoints are damaged.
            OutageError: on all ranks: a checkpoint cannot be read.
        """
        self.wait()
        lineage = self._series.lineage[::-1]
        there = on_rank_zero(lambda: [path for path in lineage if is_there(path)], self._group)
        return self._resume_first_good(there, exclude)

    def _steps_to_resume(self) -> str:
        return on_rank_zero(lambda: steps_to_resume(self._series), self._group)

    def _resume_first_good(
        self, folders: Iterable[StoragePath], exclude: Collection[str] | None
    ) -> int | None:
        """Resume from the first undamaged checkpoint; return its step, or None without folders.

        `exclude`: parts to leave unchanged; None: those of the config, if they still apply.
        """
        damaged: list[str] = []
        for folder in folders:
            if damaged:
                rank0.warning("%s. This checkpoint is skipped", damaged[-1])
            try:
                checkpoint = OpenCheckpoint.open(folder, self._group, self._config.verify)
                step = self._resume(checkpoint, exclude)
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                self._series.damaged.add(folder.name)
                continue
            self._series.go_on_from(folder)
            return step
        if not damaged:
            return None
        if exclude is None and (load_step := self._config.load_step) != -1:
            raise CheckpointError(
                f"checkpoint.load_step = {load_step}: {damaged[0]}. {self._steps_to_resume()}"
            )
        count = f" ({len(damaged)} are damaged)" if len(damaged) > 1 else ""
        raise CheckpointError(
            f"{damaged[0]}. There is no intact checkpoint in {self._series.root}{count}; to start "
            "over, choose another checkpoint.folder"
        )

    def _resume(self, checkpoint: OpenCheckpoint, exclude: Collection[str] | None) -> int:
        if checkpoint.manifest.model_only:
            raise CheckpointError(
                f"{checkpoint.folder} holds only the model and cannot resume a run. Set "
                "checkpoint.load_step, or start a new run in another job.dump_folder with "
                f"checkpoint.initial_load_path. {self._steps_to_resume()}"
            )
        note = ""
        anew = False
        if exclude is None:
            exclude, note = parts_to_exclude(checkpoint, self._state.job_config)
            anew = "dataloader" in exclude
        try:
            self._state.read(checkpoint, exclude, self._group)
        except CheckpointError as error:
            # The error may advise a setting that is already set but no longer applies.
            more = f". {note}" if note and not isinstance(error, DamagedCheckpointError) else ""
            if isinstance(error, MisfitError) and checkpoint.config:  # as without model.converters
                more += describe_changes(checkpoint.config, self._state.job_config)
            if not more:
                raise
            raise CheckpointError(f"{error}{more}") from error
        if anew:
            self._state.begin_data(0 if "train_state" in exclude else checkpoint.manifest.step)
        if dist.get_rank() == 0:
            tell_resumed(checkpoint, self._state.job_config, exclude)
            if note:
                logger.info("%s", note)
        return checkpoint.manifest.step

    def _clean_up(self, step: int, failure: CheckpointException) -> tuple[str, Exception]:
        """Remove the files of a failed save; return a message for the user, and the error."""
        error = first_failure(failure)
        if not isinstance(error, Exception):
            raise error
        if isinstance(error, TakenOverError):  # the files may belong to the other run
            raise error from None
        if dist.get_rank() == 0:
            with suppress(Exception):  # the next save will do this
                restore_replaced(self._series.root)
                delete_unfinished(self._series.folder(step))
        newest = self.newest()
        message = (
            f"The checkpoint of step {step} could not be saved in {self._series.root}: "
            f"{first_line(error)}. The newest checkpoint is {newest.name if newest else '(none)'}"
        )
        return message, error
