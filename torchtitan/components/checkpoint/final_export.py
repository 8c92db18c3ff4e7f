"""Save a Hugging Face folder at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

from torchtitan.errors import CheckpointError
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.tools.logging import rank0

from .huggingface import ExportAssets
from .huggingface_save import save_huggingface
from .manifest import MANIFEST
from .retry import read_again
from .run_state import RunState
from .series import CheckpointSeries
from .writer import error_of_failed_save

if TYPE_CHECKING:
    from torchtitan.components.tokenizer import Tokenizer


class FinalExport:
    """Saves `step-N-hf` after the last step. All ranks call each method together.

    Args:
        state: its model is saved, and its loader tells whether it has had conversations.
        tokenizer: tokenizer of the model, or None.
        series: the checkpoints of the run, in whose folder the export is created.
        group: all ranks.
    """

    def __init__(
        self,
        state: RunState,
        tokenizer: Tokenizer | None,
        series: CheckpointSeries,
        group: dist.ProcessGroup,
    ) -> None:
        self._state = state
        self._series = series
        self._group = group
        self._assets = ExportAssets.of_job(state.job_config, tokenizer)

    def is_due(self, step: int) -> bool:
        """Return whether a run that ends after `step` steps should save an export."""
        config = self._state.job_config
        return config.checkpoint.last_save_in_hf and 0 < config.training.steps <= step

    def save(self, step: int) -> None:
        """Save; raises `CheckpointError`, or `OutageError` if it may be transient, on all ranks."""
        on_rank_zero(self._series.claim.check, self._group)
        dtype = getattr(torch, self._state.job_config.checkpoint.export_dtype)
        folder = self._folder(step)
        assets = self._assets.after_training_on(self._state.dataloader)
        try:
            save_huggingface(self._state.model_parts, folder, dtype, assets, self._group)
        except CheckpointError as error:
            raise error_of_failed_save(str(error), error) from error

    def save_if_missing(self, step: int) -> None:
        """Save if a finished run has no export, because saving failed or was not enabled then."""
        if self.is_due(step) and not on_rank_zero(lambda: self._is_there(step), self._group):
            folder = self._folder(step)
            rank0.info("step %d is done, but %s is missing or older: saving it now", step, folder)
            self.save(step)

    def _is_there(self, step: int) -> bool:
        """Return whether the export exists and is no older than the checkpoint.

        An older one belongs to an earlier training. Both times are the file server's: its clock and
        that of a host, which `Manifest.saved_at` is from, may differ.
        """
        export, checkpoint = self._folder(step), cast(Path, self._series.folder(step)) / MANIFEST
        try:
            return read_again(export, lambda: export.stat().st_mtime >= checkpoint.stat().st_mtime)
        except FileNotFoundError:
            return False

    def _folder(self, step: int) -> Path:
        folder = self._series.folder(step)
        return cast(Path, folder.with_name(f"{folder.name}-hf"))  # the config refuses URLs
