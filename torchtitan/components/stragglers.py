"""Find the rank that the others wait for.

In synchronous training all ranks take the same time for a step, since fast ranks wait for slow
ones. So this measures the time that each rank does not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.distributed.collective_observer import CollectiveObserver, can_be_observed
from torchtitan.runtime.host_sum import seconds_between_pairs, sum_over_ranks

_BETWEEN_PAIRS = ("send", "recv_")
"""Of sums over ranks, which count their time themselves. To wait for one of these twice, here and
where it is called, would be to wait for another message."""


class Stragglers:
    """Times each rank's own work in one step every `metrics.straggler_freq` steps.

    In that step the device is synchronized before and after each collective, which removes the
    overlap of communication and computation. The results of the step do not change.
    """

    def __init__(
        self, job_config: JobConfig, model_parts: list[nn.Module], device: torch.device
    ) -> None:
        """Raise `ConfigError` if compiled code or flex attention makes timing impossible."""
        self._freq = job_config.metrics.straggler_freq
        if self._freq and not can_be_observed(model_parts, job_config, device):
            problem = "the collectives of compiled models and of flex attention cannot be timed."
            fail(job_config, "metrics.straggler_freq", f"{problem} Use 0")
        self._device = device
        self._own: float | None = None
        self._waited = 0.0

    @contextmanager
    def measure(self, step: int) -> Iterator[None]:
        """Time the enclosed step if `step` is due."""
        if not self._freq or step % self._freq:
            yield
            return
        self._waited = -seconds_between_pairs()
        begin = self._clock()
        with CollectiveObserver(self._time):
            yield
        self._waited += seconds_between_pairs()
        self._own = self._clock() - begin - self._waited

    def metrics(self) -> dict[str, float]:
        """Return times of the last step measured since the last call; empty if none. Collective.

        * `own_seconds_mean`, `own_seconds_max`: time that ranks spent in the step waiting for data,
          computing and launching kernels, without communication;
        * `slowest_rank`: the rank with the largest time.
        """
        if self._own is None:
            return {}
        own, self._own = torch.tensor(self._own, dtype=torch.float64), None
        total, most = own.clone(), own.clone()
        sum_over_ranks(total)
        sum_over_ranks(most, dist.ReduceOp.MAX)
        slowest = torch.tensor(dist.get_rank() if own == most else dist.get_world_size())
        sum_over_ranks(slowest, dist.ReduceOp.MIN)
        return {
            "own_seconds_mean": float(total) / dist.get_world_size(),
            "own_seconds_max": float(most),
            "slowest_rank": int(slowest),
        }

    def _time(self, name: str, inputs: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        if name in _BETWEEN_PAIRS:
            return call()
        begin = self._clock()
        result = call()
        # On a GPU, the clock waits. There a work may be a null pointer, which NCCL returns for
        # calls that are not asynchronous, and to wait for it would crash (torch 2.11 to 2.13).
        if self._device.type == "cpu" or any(tensor.device.type == "cpu" for tensor in inputs):
            _wait(result)
        self._waited += self._clock() - begin
        return result

    def _clock(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()


def _wait(result: Any) -> None:
    """Wait for the result of a collective.

    `c10d` operations return a work, or tensors and a work; `_c10d_functional` operations return one
    or several tensors.
    """
    parts = result if isinstance(result, (tuple, list)) else [result]
    for part in parts:
        if isinstance(part, torch.ScriptObject):
            cast(Any, part).wait()
    if all(isinstance(part, torch.Tensor) for part in parts):
        for part in parts:
            torch.ops._c10d_functional.wait_tensor(part)
