"""Bytes that a rank sends and memory that it needs in each layout, against the textbook formulas.

    python -m benchmarks.parallel

One process traces one rank of each layout with fake tensors (`torchtitan.planning.trace`): the real
model, the real `parallelize_fn`, the real optimizer. The sizes are such that parameters outweigh
activations, as the memory formula counts the former alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torchtitan.config import load_config
from torchtitan.models.llama3 import MODEL_CONFIGS, Llama3ModelArgs
from torchtitan.planning.collectives import sent_by_group
from torchtitan.planning.trace import fake_world, trace_step

FLOAT = 4  # bytes
FLAVOR = "benchmark"
ARGS = Llama3ModelArgs(
    dim=1024, n_layers=16, n_heads=16, n_kv_heads=8, ffn_dim=4096, vocab_size=8192
)
SEQ = 32
TOLERANCE = 0.1


@dataclass
class Layout:
    """Degrees of one run. Other ranks are in `shard`."""

    rep: int = 1
    shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.rep * self.shard * self.cp * self.tp

    def __str__(self) -> str:
        used = {"DDP": self.rep, "FSDP": self.shard, "CP": self.cp, "TP": self.tp}
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
]


def parameters() -> tuple[float, float]:
    """All of the model, and those of its largest group that FSDP gathers (a block)."""
    total, _ = ARGS.get_nparams_and_flops(SEQ)
    block = (total - 2 * ARGS.vocab_size * ARGS.dim - ARGS.dim) / ARGS.n_layers
    return total, block


def expected_bytes(layout: Layout) -> dict[tuple[str, str], float]:
    """`(group, kind)` -> bytes that a rank sends in a step, ring algorithms."""
    total, _ = parameters()
    shards = layout.shard * layout.cp
    held = total / layout.tp * FLOAT  # a tensor-parallel rank's part of the parameters
    expected: dict[tuple[str, str], float] = {}
    if shards > 1:  # gathered forward and backward, and the gradients scattered
        others = (shards - 1) / shards
        fsdp = "fsdp" if layout.shard > 1 else "cp"  # the same ranks
        expected[fsdp, "all_gather"] = 2 * held * others
        expected[fsdp, "reduce_scatter"] = held * others
    if layout.rep > 1:
        expected["dp_replicate", "all_reduce"] = 2 * (layout.rep - 1) / layout.rep * held / shards
    if layout.tp > 1:
        # Into and out of attention and feed-forward, forward and backward; embedding and output.
        hidden = SEQ / layout.cp * ARGS.dim * FLOAT * (layout.tp - 1) / layout.tp
        for kind in ("all_gather", "reduce_scatter"):
            expected["tp", kind] = (4 * ARGS.n_layers + 2) * hidden
    if layout.cp > 1:
        # Keys and values are gathered, and their gradients scattered.
        kv = 2 * SEQ * ARGS.n_kv_heads * ARGS.head_dim / layout.tp * FLOAT
        for kind in ("all_gather", "reduce_scatter"):
            moved = ARGS.n_layers * kv * (layout.cp - 1) / layout.cp
            expected["cp", kind] = expected.get(("cp", kind), 0.0) + moved
    return expected


def expected_memory(layout: Layout) -> float:
    """Bytes at the peak, which is at the end of the backward pass.

    The state, and under FSDP four copies of a block: the parameters of the one at work and of the
    next, the gradients, and these again as the collective sends them.
    """
    total, block = parameters()
    shards = layout.shard * layout.cp
    state = 4 * FLOAT * total / shards  # parameter, gradient, two moments
    gathered = 4 * FLOAT * block if shards * layout.rep > 1 else 0.0
    return (state + gathered) / layout.tp


def measure(layout: Layout) -> tuple[dict[tuple[str, str], float], float]:
    config = load_config(
        [
            f"--model.flavor={FLAVOR}",
            f"--training.seq_len={SEQ}",
            "--training.local_batch_size=1",
            "--training.mixed_precision_param=float32",
            "--activation_checkpoint.mode=none",
            "--parallelism.fsdp_reshard_after_forward=always",
            f"--parallelism.data_parallel_replicate_degree={layout.rep}",
            f"--parallelism.data_parallel_shard_degree={layout.shard}",
            f"--parallelism.context_parallel_degree={layout.cp}",
            f"--parallelism.tensor_parallel_degree={layout.tp}",
        ]
    )
    with fake_world(layout.world_size, rank=0):
        trace = trace_step(config)
    sent = {key: total for key, (_, total) in sent_by_group(trace.collectives).items()}
    return sent, trace.peak_memory


def main() -> int:
    """Print the table; 1 if a figure is off by more than 10%."""
    MODEL_CONFIGS[FLAVOR] = ARGS
    print("| layout | what | measured | formula | ratio |\n|---|---|---|---|---|")
    worst = 0.0
    for layout in LAYOUTS:
        sent, memory = measure(layout)
        rows = [("peak memory", memory, expected_memory(layout))]
        rows += [
            (f"{kind} over {group}", sent.get((group, kind), 0.0), formula)
            for (group, kind), formula in expected_bytes(layout).items()
        ]
        for what, measured, formula in rows:
            ratio = measured / formula
            worst = max(worst, abs(ratio - 1))
            mib = f"{measured / 2**20:.2f} MiB | {formula / 2**20:.2f} MiB"
            print(f"| {layout} | {what} | {mib} | {ratio:.3f} |")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
