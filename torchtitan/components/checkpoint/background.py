"""Save in the background: copy the state while the next step computes, then write it."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn

from .model_tensors import buffer_names
from .save_planner import SharingSavePlanner
from .staging import HostCopy
from .writer import CheckpointWriter

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer


class BackgroundSaves:
    """Runs one save at a time while training continues.

    Args:
        model_parts: this rank's parts of the model.
        optimizers: an iterable of optimizers.
        group: all ranks; used by nothing else while a save is in progress.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        optimizers: OptimizersContainer,
        group: dist.ProcessGroup,
    ) -> None:
        self._model_parts = model_parts
        self._optimizers = optimizers
        self._group = group
        self._stager: HostCopy | None = None
        self._future: Future | None = None
        self.step: int | None = None
        """Step of the save in progress, until `finish` has seen its end; None: there is none."""

    def start(
        self,
        step: int,
        state: dict[str, Any],
        writer: CheckpointWriter,
        planner: SharingSavePlanner,
    ) -> None:
        """Begin to save `state`, which has the parts "model", "optimizer" and others.

        Parameters and optimizer state change only in `optimizer.step()`, which waits for the copy,
        and in meetings of replica groups, which call `wait_for_copy`, as "semi_sync" does. All else
        may change earlier (buffers in the forward pass); it is small and copied at once.
        """
        assert self._future is None
        if self._stager is None:
            stager = self._stager = HostCopy()
            for optimizer in self._optimizers:
                optimizer.register_step_pre_hook(lambda *_: stager.synchronize_staging())
        buffers = buffer_names(self._model_parts)
        model = state["model"]
        state["model"] = {k: t.clone() if k in buffers else t for k, t in model.items()}
        early = state.keys() - {"model", "optimizer", "semi_sync"}
        state |= {part: deepcopy(state[part]) for part in early}
        writer.per_thread_copy_ahead = 0  # the data is already on the host
        response = dcp.async_save(
            state,
            storage_writer=writer,
            planner=planner,
            process_group=self._group,
            async_stager=self._stager,
        )
        self.step = step
        # With a stager, the response is an AsyncSaveResponse.
        self._future = cast(Any, response).upload_completion

    def wait_for_copy(self) -> None:
        """Wait until all of the state may change."""
        if self._stager is not None:
            self._stager.synchronize_staging()

    @property
    def done(self) -> bool:
        """Whether a save has succeeded or failed, and `finish` was not called since."""
        return self._future is not None and self._future.done()

    @property
    def completed(self) -> int | None:
        """Step of a save that has succeeded, if `finish` was not called since."""
        if self._future is None or not self._future.done() or self._future.exception() is not None:
            return None
        return self.step

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the save in progress; return False if it continues."""
        if self._future is None:
            return True
        with suppress(Exception):  # `finish` raises a failure
            self._future.exception(timeout)
        return self._future.done()

    def finish(self) -> None:
        """Wait for the save in progress, and raise its error."""
        future, self._future, self.step = self._future, None, None
        if future is not None:
            future.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
