"""What attention computes and holds where its mask rules pairs out, as planned for CUDA."""

from __future__ import annotations

import pytest

from torchtitan.config import load_config
from torchtitan.planning.records import StageTrace
from torchtitan.planning.trace import fake_world, trace_step

SEQ = 1024


def traced(world_size: int, *options: str, model: str = "llama3") -> StageTrace:
    argv = [f"--model.name={model}", "--model.flavor=debugmodel", f"--training.seq_len={SEQ}"]
    argv += ["--training.local_batch_size=1", "--activation_checkpoint.mode=none", *options]
    with fake_world(world_size, 0):
        return trace_step(load_config(argv)).stages[0]


def attention_flops(stage: StageTrace) -> tuple[float, float]:
    """Of the forward and the backward pass."""
    forward, backward = (
        sum(calls * op.flops for op, calls in part.operations.items() if "attention" in op.name)
        for part in (stage.forward, stage.backward)
    )
    return forward, backward


@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
def test_ranks_that_share_a_sequence_share_its_attention(method: str) -> None:
    whole = attention_flops(traced(2))
    assert whole[0] > 0 and whole[1] == 2.5 * whole[0]
    options = ["--parallelism.context_parallel_degree=4"]
    options += [f"--parallelism.context_parallel_method={method}"]
    share = attention_flops(traced(4, *options))
    assert [4 * flops for flops in share] == pytest.approx(whole, rel=0.01)


def bend(world_size: int, *options: str, model: str = "llama3") -> float:
    """How much more memory activations take for each `SEQ` tokens, as a share: 0 is linear."""
    sizes = [
        traced(world_size, *options, f"--training.seq_len={n * SEQ}", model=model).activations
        for n in (1, 2, 3)
    ]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    return second / first - 1


def test_the_last_queries_of_a_prefix_hold_no_mask() -> None:
    """CUDA's flash kernel has a triangle that ends at the last key."""
    assert abs(bend(4, "--parallelism.context_parallel_degree=4")) < 0.001
