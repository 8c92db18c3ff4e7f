"""What attention computes and holds where its mask rules pairs out, as planned for CUDA."""

from __future__ import annotations

import functools

import pytest
import torch

from torchtitan.config import load_config
from torchtitan.models.common.attention import CausalMask, dense_mask
from torchtitan.planning.cuda_attention import _allowed_share
from torchtitan.planning.records import StageTrace
from torchtitan.planning.trace import trace_step
from torchtitan.runtime.fake_world import fake_world

SEQ, LAYERS = 1024, 2


@functools.cache
def traced(world_size: int, *options: str, model: str = "llama3", seq_len: int = SEQ) -> StageTrace:
    argv = [f"--model.name={model}", "--model.flavor=debugmodel", f"--training.seq_len={seq_len}"]
    argv += ["--training.local_batch_size=1", "--activation_checkpoint.mode=none", *options]
    if model in ("llama3", "deepseek_v3"):  # layers of the others differ
        argv += [f"--model.args.n_layers={LAYERS}"]
    with fake_world(world_size, 0):
        return trace_step(load_config(argv))


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


def test_tensor_parallelism_shares_all_products_beside_a_ring() -> None:
    def total(stage: StageTrace) -> float:
        return sum(
            calls * op.flops
            for part in (stage.forward, stage.backward)
            for op, calls in part.operations.items()
        )

    options = ["--parallelism.context_parallel_degree=2"]
    options += ["--parallelism.context_parallel_method=ring"]
    options += ["--parallelism.tensor_parallel_degree=2"]
    assert 4 * total(traced(4, *options)) == pytest.approx(total(traced(2)), rel=0.02)


def bend(world_size: int, *options: str, model: str = "llama3") -> float:
    """How much more memory activations take for each `SEQ` tokens, as a share: 0 is linear."""
    sizes = [
        traced(world_size, *options, model=model, seq_len=n * SEQ).activations for n in (1, 2, 3)
    ]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    return second / first - 1


def test_the_last_queries_of_a_prefix_hold_no_mask() -> None:
    """CUDA's flash kernel has a triangle that ends at the last key."""
    assert abs(bend(4, "--parallelism.context_parallel_degree=4")) < 0.001


@pytest.mark.parametrize("cp", [pytest.param(1, marks=pytest.mark.long), 2])
def test_values_smaller_than_queries_hold_no_scores(cp: int) -> None:
    """DeepSeek's. The CPU has no fused kernel for them, CUDA has."""
    options = [f"--parallelism.context_parallel_degree={cp}"]
    assert abs(bend(2, *options, model="deepseek_v3")) < 0.001
    forward, backward = attention_flops(traced(2, *options, model="deepseek_v3"))
    pairs = SEQ * SEQ / 2 / cp
    heads, sizes = 8, 32 + 16
    assert forward == pytest.approx(LAYERS * heads * pairs * 2 * sizes, rel=0.01)
    assert backward == 2.5 * forward


def test_documents_hold_no_mask() -> None:
    options = ["--training.document_mask=true"]
    assert abs(bend(2, *options)) < 0.001
    # How long documents are is not known: they are as long as the sequence.
    assert attention_flops(traced(2, *options)) == pytest.approx(
        attention_flops(traced(2)), rel=0.01
    )


def test_sdpa_holds_the_masks_of_documents_and_skips_nothing() -> None:
    options = ["--training.document_mask=true", "--model.attention=sdpa"]
    assert bend(2, *options) > 0.1
    assert attention_flops(traced(2, *options))[0] == 2 * attention_flops(traced(2))[0]


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("gemma3", 32),
        pytest.param("gpt_oss", 32, marks=pytest.mark.long),
        pytest.param("llama4", 64 / 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_windows_and_chunks_are_less_work(model: str, keys: float) -> None:
    """Of these models some layers see all keys. Args: keys: that a query sees in the others."""
    operations = traced(2, model=model).forward.operations
    flops = {op.flops for op in operations if "attention" in op.name and op.flops}
    assert min(flops) / max(flops) == pytest.approx(keys / (SEQ / 2), rel=0.25)


@pytest.mark.long
def test_windows_hold_no_mask() -> None:
    assert abs(bend(2, model="gemma3")) < 0.001
    options = ["--parallelism.context_parallel_degree=2"]
    whole, share = (traced(2, *more, model="gemma3") for more in ([], options))
    assert 2 * attention_flops(share)[0] == pytest.approx(attention_flops(whole)[0], rel=0.01)


def test_the_share_of_pairs_is_that_of_the_rule() -> None:
    for window, chunk in [(None, None), (5, None), (None, 8), (3, 8), (20, 8), (40, None)]:
        for seq_len in (16, 20, 33):
            rule = CausalMask(window=window, chunk=chunk).rule(None, None)
            allowed = dense_mask(rule, 1, seq_len, seq_len, torch.device("cpu"))
            share = _allowed_share(seq_len, window, chunk)
            assert share == pytest.approx(allowed.double().mean().item()), (window, chunk, seq_len)
