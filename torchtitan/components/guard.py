"""Guard the run against steps with a non-finite or far too high loss or gradient norm, and leave
out the batches that `training.skip_batches` names."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
import torch.distributed as dist

from torchtitan.components.data_loader import Batch
from torchtitan.config import JobConfig
from torchtitan.config.batch import batches_to_skip
from torchtitan.data.kept_batch import keep_batch
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import TrainingError
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.tools.logging import logger, rank0
from torchtitan.tools.text import first_line

Trouble = Literal["nonfinite", "spike"]

_MOST_KEPT_BATCHES = 32
"""Limit, so that a run of weeks does not fill the disk with batches."""


@dataclass
class Counts:
    """Actions of the guard since the run began, including before restarts."""

    steps_skipped: int = 0
    """Steps whose batch was skipped."""
    rollbacks: int = 0
    batches_skipped: int = 0
    """Batches passed over by rollbacks: step N trains on batch N + `batches_skipped`."""


class Guard:
    """Checks the loss and gradient norm of each step before the optimizer step.

    A spike is a finite loss or gradient norm that lies more than `training.spike_sigmas` standard
    deviations above its mean over the last `training.spike_window` trained steps, as in OLMo 2
    (arXiv:2501.00656). Spikes are detected once half of the window is filled.

    All ranks decide alike, since they use one sum over the world. Reading its terms from the device
    blocks the host once per step; without `on_nonfinite` and `on_spike`, the guard does not.

    Args:
        dp_rank: index of this data rank, whose rows of a bad batch are kept for inspection.
        tokenizer: `bytes` or a folder, to show the rows as text; "": they are not shown as text.
    """

    def __init__(
        self,
        job_config: JobConfig,
        parallel_dims: ParallelDims,
        dp_rank: int,
        tokenizer: str,
    ) -> None:
        training = job_config.training
        self._on: dict[Trouble, str] = {
            "nonfinite": training.on_nonfinite,
            "spike": training.on_spike,
        }
        self._checks = (training.on_nonfinite, training.on_spike) != ("error", "ignore")
        self._left_out = batches_to_skip(job_config)
        self.enabled = self._checks or bool(self._left_out)
        self.leaves_out = False
        """Whether `training.skip_batches` names the batch of the last step."""
        self.counts = Counts()
        self.rollback_due = False
        self._sigmas = training.spike_sigmas
        self._limit = training.bad_step_limit
        self._history: deque[tuple[float, float]] = deque(maxlen=training.spike_window)
        self._bad_in_a_row = 0
        self._rolled_back_to, self._times = -1, 0
        self._loss_copies = parallel_dims.loss_copies
        self._config = job_config
        mesh = parallel_dims.world_mesh
        others = [name for name in ("pp", "cp", "tp") if name in (mesh.mesh_dim_names or ())]
        self._keeps_rows = all(mesh[name].get_local_rank() == 0 for name in others)
        self._dp_rank, self._tokenizer = dp_rank, tokenizer
        self._kept = 0

    def begin_step(self, step: int) -> bool:
        """Return whether `training.skip_batches` names the batch of this step: `leaves_out`."""
        batch = step + self.counts.batches_skipped
        self.leaves_out = any(batch in batches for batches in self._left_out)
        if self.leaves_out:
            rank0.info("step %d: batch %d is left out (training.skip_batches)", step, batch)
        return self.leaves_out

    def count_left_out(self) -> None:
        """Count a step whose batch `training.skip_batches` names, once it is done."""
        self.counts.steps_skipped += 1

    def allows(
        self, step: int, local_loss: torch.Tensor, grad_norm: torch.Tensor, batches: list[Batch]
    ) -> bool:
        """Return whether to take optimizer step `step`. If not, `rollback_due` may be set.

        Args:
            local_loss: this rank's share of the step's loss.
            grad_norm: norm before clipping, the same on all ranks.
            batches: the micro-batches of this rank.

        Raises:
            TrainingError: the config demands it, or there were too many bad steps in a row.
        """
        if not self._checks:
            return True
        loss, norm = self._over_ranks(local_loss, grad_norm)
        trouble, what = self._judge(loss, norm)
        action = self._on[trouble] if trouble else "ignore"
        if action in ("ignore", "warn"):
            self._history.append((loss, norm))
            self._bad_in_a_row = 0
        if action == "ignore":
            return True

        batch = step + self.counts.batches_skipped
        where = f"step {step}, batch {batch} of the data: {what}"
        kept = self._keep(step, batch, loss, norm, batches)
        if action == "error":
            raise TrainingError(f"{where}. {kept}")
        if action == "warn":
            rank0.warning("%s. %s", where, kept)
            return True
        self._bad_in_a_row += 1
        if self._bad_in_a_row > self._limit:
            raise TrainingError(
                f"{where}. That makes {self._bad_in_a_row} bad steps in a row, and "
                f"training.bad_step_limit is {self._limit}. {kept}"
            )
        self.rollback_due = action == "rollback"
        if self.rollback_due:
            rank0.warning("%s. Rolling back. %s", where, kept)
        else:
            rank0.warning("%s. The batch is skipped. %s", where, kept)
            self.counts.steps_skipped += 1
        return False

    def _over_ranks(self, local_loss: torch.Tensor, grad_norm: torch.Tensor) -> list[float]:
        """Return the loss and the norm, bitwise the same on all ranks."""
        # All ranks have the same norm, so its mean over the ranks is the norm.
        shares = [local_loss / self._loss_copies, grad_norm / dist.get_world_size()]
        values = torch.stack([share.to(local_loss.device, torch.float64) for share in shares])
        values = values.cpu()  # see `StepStats.read`
        sum_over_ranks(values)
        return values.tolist()

    @property
    def troubled(self) -> bool:
        """Whether the last step was bad and not trained on."""
        return self._bad_in_a_row > 0

    def rolled_back(self, bad_step: int, step: int) -> None:
        """Record that the run went back from `bad_step` to the checkpoint of `step`.

        Raises:
            TrainingError: the run went back to this checkpoint too often.
        """
        self.rollback_due = False
        self.counts.rollbacks += 1
        self.counts.batches_skipped += bad_step - step
        self._times = self._times + 1 if step == self._rolled_back_to else 1
        self._rolled_back_to = step
        if self._times > self._limit:
            raise TrainingError(
                f"step {bad_step}: {self._times} rollbacks to the checkpoint of step {step}, and "
                f"training.bad_step_limit is {self._limit}. Resume from an older one "
                "(checkpoint.load_step), with another learning rate, or inspect the data"
            )
        rank0.warning(
            "rolled back to the checkpoint of step %d. Step %d trains on batch %d of the data",
            *(step, step + 1, step + 1 + self.counts.batches_skipped),
        )

    def cannot_roll_back(self, bad_step: int) -> None:
        """Record that the step is skipped instead, since there is no checkpoint yet."""
        self.rollback_due = False
        self.counts.steps_skipped += 1
        rank0.warning(
            "step %d: there is no checkpoint to roll back to. The batch is skipped", bad_step
        )

    def metrics(self) -> dict[str, int]:
        """Return `steps_skipped`, `rollbacks`, `batches_skipped`; empty if the guard is off."""
        return dict(vars(self.counts)) if self.enabled else {}

    def state_dict(self) -> dict[str, Any]:
        history = [list(pair) for pair in self._history]
        # One string, since the history may have another length in another checkpoint. It is padded
        # with spaces: a state of the same size as at the last save is saved fastest.
        text = json.dumps({"counts": vars(self.counts), "history": history})
        return {"json": text.ljust(1 << len(text).bit_length())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = json.loads(state_dict["json"])
        self.counts = Counts(**state["counts"])
        self._history.clear()
        self._history.extend((loss, norm) for loss, norm in state["history"])

    def _judge(self, loss: float, norm: float) -> tuple[Trouble | None, str]:
        """Return the trouble with a step and its description; None and "" if there is none."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "nonfinite", f"the loss is {loss} and the gradient norm is {norm}"
        enough = (self._history.maxlen or 0) // 2
        if self._on["spike"] == "ignore" or len(self._history) < enough:
            return None, ""
        losses, norms = zip(*self._history, strict=True)
        watched = [("loss", loss, losses), ("gradient norm", norm, norms)]
        for name, value, earlier in watched:
            mean, deviation = fmean(earlier), pstdev(earlier)
            if value > mean + self._sigmas * deviation:
                return "spike", (
                    f"the {name} is {value:.6g}, but it was {mean:.6g} with a standard deviation "
                    f"of {deviation:.3g} over the last {len(earlier)} steps"
                )
        return None, ""

    def _keep(self, step: int, batch: int, loss: float, norm: float, batches: list[Batch]) -> str:
        """Write a bad batch to the dump folder; return a sentence on how to view it."""
        if self._kept == _MOST_KEPT_BATCHES:
            return f"(at most {_MOST_KEPT_BATCHES} bad batches are kept)"
        self._kept += 1
        folder = Path(self._config.job.dump_folder, "bad_batches", f"batch-{batch}")
        facts = {
            "step": step,
            "batch": batch,
            "loss": str(loss),
            "grad_norm": str(norm),
            "tokenizer": self._tokenizer,
        }
        try:
            if self._keeps_rows:
                keep_batch(folder, self._dp_rank, batches, facts)
        except Exception as error:  # failing to keep a batch must not end a run
            logger.warning("the bad batch %d cannot be kept: %s", batch, first_line(error))
            return "The batch could not be kept"
        return f"To see the batch: torchtitan data batch {folder}"


def refuse_nonfinite_step(
    step: int, loss: float, grad_norm: float, newest: Callable[[], object]
) -> None:
    """Refuse a step with a non-finite loss or gradient norm.

    Args:
        newest: returns the newest checkpoint, for the message.

    Raises:
        TrainingError: the loss or the norm of the gradients is NaN or infinite.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise TrainingError(
        f"step {step}: the loss is {loss} and the gradient norm is {grad_norm}. The last good "
        f"checkpoint is {newest() or '(none)'}"
    )


def refuse_nonfinite_weights(parameters: Iterable[torch.Tensor], step: int) -> None:
    """Refuse to save or share non-finite weights: the last loss says nothing about its update.

    All ranks call this before saving, and before a meeting with other replica groups.

    Raises:
        TrainingError: a weight of any rank is NaN or infinite; raised on all ranks.
    """
    local = [local_tensor(p) for p in parameters]
    bad = torch.tensor(sum(int(not t.isfinite().all()) for t in local))
    sum_over_ranks(bad)
    if bad:
        raise TrainingError(
            f"step {step}: weights are not finite, so the model is not saved or shared. Resume "
            "from the newest checkpoint"
        )
