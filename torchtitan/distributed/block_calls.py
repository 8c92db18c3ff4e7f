"""Find calls of blocks that a layout cannot follow: by rank, or in a loop over stages."""

from __future__ import annotations

import zlib
from collections import Counter
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import TrainingError
from torchtitan.runtime.host_sum import all_alike, sum_over_ranks
from torchtitan.tools.logging import logger
from torchtitan.tools.text import few


class BlockCalls:
    """Keeps a digest of the order in which this rank calls its FSDP modules in training.

    All ranks of a pipeline stage gather a module together. If one skips a block, the parts that it
    receives are those of other blocks, often of the same size, so that nothing fails.

    Args:
        model_parts: the parallelized stages of this rank.
    """

    def __init__(self, model_parts: list[nn.Module], parallel_dims: ParallelDims) -> None:
        self._digest = 0
        self._slots = 2 * parallel_dims.pp
        self._own = slice(2 * parallel_dims.pp_rank, 2 * parallel_dims.pp_rank + 2)
        self._ranks = parallel_dims.world_size // parallel_dims.pp
        disable = torch.compiler.disable  # FSDP's own hooks end the compiler's graphs as well
        for number, part in enumerate(model_parts):
            for name, module in part.named_modules():
                if isinstance(module, FSDPModule):
                    record = partial(self._record, f"{number} {name}".encode())
                    cast(nn.Module, module).register_forward_pre_hook(disable(record))

    def _record(self, name: bytes, module: nn.Module, args: Any) -> None:
        if module.training:
            self._digest = zlib.crc32(name, self._digest)

    def take_digests(self) -> list[int]:
        """Return numbers to be summed over all ranks, of the calls since the last time."""
        digest, self._digest = self._digest & 0xFFFF, 0
        numbers = [0] * self._slots
        numbers[self._own] = digest, digest**2
        return numbers

    def compare(self, step: int) -> None:
        """Do so at once, for a step whose result is kept. Raises as `refuse_unequal` does."""
        digests = torch.tensor(self.take_digests())
        sum_over_ranks(digests)
        self.refuse_unequal(digests.tolist(), step)

    def refuse_unequal(self, sums: list[int], step: int) -> None:
        """Raise `TrainingError` on all ranks of a stage if their calls were different.

        Args:
            sums: over all ranks, of `take_digests`.
            step: the one in which they were called.
        """
        if not all_alike(sums[self._own], self._ranks):
            raise TrainingError(
                f"in step {step}, forward() called different modules, or in another order, on some "
                "ranks. Data parallelism gathers a block from all ranks together, so they computed "
                "with parts of other blocks. Call every block on every rank, and multiply by zero "
                "what is not wanted; or choose by something that all ranks have, such as a "
                "number from the data loader, not by tokens or by torch.rand()"
            )


def warn_of_repeated_layers(stage: int, part: nn.Module) -> None:
    """Warn after the first forward pass of a pipeline stage if it called layers several times.

    That is right for a loop within a stage. But a loop over all layers becomes one in each stage.
    """
    layers = getattr(part, "layers", nn.ModuleDict())
    expected = Counter(id(layer) for layer in layers.values())  # one layer may be in two places
    calls: Counter[str] = Counter()

    def tell(*call: Any) -> None:
        for handle in handles:
            handle.remove()
        repeated = [n for n, layer in layers.named_children() if calls[n] > expected[id(layer)]]
        if repeated:
            logger.warning(
                "forward() of pipeline stage %d calls %s several times. If that is a loop over "
                "layers of several stages, the numbers are wrong, since stages run once, one after "
                "the other: set pipeline_fn=None in the TrainSpec. `torchtitan verify --only "
                "stages` compares with the whole model",
                *(stage, few([f"layers.{name}" for name in repeated], 5)),
            )

    handles = [part.register_forward_hook(tell)]
    for name, layer in layers.named_children():
        count = partial(lambda name, *call: calls.update([name]), name)
        handles.append(layer.register_forward_pre_hook(count))
