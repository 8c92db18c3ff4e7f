"""Collect and restore the state of a run, by the parts of a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from torchtitan.errors import CheckpointError

from .data_fit import SavedPosition
from .model_tensors import buffer_names, dtype_of_copy, model_state
from .opened import OpenCheckpoint

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer
    from torchtitan.config import JobConfig


@dataclass
class TrainState:
    """The trainer's own counters."""

    step: int = 0
    """Optimizer steps done."""
    tokens_seen: int = 0
    """Tokens trained on by all ranks together."""

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step), "tokens_seen": torch.tensor(self.tokens_seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])
        self.tokens_seen = int(state_dict["tokens_seen"])


class RunState:
    """The parts of a run that a checkpoint holds: "model", "optimizer", "dataloader" and so on.

    Args:
        job_config: the configuration of the run.
        model_parts: this rank's parts of the model (one, without pipeline parallelism).
        optimizers: an iterable of optimizers whose `state_dict()` is flat and keyed by parameter
            name.
        lr_schedulers: the schedule, in the state after the optimizer steps done.
        dataloader: its `state_dict()` returns `{"rows": [rows of this rank, k] int64}`. The state
            passed to `load_state_dict` also has the `seq_len` of the run that saved it (None if
            unknown), and `described`, the result of its `describe` as far as known. `describe`
            and `begin_at` are called if present, as in `DataLoader`. If `has_conversations` is
            true, exports have a chat template.
        train_state: the trainer's own counters.
        dp_mesh: the data ranks, `world_mesh["dp"]`.
        optional: name -> other state of the run, which checkpoints may lack.
    """

    def __init__(
        self,
        job_config: JobConfig,
        *,
        model_parts: list[nn.Module],
        optimizers: OptimizersContainer,
        lr_schedulers: Stateful,
        dataloader: Any,
        train_state: Stateful,
        dp_mesh: DeviceMesh,
        optional: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.job_config = job_config
        self.model_parts = model_parts
        self.optimizers = optimizers
        self.dataloader = dataloader
        self._dp_mesh = dp_mesh
        self._stateful: dict[str, Stateful] = {
            "optimizer": optimizers,
            "lr_scheduler": lr_schedulers,
            "train_state": train_state,
        }
        self._optional = dict(optional or {})
        self._stateful |= self._optional

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self._stateful["train_state"].state_dict()["step"])

    def state_dict(self, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the state that a run resumes from, by part: nested dicts of tensors and values.

        The tensors are not copied. `exclude`: parts to leave out.
        """
        state = {name: s.state_dict() for name, s in self._stateful.items() if name not in exclude}
        state["model"] = model_state(self.model_parts)
        if "dataloader" not in exclude:
            # One tensor [global_batch_size, k] sharded over the data ranks, so that it can be
            # resharded to another number of ranks.
            rows = self.dataloader.state_dict()["rows"]
            state["dataloader"] = {"rows": DTensor.from_local(rows, self._dp_mesh, [Shard(0)])}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a `state_dict` without "dataloader", whose model is already in place."""
        for name, stateful in self._stateful.items():
            if name in state:
                stateful.load_state_dict(state[name])
            elif name == "lr_scheduler":  # the optimizer has the learning rate of the checkpoint
                stateful.load_state_dict(stateful.state_dict())

    def export(self) -> dict[str, Any]:
        """Return the model alone, in `checkpoint.export_dtype`; see `dtype_of_copy`."""
        dtype = getattr(torch, self.job_config.checkpoint.export_dtype)
        model, buffers = model_state(self.model_parts), buffer_names(self.model_parts)
        return {
            "model": {
                k: t.to(dtype_of_copy(t.dtype, dtype, k in buffers)) for k, t in model.items()
            }
        }

    def read(
        self,
        checkpoint: OpenCheckpoint,
        exclude: Collection[str],
        group: dist.ProcessGroup,
    ) -> None:
        """Load the state of a checkpoint.

        Args:
            exclude: parts to leave unchanged.
            group: all ranks.

        Raises:
            CheckpointError: on all ranks: the checkpoint is damaged or does not fit this run.
            OutageError: on all ranks: the checkpoint cannot be read.
        """
        saved = {key.partition(".")[0] for key in checkpoint.metadata.state_dict_metadata}
        exclude = (*exclude, *(self._optional.keys() - saved))
        if "semi_sync" in saved - self._stateful.keys() and self.job_config.fault_tolerance.enable:
            raise CheckpointError(
                f"{checkpoint.folder} is of a replica group that trained apart from the others, so "
                "each has weights of its own. Set fault_tolerance.semi_sync_method as before, or "
                "start all groups from the weights of one: checkpoint.initial_load_path"
            )
        state = self.state_dict(exclude)
        if "dataloader" in state:
            own = self.dataloader.state_dict()["rows"], self._dp_mesh.size(), self.describe_data()
            position = SavedPosition(checkpoint, self.job_config, *own)
            state["dataloader"]["rows"] = position.target(state["dataloader"]["rows"])
        checkpoint.read_into(state, self.model_parts[0], group)  # loads the model in place
        self.load_state_dict(state)
        if "dataloader" in state:
            rank = self._dp_mesh.get_local_rank()
            rows = position.rows_of_rank(state["dataloader"]["rows"], rank)
            self.dataloader.load_state_dict({"rows": rows, **position.description})

    def describe_data(self) -> dict[str, Any]:
        """Return the loader's description for `Manifest.data`; empty if it has none."""
        tell = getattr(self.dataloader, "describe", None)
        known = getattr(self.dataloader, "has_conversations", None)
        return (tell() if tell else {}) | ({} if known is None else {"has_conversations": known})

    def begin_data(self, step: int) -> None:
        """Begin the data anew in a run that has done `step` steps.

        Passes the number to a loader that needs it, by `begin_at`.
        """
        tell = getattr(self.dataloader, "begin_at", None)
        if tell:
            tell(step)
