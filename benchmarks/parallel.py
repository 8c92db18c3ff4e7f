"""Compares the bytes sent and memory used by a rank in each layout with the textbook formulas.

    python -m benchmarks.parallel

One process plans each layout from traces with fake tensors (`torchtitan.planning`): the real
model, the real `parallelize_fn`, the real optimizer. Pipelines send according to their schedule, so
they run for real, with one process per rank over gloo. The sizes are chosen so that parameters
outweigh activations, as the memory formula counts only parameters.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.report import Table, verdict
from torchtitan.config import JobConfig, load_config
from torchtitan.models import llama3, qwen3
from torchtitan.models.common.moe import MoEArgs
from torchtitan.planning.collectives import CollectiveRecorder
from torchtitan.planning.cuda_kernels import norm_of_cuda
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.memory import PeakMemory
from torchtitan.planning.plan import Plan
from torchtitan.runtime.ranks import Ranks

FLAVOR = "benchmark"
DENSE = llama3.Llama3ModelArgs(
    dim=1024, n_layers=16, n_heads=16, n_kv_heads=8, ffn_dim=4096, vocab_size=8192
)
MOE = qwen3.Qwen3ModelArgs(
    dim=1024,
    n_layers=8,
    n_heads=16,
    n_kv_heads=8,
    head_dim=64,
    vocab_size=8192,
    moe=MoEArgs(num_experts=8, top_k=2, hidden_dim=512),
)
SEQ = 32
FLOAT = 4  # bytes of gradients, moments and weights
TOLERANCE = 0.1

Sent = dict[tuple[str, str], float]
"""`(group, kind)` -> bytes that a rank sends in a step."""


@dataclass
class Layout:
    """Degrees of one run. All remaining ranks are in `shard`."""

    rep: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    """The number of `shard` ranks that have different experts."""

    @property
    def world_size(self) -> int:
        return self.rep * self.shard * self.cp * self.tp * self.pp

    @property
    def args(self) -> llama3.Llama3ModelArgs | qwen3.Qwen3ModelArgs:
        return MOE if self.ep > 1 else DENSE

    @property
    def compute_bytes(self) -> int:
        """Bytes in computation: PyTorch traces grouped matrix products in bfloat16 only."""
        return 2 if self.ep > 1 else FLOAT

    @property
    def micro_batches(self) -> int:
        return 4 if self.pp > 1 else 1

    def config(self) -> JobConfig:
        return load_config(
            [
                f"--model.name={'qwen3' if self.ep > 1 else 'llama3'}",
                f"--model.flavor={FLAVOR}",
                f"--training.seq_len={SEQ}",
                f"--training.local_batch_size={self.micro_batches}",
                f"--training.mixed_precision_param={'bfloat16' if self.ep > 1 else 'float32'}",
                "--activation_checkpoint.mode=none",
                "--parallelism.fsdp_reshard_after_forward=always",
                f"--parallelism.data_parallel_replicate_degree={self.rep}",
                f"--parallelism.data_parallel_shard_degree={self.shard}",
                f"--parallelism.context_parallel_degree={self.cp}",
                f"--parallelism.tensor_parallel_degree={self.tp}",
                f"--parallelism.pipeline_parallel_degree={self.pp}",
                f"--parallelism.expert_parallel_degree={self.ep}",
                "--training.dataset=stdlib",
            ]
        )

    def __str__(self) -> str:
        used = {"DDP": self.rep, "FSDP": self.shard, "CP": self.cp, "TP": self.tp}
        used |= {"PP": self.pp, "EP": self.ep}
        return " x ".join(f"{name} {size}" for name, size in used.items() if size > 1)


LAYOUTS = [
    Layout(shard=8),
    Layout(rep=8),
    Layout(rep=2, shard=8),
    Layout(tp=2),
    Layout(tp=4),
    Layout(cp=2),
    Layout(cp=4),
    Layout(shard=4, tp=2),
    Layout(shard=4, cp=2),
    Layout(rep=2, shard=4, cp=2, tp=2),
    Layout(shard=4, ep=4),
    Layout(shard=8, ep=4),
    Layout(pp=2),
    Layout(pp=2, shard=2),
]


@dataclass
class Parameters:
    """Numbers of parameters."""

    total: float
    experts: float
    block: float
    """The largest group that FSDP gathers: a block without separately sharded experts."""

    @classmethod
    def of(cls, layout: Layout) -> Parameters:
        args = layout.args
        total, _ = args.get_nparams_and_flops(SEQ)
        experts = 0.0
        if layout.ep > 1:
            experts = args.n_layers * args.moe.num_experts * 3 * args.dim * args.moe.hidden_dim
        blocks = total - experts - 2 * args.vocab_size * args.dim - args.dim
        return cls(total, experts, blocks / args.n_layers)


def expected_bytes(layout: Layout) -> Sent:
    """Return the bytes sent by ring algorithms."""
    args, parameters = layout.args, Parameters.of(layout)
    shards, compute = layout.shard * layout.cp, layout.compute_bytes
    # A rank's part of the parameters, before FSDP's sharding.
    held = (parameters.total - parameters.experts) / layout.tp / layout.pp
    expected: Sent = {}

    # Parameters are gathered for each forward and each backward pass. Between the micro-batches of
    # a pipeline they stay gathered after the backward pass, so the last one needs its own gather.
    gathers = layout.micro_batches + 1

    def gather_and_scatter(group: str, kept: float, ranks: int) -> None:
        moved = kept * (ranks - 1) / ranks
        expected[group, "all_gather"] = gathers * moved * compute
        expected[group, "reduce_scatter"] = moved * FLOAT

    if shards > 1:
        gather_and_scatter("fsdp", held, shards)
    if layout.rep > 1:
        once = held / shards * FLOAT
        expected["dp_replicate", "all_reduce"] = 2 * (layout.rep - 1) / layout.rep * once
    if layout.tp > 1:
        # Into and out of attention and feed-forward, forward and backward; embedding and output.
        hidden = SEQ / layout.cp * args.dim * compute * (layout.tp - 1) / layout.tp
        for kind in ("all_gather", "reduce_scatter"):
            expected["tp", kind] = (4 * args.n_layers + 2) * hidden
    if layout.cp > 1:
        # Keys and values are gathered, and their gradients scattered.
        kv = 2 * SEQ * args.n_kv_heads * args.head_dim / layout.tp * compute
        for kind in ("all_gather", "reduce_scatter"):
            expected["cp", kind] = args.n_layers * kv * (layout.cp - 1) / layout.cp
    if layout.ep > 1:
        # Each token goes to its experts and back, forward and backward; the load is even.
        rows = SEQ * args.moe.top_k * args.dim * compute
        expected["ep", "all_to_all"] = 4 * args.n_layers * rows * (layout.ep - 1) / layout.ep
        if layout.shard > layout.ep:
            copies = layout.shard // layout.ep
            gather_and_scatter("expert_dp", parameters.experts / layout.ep, copies)
    if layout.pp > 1:
        # A rank sends hidden states to the next, or gradients to the one before.
        expected["pp", "send"] = layout.micro_batches * SEQ * args.dim * compute
    return expected


def expected_memory(layout: Layout) -> float:
    """Return the bytes at the peak, which is at the end of the backward pass.

    These are the state, and under FSDP copies of a block: the parameters of the current block and
    of the next one, the gradients, and the gradients again as sent by the collective. Between the
    micro-batches of a pipeline, all of the stage's parameters and gradients are whole.
    """
    parameters = Parameters.of(layout)
    shards = layout.shard * layout.cp
    state = 4 * FLOAT * parameters.total / shards  # parameter, gradient, two moments
    whole = 0.0
    if shards * layout.rep > 1:
        whole = (2 * layout.compute_bytes + 2 * FLOAT) * parameters.block
    if shards > 1 and layout.pp > 1:
        state -= FLOAT * parameters.total / shards
        whole = 2 * FLOAT * parameters.total / layout.pp
    return (state / layout.pp + whole) / layout.tp


def measure(layout: Layout) -> tuple[Sent, float]:
    """Return the bytes sent by a rank in a step, and its peak memory in bytes."""
    if layout.pp > 1:
        with Ranks(train_and_record, layout.world_size, layout) as ranks:
            of_ranks = ranks.wait(timeout=300)
        return of_ranks[0][0], max(memory for _, memory in of_ranks)
    plan = planned(layout)
    return {(t.group, t.kind): t.sent for t in plan.ranks[0].traffic}, plan.peak


def planned(layout: Layout) -> Plan:
    register()
    return plan_run(layout.config(), layout.world_size, DEVICES["h100"])


def train_and_record(layout: Layout) -> tuple[Sent, float]:
    """Run on a rank: record the second training step, when the optimizer has its state."""
    from torchtitan.runtime.stop_request import StopRequest
    from torchtitan.train import Trainer

    register()
    trainer, stop = Trainer(layout.config()), StopRequest()
    recorder, memory = CollectiveRecorder(trainer.parallel_dims.groups()), PeakMemory()
    trainer.state.step = 1
    trainer.train_step(stop)
    trainer.optimizers.zero_grad()
    memory.add(*_state(trainer))
    trainer.state.step = 2
    with norm_of_cuda(), memory, recorder:  # as in the plans
        trainer.train_step(stop)
    trainer.close()
    sent: Counter[tuple[str, str]] = Counter()
    for collective in recorder.collectives:
        sent[collective.group, collective.kind] += collective.sent
    return sent, memory.peak


def _state(trainer) -> Iterator[torch.Tensor]:
    for part in trainer.model_parts:
        yield from (*part.parameters(), *part.buffers())
    for value in trainer.optimizers.state_dict().values():
        if isinstance(value, torch.Tensor):
            yield value


def register() -> None:
    """Register the models, on any rank."""
    llama3.MODEL_CONFIGS[FLAVOR] = DENSE
    qwen3.MODEL_CONFIGS[FLAVOR] = MOE


def run(quick: bool = False) -> list[Table]:
    """Make the table; `quick` takes one layout for each kind of measurement."""
    table = Table(
        "Bytes sent and memory, against the formulas",
        ["layout", "what", "measured", "formula", "ratio", "off by"],
        note="A rank of each layout in one step. The formulas are in `benchmarks/parallel.py`.",
    )
    for layout in [LAYOUTS[3], LAYOUTS[-2]] if quick else LAYOUTS:
        sent, memory = measure(layout)
        figures = [("peak memory", memory, expected_memory(layout))]
        if layout.pp > 1:
            figures.append(("peak memory, real and planned", memory, planned(layout).peak))
        figures += [
            (f"{kind} over {group}", sent.get((group, kind), 0.0), formula)
            for (group, kind), formula in expected_bytes(layout).items()
        ]
        for what, measured, formula in figures:
            ratio = measured / formula
            sizes = [f"{size / 2**20:.2f} MiB" for size in (measured, formula)]
            within = verdict(abs(ratio - 1), at_most=TOLERANCE)
            table.rows.append([str(layout), what, *sizes, f"{ratio:.3f}", within])
    return [table]


if __name__ == "__main__":
    sys.stdout.write("".join(table.markdown() for table in run()))
