"""Plans of optimizer state in bfloat16, of which some is float32 for a moment."""

from __future__ import annotations

import pytest

from torchtitan.components import rounded_adam
from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models import llama3
from torchtitan.planning.estimate import _trace_deep
from torchtitan.planning.inputs import TOKEN_IDS
from torchtitan.planning.trace import meta_model, repetitions_of
from torchtitan.protocols.model import layers_of
from torchtitan.runtime.fake_world import fake_world


def test_what_is_float32_for_a_moment_does_not_grow_with_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchtitan.planning.repetition._EDGE", 1)  # fewer layers show it, too
    args = llama3.Llama3ModelArgs(
        dim=64, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=160, vocab_size=256
    )
    monkeypatch.setitem(llama3.MODEL_CONFIGS, "eight", args)
    most = 100_000  # numbers: more than the traced layers have, and less than all
    monkeypatch.setattr(rounded_adam, "_MOST_ELEMENTS", most)
    config = load_config(
        [
            *("--model.flavor=eight", "--optimizer.state_dtype=bfloat16"),
            *("--training.seq_len=16", "--training.local_batch_size=1"),
            "--activation_checkpoint.mode=none",
        ]
    )
    with fake_world(2, 0):
        dims = ParallelDims.from_config(config.parallelism, 2)
        model = meta_model(config, dims)
        assert repetitions_of(model, config, TOKEN_IDS)
        layers = dict.fromkeys(layers_of(model), "the same")
        trace = _trace_deep(config, model, 0, TOKEN_IDS, layers, {})
    assert trace.gradients > 4 * 1.5 * most
    assert trace.optimizer_state == pytest.approx(trace.gradients, rel=0.01)
    assert trace.optimizer_temporary == pytest.approx(8 * most, rel=0.05)
