"""Plans of Muon, whose ranks exchange matrices: each works on some of them, whole."""

from __future__ import annotations

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.parallel_dims import CONFIG_KEYS, ParallelDims
from torchtitan.models import llama3, qwen3
from torchtitan.models.common.moe import MoEArgs
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import _trace_deep, plan_run
from torchtitan.planning.inputs import TOKEN_IDS
from torchtitan.planning.trace import meta_model, meta_parts, repetitions_of, trace_step
from torchtitan.protocols.model import layers_of
from torchtitan.runtime.fake_world import fake_world

DENSE = llama3.Llama3ModelArgs(
    dim=64, n_layers=6, n_heads=8, n_kv_heads=4, ffn_dim=160, vocab_size=256
)
MOE = qwen3.Qwen3ModelArgs(
    dim=64,
    n_layers=6,
    n_heads=8,
    n_kv_heads=4,
    head_dim=16,
    vocab_size=256,
    moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=48),
)


@pytest.fixture(autouse=True)
def flavors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama3.MODEL_CONFIGS, "muon", DENSE)
    monkeypatch.setitem(llama3.MODEL_CONFIGS, "muon_12", llama3.Llama3ModelArgs(**vars(DENSE)))
    llama3.MODEL_CONFIGS["muon_12"].n_layers = 12
    monkeypatch.setitem(qwen3.MODEL_CONFIGS, "muon", MOE)


def job(model: str, flavor: str = "muon", **degrees: int) -> JobConfig:
    options = [f"--model.name={model}", f"--model.flavor={flavor}", "--optimizer.name=Muon"]
    options += ["--training.seq_len=16", f"--training.local_batch_size={degrees.get('pp', 1)}"]
    options += ["--activation_checkpoint.mode=none"]
    return load_config(
        [*options, *(f"--parallelism.{CONFIG_KEYS[k]}={n}" for k, n in degrees.items())]
    )


LAYOUTS = {
    "fsdp": (4, job("llama3")),
    "many": (128, job("llama3")),
    "ddp": (2, job("llama3", dp_replicate=2)),
    "hsdp": (8, job("llama3", dp_replicate=2)),
    "tp": (2, job("llama3", tp=2)),
    "fsdp_tp": (8, job("llama3", tp=2)),
    "pp": (8, job("llama3", "muon_12", pp=2)),
    "moe": (8, job("qwen3")),
    "ep": (4, job("qwen3", ep=2)),
    "ep_hsdp": (8, job("qwen3", ep=2, dp_replicate=2)),
    "ep_etp": (8, job("qwen3", ep=2, tp=2, etp=2)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "fsdp" else [pytest.mark.long]) for n in LAYOUTS]
)
def test_an_extrapolated_step_is_that_of_all_layers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly. Which matrices a rank works on depends on how many there are."""
    monkeypatch.setattr("torchtitan.planning.repetition._EDGE", 1)  # fewer layers show it, too
    world_size, config = LAYOUTS[name]
    for place in range(config.parallelism.pipeline_parallel_degree):
        rank = place * world_size // config.parallelism.pipeline_parallel_degree
        with fake_world(world_size, rank):
            dims = ParallelDims.from_config(config.parallelism, world_size)
            model = meta_model(config, dims)
            (part,) = meta_parts(model, config, [place])
            assert repetitions_of(part, config, TOKEN_IDS)
            layers = dict.fromkeys(layers_of(model), "the same")
            short = _trace_deep(config, part, place, TOKEN_IDS, layers, {})
        with fake_world(world_size, rank):
            whole = trace_step(config, stage=place)
        assert short.exchanged == whole.exchanged > 0
        assert short.optimizer == whole.optimizer
        assert short.optimizer_temporary == whole.optimizer_temporary
        assert short.optimizer_state == whole.optimizer_state
        assert short.gradients == whole.gradients


def test_a_step_waits_for_the_matrices_of_other_replicas_over_the_network() -> None:
    plan = plan_run(job("llama3", "debugmodel", dp_replicate=2), 4, DEVICES["h100"], host_size=2)
    (rank,) = plan.ranks
    (exchanges,) = (t for t in rank.traffic if t.kind == "all_to_all")
    kind = "all_gather", "dp_replicate"
    (copies,) = (t for t in rank.traffic if (t.kind, t.group) == kind)
    assert (exchanges.group, exchanges.ranks, copies.ranks) == ("fsdp", 2, 2)
    assert (exchanges.link, copies.link) == ("host", "network")
    assert rank.waiting_seconds >= exchanges.seconds + copies.seconds > 0
    # Of each 4 of the 28 matrices a rank gathers one within its replica, which has the other half,
    # and sends that half back. Then it has halves of two, and gets those of the other two: in
    # bfloat16, of sizes that are about even.
    args = llama3.MODEL_CONFIGS["debugmodel"]
    matrices = plan.nparams - 2 * args.vocab_size * args.dim
    assert (exchanges.calls, copies.calls) == (2 * 28 / 4, 28 / 4)
    assert exchanges.sent == pytest.approx(matrices / 4 * 2 * (1 / 2 + 1 / 2), rel=0.1)
    assert copies.sent == pytest.approx(matrices / 4 * 2 * (2 / 2), rel=0.1)
