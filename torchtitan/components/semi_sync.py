"""Replica groups that train apart and meet every so many steps: DiLoCo and local SGD.

Between two meetings, each group trains on its own share of the batch, with its own optimizer. At a
meeting, the change of the weights since the last one, averaged over the groups, is the gradient of
an outer optimizer: SGD with Nesterov momentum (DiLoCo, arXiv:2311.08105). At a learning rate of 1
without momentum, the weights become the average of those of the groups (arXiv:1805.09767). So the
groups communicate `sync_steps` times less, and may be far from each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from torchtitan.components.checkpoint.model_tensors import saved_buffers
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.names import canonical_name
from torchtitan.distributed.stage_copies import copies_of
from torchtitan.tools.logging import rank0

if TYPE_CHECKING:
    from torchtitan.components.checkpoint import TrainState
    from torchtitan.components.fault_tolerance import Replicas
    from torchtitan.config import JobConfig
    from torchtitan.runtime.stop_request import StopRequest


_LAST_ATTEMPTS = 3
"""After the last step, when no later meeting makes up for one that fails."""


class SemiSync:
    """Holds meetings of the replica groups; without `fault_tolerance.semi_sync_method`, none.

    All ranks of a replica group call each method together.

    Args:
        model_parts: this rank's parts of the model, whose weights are allocated.
        train_state: the trainer's counters; a group that is behind takes over the step, too.
    """

    def __init__(
        self,
        job_config: JobConfig,
        model_parts: list[nn.Module],
        replicas: Replicas,
        train_state: TrainState,
    ) -> None:
        config = job_config.fault_tolerance
        self.enabled = replicas.semi_sync
        self._config, self._steps = config, job_config.training.steps
        self._parts, self._replicas, self._train_state = model_parts, replicas, train_state
        self._began = 0
        """The step after which the round began: that of the last meeting that succeeded."""
        self._tokens = 0
        self._loaded = False
        averages = config.semi_sync_method == "local_sgd"
        self._lr = 1.0 if averages else config.outer_lr
        self._momentum = 0.0 if averages else config.outer_momentum
        # On the host, since they are needed only at meetings, and in float32, as outer updates of
        # bfloat16 weights may be small.
        weights = self._weights() if self.enabled else {}
        self._start = {n: w.to("cpu", torch.float32, copy=True) for n, w in weights.items()}
        self._velocity = {name: torch.zeros_like(t) for name, t in self._start.items()}

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the trained weights, but no copies of another stage's: see `StageCopies`."""
        copies = copies_of(self._parts)
        return {
            canonical_name(name): param.detach()
            for part in self._parts
            for name, param in part.named_parameters()
            if param.requires_grad and param not in copies
        }

    def _buffers(self) -> list[torch.Tensor]:
        """Return this rank's parts of buffers that training may change, as of routers' biases."""
        buffers = saved_buffers(self._parts).values()
        return [local_tensor(t) for t in buffers if t.is_floating_point()]

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self._start,
            "velocity": self._velocity,
            "began": torch.tensor(self._began),
            "tokens": torch.tensor(self._tokens),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state whose tensors are in place."""
        self._began, self._tokens = int(state_dict["began"]), int(state_dict["tokens"])
        self._loaded = True

    def begin(self) -> None:
        """Start the first round at the present weights, unless a checkpoint had a round's."""
        if self._loaded or not self.enabled:
            return
        self._began = self._train_state.step
        for name, weight in self._weights().items():
            local_tensor(self._start[name]).copy_(local_tensor(weight))

    def count(self, tokens: torch.Tensor) -> None:
        """Count trained tokens: a group's change of the weights counts by their number."""
        self._tokens += int(tokens)

    def is_due(self) -> bool:
        """Return whether the groups meet after the present step."""
        step = self._train_state.step
        return self.enabled and (step % self._config.sync_steps == 0 or step == self._steps)

    @torch.no_grad()
    def meet(self, stop: StopRequest) -> bool:
        """Update the weights by the changes of all groups.

        A group that is behind takes over the state of another first, and changes nothing. If a
        group fails during the meeting, all go back to the weights of the last one; after the last
        step, the others meet again.

        Returns:
            Whether any rank was asked to stop while there were too few groups, equal on all ranks.
            The round then goes on. After the last step, which no later meeting follows, the groups
            wait in any case.
        """
        last = self._train_state.step == self._steps
        for _ in range(_LAST_ATTEMPTS if last else 1):
            # A meeting may succeed for some of the groups only, which then are ahead of the others.
            # The others have the same step, or after a restart the same round but another step.
            progress = self._began * 2**32 + self._train_state.step
            if self._replicas.agree(progress, None if last else stop):
                self._tokens = 0
            if self._replicas.too_few:
                return True
            self._replicas.refuse_others()
            if self._begin_round():
                break
        else:
            rank0.warning(
                "step %d: a replica group left during the meeting, so the groups go back to the "
                "weights of the last one, and what they learned since then is lost",
                self._train_state.step,
            )
        for name, weight in self._weights().items():
            local_tensor(weight).copy_(local_tensor(self._start[name]))
        self._tokens = 0
        return False

    def _begin_round(self) -> bool:
        """Set where the next round starts. Return False, without a change, if a group fails."""
        all_tokens = int(self._replicas.total(torch.tensor(self._tokens)))
        share = self._tokens / max(all_tokens, 1)
        weights = {name: local_tensor(t) for name, t in self._weights().items()}
        start = {name: local_tensor(t) for name, t in self._start.items()}
        # From where the round began: at the start, rounded to the dtype of the weights.
        changes = [share * (start[n].to(w.device, w.dtype) - w).float() for n, w in weights.items()]
        buffers = self._buffers()
        averages = [share * buffer for buffer in buffers]
        self._replicas.add_up([*changes, *averages])
        if not self._replicas.agreed():
            return False
        for (name, origin), change in zip(start.items(), changes, strict=True):
            change = change.to(origin.device)
            velocity = local_tensor(self._velocity[name]).mul_(self._momentum).add_(change)
            origin.sub_(self._lr * (change + self._momentum * velocity))
        if all_tokens:
            for buffer, average in zip(buffers, averages, strict=True):
                buffer.copy_(average)
        self._began = self._train_state.step
        return True
