"""Detect silent data corruption by faulty hardware, by computing steps twice.

At scale some devices occasionally compute wrongly: Dixit et al., "Silent Data Corruptions at Scale"
(arXiv:2102.11245). Gemini (arXiv:2312.11805, section 4) also detects them by deterministic replay.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.distributed.collective_observer import CollectiveObserver, can_be_observed
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import TrainingError
from torchtitan.runtime.device import device
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.tools.logging import rank0

_MOST_NAMED = 8


class Replay:
    """Computes the gradients of every `training.replay_freq`-th step twice and compares the bits.

    Each rank takes checksums of its inputs to collectives, of its loss and of its gradients. A
    wrong bit spreads with the next collective, so the faulty rank is the one whose checksums differ
    first. Pipeline stages run different series of collectives, so the first ranks of each stage are
    named. Collectives of compiled models cannot be observed; then the ranks whose loss differs are
    named or, if there are none, all ranks whose gradients differ.
    """

    def __init__(
        self, job_config: JobConfig, model_parts: list[nn.Module], parallel_dims: ParallelDims
    ) -> None:
        self._freq = job_config.training.replay_freq
        self._model_parts = model_parts
        self._observes_collectives = can_be_observed(model_parts, job_config, device())
        self._stage = parallel_dims.pp_rank
        self._plans = parallel_dims.pp_enabled
        """Whether the next pass also plans a pipeline, whose stages tell each other shapes."""

    def check(
        self, step: int, compute: Callable[[], torch.Tensor], restart: Callable[[], None]
    ) -> torch.Tensor:
        """Return `compute()`, run twice if step `step` is to be checked. All ranks call this.

        Args:
            compute: leaves gradients in the parameters and returns this rank's share of the loss.
            restart: seeds and clears the gradients, as before the first `compute`.

        Raises:
            TrainingError: the two runs differed on any rank; raised on all ranks.
        """
        plans, self._plans = self._plans, False
        if not self._freq or step % self._freq:
            return compute()
        buffers = [buffer for part in self._model_parts for buffer in part.buffers()]
        saved = [buffer.clone() for buffer in buffers]

        @torch.no_grad()
        def go_back() -> None:
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
            restart()

        if plans:
            compute()
            go_back()
        _, first, _ = self._observed(compute)
        go_back()
        loss, second, names = self._observed(compute)
        self._compare(step, first, second, names)
        return loss

    def _observed(
        self, compute: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, list[int], list[str]]:
        """Run `compute`; return the loss, the checksums `[n]`, and a name for each checksum."""
        sums: list[torch.Tensor] = []
        names: list[str] = []

        def observe(name: str, inputs: list[torch.Tensor], call: Callable[[], Any]) -> Any:
            for tensor in inputs:
                names.append(f"its input to {name.strip('_')}")
                sums.append(checksum(tensor))
            return call()

        with CollectiveObserver(observe) if self._observes_collectives else nullcontext():
            loss = compute()
        names.append("its loss")
        sums.append(checksum(loss))
        for part in self._model_parts:
            for name, param in part.named_parameters():
                if param.grad is not None:
                    names.append(f"its gradient of {name}")
                    sums.append(checksum(param.grad))
        return loss, torch.stack([s.to(loss.device) for s in sums]).tolist(), names

    def _compare(self, step: int, first: list[int], second: list[int], names: list[str]) -> None:
        pairs = enumerate(zip(first, second, strict=False))
        different = [at for at, (one, two) in pairs if one != two]
        if len(first) != len(second):
            different.append(min(len(first), len(second)) - 1)
        found = torch.tensor(int(bool(different)))
        sum_over_ranks(found)
        if not found:
            rank0.info("step %d: computed twice, %d checksums agree", step, len(first))
            return

        own = None
        if different:
            # There is no communication between gradients, so they all count as one point in time.
            at = min([*different, names.index("its loss") + 1])
            where = f"rank {dist.get_rank()} ({socket.gethostname()}, {device()})"
            own = self._stage, at, f"{where}, in {names[min(different)]}"
        facts: list[tuple[int, int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(facts, own)
        reports = [fact for fact in facts if fact is not None]
        earliest = {
            stage: min(at for other, at, _ in reports if other == stage) for stage, _, _ in reports
        }
        blamed = [text for stage, at, text in reports if at == earliest[stage]]
        if len(blamed) > _MOST_NAMED:
            blamed = [*blamed[:_MOST_NAMED], f"{len(blamed) - _MOST_NAMED} more"]
        raise TrainingError(
            f"step {step}: the same computation gave different bits the second time, first on "
            f"{' or '.join(blamed)}. The hardware is faulty, or a kernel is not deterministic. In "
            f"the end, {len(reports)} of {len(facts)} ranks differ. Resume from the newest "
            "checkpoint without that host"
        )


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of all elements' bits as integers, modulo 2**64: an int64 scalar.

    It does not depend on the order of summation, and any change of a single element changes it.
    """
    tensor = local_tensor(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.is_floating_point():
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        tensor = tensor.view(integers[tensor.element_size()])
    return tensor.sum(dtype=torch.int64)
