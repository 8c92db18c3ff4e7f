"""Lists the layouts that a search considers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.config.batch import batch_sizes
from torchtitan.protocols.model import layers_of
from torchtitan.protocols.train_spec import train_spec_of
from torchtitan.tools.multiples import divisors

from .trace import meta_model

AC_MODES = ("none", "selective", "full")
SCHEDULES = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble")
STAGES = {"": 1, "1F1B": 1, "Interleaved1F1B": 2, "ZBVZeroBubble": 2}
"""Schedule -> stages of a rank."""
_MICRO_BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """One layout. The global batch is the one of the search."""

    replicate: int
    shard: int
    cp: int
    tp: int
    pp: int
    ep: int
    ac: str
    local_batch: int
    micro_batch: int
    schedule: str
    """"" without a pipeline."""

    def config(self, job: JobConfig) -> JobConfig:
        config = copy.deepcopy(job)
        parallelism: Any = config.parallelism
        checkpointing: Any = config.activation_checkpoint
        parallelism.data_parallel_replicate_degree = self.replicate
        parallelism.data_parallel_shard_degree = self.shard
        parallelism.context_parallel_degree = self.cp
        parallelism.tensor_parallel_degree = self.tp
        parallelism.pipeline_parallel_degree = self.pp
        parallelism.expert_parallel_degree = self.ep
        parallelism.expert_tensor_parallel_degree = 1
        parallelism.pipeline_parallel_split_points = []
        parallelism.pipeline_parallel_stages_per_rank = -1
        parallelism.pipeline_parallel_schedule_csv = ""
        parallelism.fsdp_reshard_after_forward = "default"
        parallelism.enable_async_tensor_parallel &= self.tp > 1
        if self.pp > 1:
            parallelism.pipeline_parallel_schedule = self.schedule
            parallelism.pipeline_parallel_microbatch_size = self.micro_batch
        config.training.local_batch_size = self.local_batch
        checkpointing.mode = self.ac
        checkpointing.selective_ac_option = "op"
        return config

    def __str__(self) -> str:
        degrees = {"replicate": self.replicate, "shard": self.shard, "cp": self.cp, "tp": self.tp}
        degrees |= {"pp": self.pp, "ep": self.ep}
        return " x ".join(f"{name} {size}" for name, size in degrees.items() if size > 1) or "one"


def candidates(config: JobConfig, world_size: int, host_size: int) -> Iterator[Candidate]:
    """Yield all layouts that the arithmetic of degrees and batches allows.

    Tensor parallel stays within a host, and context parallel leaves a rank at least 2048 tokens.
    """
    spec = train_spec_of(config)
    args = spec.updated_args(config)
    layers = len(layers_of(meta_model(single_layout(config))))
    batch, seq = batch_sizes(single_layout(config), 1).unit, config.training.seq_len
    compiled = config.compile.compiles("model")
    for tp in divisors(math.gcd(host_size, world_size)):
        for cp in divisors(world_size // tp):
            if cp > 1 and (seq // cp < 2048 or seq % (2 * cp)):
                continue
            stages = world_size // tp // cp if spec.pipeline_fn is not None else 1
            for pp in [p for p in divisors(stages) if p <= layers]:
                data = world_size // tp // cp // pp
                if batch % data:
                    continue
                for replicate in divisors(data):
                    shard = data // replicate
                    for ep in divisors(math.gcd(args.num_experts or 1, shard * cp * tp)):
                        degrees = (replicate, shard, cp, tp, pp, ep)
                        yield from _batches(degrees, batch // data, layers, compiled)


def _batches(
    degrees: tuple[int, int, int, int, int, int], batch: int, layers: int, compiled: bool
) -> Iterator[Candidate]:
    """Args: batch: sequences of a data rank in a step."""
    pp = degrees[4]
    for ac in AC_MODES:
        for size in [b for b in _MICRO_BATCHES if batch % b == 0]:
            if pp == 1:
                yield Candidate(*degrees, ac, size, size, "")
                continue
            for schedule in SCHEDULES:
                if pp * STAGES[schedule] > layers or batch // size < pp:
                    continue
                if schedule == "ZBVZeroBubble" and (ac != "none" or compiled):
                    continue  # its bubble would be that of others, see `splits_backward`
                yield Candidate(*degrees, ac, batch, size, schedule)


def single_layout(config: JobConfig, ac: str = "none") -> JobConfig:
    """Return the job sharded over two devices, as any model can be, with one sequence at a time."""
    degrees = {"replicate": 1, "shard": 2, "cp": 1, "tp": 1, "pp": 1, "ep": 1}
    return Candidate(**degrees, ac=ac, local_batch=1, micro_batch=1, schedule="").config(config)
