"""The search: what is considered, what wins, what is written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.config.optimizer import ParamRule
from torchtitan.errors import ConfigError
from torchtitan.models import qwen3
from torchtitan.planning.arithmetic import _TP_COLLECTIVES, Arithmetic
from torchtitan.planning.candidates import SCHEDULES, Candidate, candidates
from torchtitan.planning.collectives import Collective, CollectiveRecorder
from torchtitan.planning.command import main
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import _schedule_free, plan_run
from torchtitan.planning.records import PassTrace, StageTrace
from torchtitan.planning.report import search_rows
from torchtitan.planning.search import (
    _MEMORY_MARGIN,
    _TIME_MARGIN,
    _adds_only_replicas,
    _without_impossible_cp,
    search,
)
from torchtitan.planning.trace import trace_step
from torchtitan.preflight.validate import validate


def job(flavor: str, batch: int, seq_len: int = 8192, *options: str) -> JobConfig:
    return load_config(
        [
            f"--model.flavor={flavor}",
            f"--training.global_batch_size={batch}",
            f"--training.seq_len={seq_len}",
            *options,
        ]
    )


def test_every_candidate_has_the_world_and_the_batch() -> None:
    config = job("8B", 64)
    every = list(candidates(config, 32, 8))
    assert len(every) == len(set(every))
    for c in every:
        assert c.replicate * c.shard * c.cp * c.tp * c.pp == 32
        assert 64 % (c.replicate * c.shard * c.local_batch) == 0
        assert c.tp <= 8 and c.ep == 1
        assert (c.pp > 1) == (c.schedule != "")
    layouts = {(c.tp, c.pp) for c in every}
    assert {(1, 1), (8, 1), (1, 4), (4, 8)} <= layouts


def test_interleaved_stages_need_no_micro_batch_each() -> None:
    """With one for each rank, their bubble is half of that of 1F1B."""
    every = list(candidates(job("8B", 4), 4, 8))
    assert {c.schedule for c in every if c.pp == 4} == {*SCHEDULES}
    interleaved = next(c for c in every if c.pp == 4 and c.schedule == "Interleaved1F1B")
    validate(interleaved.config(job("8B", 4)), 4)


def test_each_size_of_batches_that_grow_is_divided() -> None:
    config = job("debugmodel", 24, 256, "--training.batch_size_ramp", "8:10", "12:20")
    for candidate in candidates(config, 8, 8):
        assert 4 % (candidate.replicate * candidate.shard * candidate.local_batch) == 0
        validate(candidate.config(config), 8)


def test_context_parallelism_goes_as_far_as_the_sequence() -> None:
    """Until a rank has 2,048 tokens, and as long as each rank has two chunks of them."""
    for seq_len, most in (65536, 32), (8192, 4), (8196, 2), (8194, 1):
        assert max(c.cp for c in candidates(job("8B", 32, seq_len), 32, 8)) == most


def test_async_tensor_parallel_is_left_out_of_layouts_without_tensor_parallelism() -> None:
    """The trainer refuses it there."""
    config = job("debugmodel", 2, 64, "--parallelism.enable_async_tensor_parallel")
    for tp in 1, 2:
        candidate = Candidate(1, 1, 1, tp, 1, 1, "none", 2, 2, "")
        assert candidate.config(config).parallelism.enable_async_tensor_parallel == (tp > 1)
    with pytest.raises(ConfigError, match="tensor_parallel = true: needs the compiler"):
        search(config, 2, DEVICES["h100"])
    with pytest.raises(ConfigError, match="tensor_parallel_degree of 2 or more"):
        plan_run(config, 2, DEVICES["h100"])


def test_experts_are_spread_only_where_there_are_some() -> None:
    config = load_config(
        ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--training.global_batch_size=8"]
    )
    assert {c.ep for c in candidates(config, 8, 8)} >= {1, 2, 4, 8}


@pytest.mark.long
def test_arithmetic_is_near_to_traces() -> None:
    """The search leaves out what is over its margins by arithmetic."""
    config, device = job("8B", 64, 8192), DEVICES["h100"]
    arithmetic = Arithmetic(config, device, 8)
    every = [c for c in candidates(config, 32, 8) if c.micro_batch <= 2]
    for candidate in every[:: len(every) // 8]:
        plan = plan_run(candidate.config(config), 32, device)
        assert 0.75 < arithmetic.seconds(candidate) / plan.step_seconds < _TIME_MARGIN, candidate
        assert 0.75 < arithmetic.memory(candidate) / plan.peak < _MEMORY_MARGIN, candidate


def test_large_micro_batches_of_small_layers_are_not_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their kernels take little longer than their launches, however many sequences there are."""
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", ("none",))
    config = job("debugmodel", 16, 256)
    arithmetic = Arithmetic(config, DEVICES["h100"], 8)
    for size in (1, 8):
        candidate = Candidate(1, 2, 1, 1, 1, 1, "none", size, size, "")
        plan = plan_run(candidate.config(config), 2, DEVICES["h100"])
        assert 0.75 < arithmetic.seconds(candidate) / plan.step_seconds < _TIME_MARGIN


@pytest.mark.long
def test_experts_of_many_tokens_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights are read and gathered once for all sequences of a micro-batch."""
    deep = replace(qwen3.MODEL_CONFIGS["debugmodel_moe"], n_layers=12)
    monkeypatch.setitem(qwen3.MODEL_CONFIGS, "deep", deep)
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", ("none",))
    config = job("deep", 16, 256, "--model.name=qwen3")
    layout = {"replicate": 1, "shard": 2, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "ac": "none"}
    candidate = Candidate(**layout, local_batch=8, micro_batch=8, schedule="")
    plan = plan_run(candidate.config(config), 2, DEVICES["h100"])
    arithmetic = Arithmetic(config, DEVICES["h100"], 8)
    assert arithmetic.seconds(candidate) < _TIME_MARGIN * plan.step_seconds


def test_the_best_is_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = job("debugmodel", 8, 256)
    few = [c for c in candidates(config, 2, 8) if c.shard == 2 and c.micro_batch == 4]
    assert len(few) == 3  # one for each checkpointing mode
    monkeypatch.setattr("torchtitan.planning.search.candidates", lambda *_: few)
    monkeypatch.setattr("torchtitan.planning.search._TIME_MARGIN", 100.0)
    found = search(config, 2, DEVICES["h100"])
    assert found.finished and found.considered == len(found.traced) == 3
    times = [plan.step_seconds for _, plan in found.fitting]
    assert times == sorted(times) and found.best.step_seconds == times[0]
    # More memory is less time here: all are on the front.
    assert [c.ac for c, _ in found.pareto] == ["none", "selective", "full"]
    peaks = [plan.peak for _, plan in found.pareto]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.long
def test_what_cannot_fit_is_not_the_best() -> None:
    small = replace(DEVICES["h100"], memory=DEVICES["h100"].host_memory_reserved + 2**20)
    found = search(job("debugmodel", 4, 256), 2, small, seconds=1)
    assert found.best is None and found.traced and not found.fitting and not found.pareto
    assert [row[-1] for row in search_rows(found)] == ["does not fit"]
    assert found.hopeless and len(found.traced) == 1


@pytest.mark.long
def test_what_fits_against_the_arithmetic_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest is traced first, and says by how much the arithmetic is too high."""
    config = job("debugmodel", 4, 256)
    few = [c for c in candidates(config, 1, 8) if c.micro_batch in (1, 4)]
    monkeypatch.setattr("torchtitan.planning.search.candidates", lambda *_: few)
    monkeypatch.setattr("torchtitan.planning.search._TIME_MARGIN", 100.0)
    right = Arithmetic.memory
    monkeypatch.setattr(Arithmetic, "memory", lambda self, c: 10_000 * right(self, c))
    found = search(config, 1, DEVICES["h100"])
    assert not found.hopeless and len(found.traced) == len(found.fitting) == len(few) == 6
    # The smallest, then the others in the order of their times, once each.
    assert len({candidate for candidate, _ in found.traced}) == 6


@pytest.mark.long
def test_arithmetic_knows_frozen_parameters_and_other_optimizers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frozen parameter has no gradient and no state. SGD has one moment, and AdamW two."""
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", ("none",))
    layouts = [
        Candidate(1, 1, 1, 1, pp, 1, "none", 4 if pp > 1 else 1, 1, "1F1B" * (pp > 1))
        for pp in (1, 2)
    ]
    frozen = ParamRule(pattern=r"layers\.[0-4]\.", lr_scale=0.0)
    reckoned, traced = {}, {}
    for name, optimizer, rules in (
        ("all", "AdamW", []),
        ("frozen", "AdamW", [frozen]),
        ("SGD", "SGD", []),
    ):
        config = job("debugmodel", 4, 256, f"--optimizer.name={optimizer}")
        config.optimizer.rules = rules
        arithmetic = Arithmetic(config, DEVICES["h100"], 8)
        for layout in layouts:
            plan = plan_run(layout.config(config), layout.pp, DEVICES["h100"])
            reckoned[name, layout], traced[name, layout] = arithmetic.memory(layout), plan.peak
    for name in ("frozen", "SGD"):
        for layout in layouts:
            less, truly_less = (
                memory["all", layout] - memory[name, layout] for memory in (reckoned, traced)
            )
            assert less == pytest.approx(truly_less, rel=0.25), (name, layout)


def test_the_products_of_an_optimizer_are_shared_by_all_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", ("none",))
    replicas = Candidate(2, 2, 1, 1, 1, 1, "none", 2, 2, "")
    reckoned, traced = [], []
    for optimizer in "Muon", "AdamW":
        config = job("debugmodel", 8, 16, f"--optimizer.name={optimizer}")
        (rank,) = plan_run(replicas.config(config), 4, DEVICES["h100"]).ranks
        traced.append(rank.compute_seconds)
        reckoned.append(Arithmetic(config, DEVICES["h100"], 8).seconds(replicas))
    assert reckoned[0] - reckoned[1] == pytest.approx(traced[0] - traced[1], rel=0.01)


def test_arithmetic_counts_the_collectives_of_tensor_parallelism_and_what_they_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Selective checkpointing gathers the inputs of attention and feed forward again."""
    modes = ("none", "selective")
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", modes)
    config = job("debugmodel", 1, 4096, "--model.args.n_layers=6")
    arithmetic = Arithmetic(config, DEVICES["h100"], 8)
    reckoned, traced = [], []
    for ac in (*modes, "full"):
        candidate = Candidate(1, 1, 1, 8, 1, 1, ac, 1, 1, "")
        plan = plan_run(candidate.config(config), 8, DEVICES["h100"])
        traffic = [t for t in plan.ranks[0].traffic if t.kind in ("all_gather", "reduce_scatter")]
        # Of each layer, and four of the embedding and the output.
        assert sum(t.calls for t in traffic) == 6 * _TP_COLLECTIVES[ac] + 4
        if ac in modes:
            reckoned.append(arithmetic.memory(candidate))
            traced.append(plan.peak)
    # It was a third, when both were taken to keep the gathered inputs.
    assert reckoned[0] - reckoned[1] == pytest.approx(traced[0] - traced[1], rel=0.4)


@pytest.mark.parametrize("method", ["allgather", "ring", "ulysses"])
def test_arithmetic_counts_the_collectives_of_context_parallelism(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", ("none",))
    option = f"--parallelism.context_parallel_method={method}"
    config = job("debugmodel", 2, 256, "--model.args.n_kv_heads=4", option)
    arithmetic = Arithmetic(config, DEVICES["h100"], 2)  # devices of a host
    for cp in (2, 4, 8) if method == "ring" else (2, 4):
        candidate = Candidate(1, 1, cp, 1, 1, 1, "none", 2, 2, "")
        plan = plan_run(candidate.config(config), cp, DEVICES["h100"], 2)
        traced = sum(t.seconds for t in plan.ranks[0].traffic if t.group == "cp")
        assert arithmetic.context_parallel_seconds(candidate) == pytest.approx(traced), cp


def test_arithmetic_separates_the_layers_of_a_shallow_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits are no layer's, and a pipeline has them on one rank."""
    monkeypatch.setattr("torchtitan.planning.arithmetic.AC_MODES", ("none",))
    config = job("debugmodel", 4, 256, "--model.args.n_layers=4", "--model.args.vocab_size=32768")
    arithmetic = Arithmetic(config, DEVICES["h100"], 8)
    for pp in 1, 2:
        candidate = Candidate(1, 1, 1, 1, pp, 1, "none", 4, 4 // pp, "1F1B" * (pp > 1))
        plan = plan_run(candidate.config(config), pp, DEVICES["h100"])
        assert 0.85 < arithmetic.memory(candidate) / plan.peak < _MEMORY_MARGIN, candidate


def test_a_layout_that_only_has_more_replicas_is_not_traced() -> None:
    config = job("debugmodel", 8, 256)
    sharded = Candidate(1, 4, 1, 1, 1, 1, "none", 2, 2, "")
    replicas = replace(sharded, replicate=2, shard=2)
    plan, slower = (plan_run(c.config(config), 4, DEVICES["h100"]) for c in (sharded, replicas))
    assert slower.step_seconds > plan.step_seconds and slower.peak > plan.peak
    (rank,) = plan.ranks
    waits = [t for t in rank.traffic if t.group == "fsdp"]
    for waiting, group, skipped in (0.0, "fsdp", True), (1.0, "fsdp", False), (1.0, "tp", True):
        traffic = [replace(waits[0], group=group, seconds=waiting * plan.step_seconds)]
        rank = replace(rank, traffic=traffic, waiting_seconds=waiting * plan.step_seconds)
        assert _adds_only_replicas(replicas, sharded, replace(plan, ranks=[rank])) == skipped
        assert not _adds_only_replicas(sharded, replicas, replace(plan, ranks=[rank]))
    for other in replace(replicas, tp=2, shard=1), replace(replicas, replicate=4, shard=1):
        assert not _adds_only_replicas(other, sharded, replace(plan, ranks=[rank]))
    # What does not fit would fit even less.
    small = replace(plan.device, memory=0.0)
    assert _adds_only_replicas(replicas, sharded, replace(plan, device=small))


def test_the_best_is_written_and_can_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "job.toml", tmp_path / "best.toml"
    config.write_text('[model]\nflavor = "debugmodel"\n[training]\nseq_len = 256\n')
    options = ["--search", "--gpus", "2", "--global-batch-size", "4", "--seconds", "3"]
    assert main([str(config), *options, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "layouts considered" in shown and "Pareto" in shown
    best = load_config([f"--job.config_file={out}"])
    assert best.training.global_batch_size == 4 and best.training.seq_len == 256
    assert plan_run(best, 2, DEVICES["h100"]).room > 0


@pytest.mark.long
def test_layouts_that_cannot_be_are_passed_over_also_where_none_fits() -> None:
    """Of 13 tokens no tensor parallel rank can have its part."""
    found = search(job("405B", 8, 13), 2, DEVICES["h100"], 8, seconds=0)
    assert [candidate.tp for candidate, _ in found.traced] == [1]
    assert not found.fitting


def test_context_parallelism_that_training_refuses_is_refused_and_not_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recurrence, say, whose author leaves `apply_cp` out."""
    config = job("debugmodel", 2, 4096)
    one, two = (Candidate(1, 1, cp, 1, 1, 1, "full", 2 // cp, 2, "") for cp in (1, 2))
    assert _without_impossible_cp([two, one], config) == [two, one]
    monkeypatch.setattr("torchtitan.models.llama3.infra.parallelize.apply_cp", lambda *_: None)
    assert _without_impossible_cp([two, one], config) == [one]
    # Where no other layout can be, the search says why.
    monkeypatch.setattr("torchtitan.planning.search.candidates", lambda *_: [two])
    for asked in (partial(plan_run, two.config(config)), partial(search, config)):
        with pytest.raises(ConfigError, match="does not support context parallelism"):
            asked(2, DEVICES["h100"])


@pytest.mark.long
def test_stages_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their numbers, the schedule and the number of micro-batches."""
    traced: list[int] = []

    def counting(*args: Any, stage: int, **kwargs: Any) -> StageTrace:
        traced.append(stage)
        return trace_step(*args, stage=stage, **kwargs)

    monkeypatch.setattr("torchtitan.planning.estimate.trace_step", counting)
    degree = ["--parallelism.pipeline_parallel_degree=4"]
    config = job("8B", 16, 256, *degree, "--training.local_batch_size=8")
    config.parallelism.pipeline_parallel_schedule = "Interleaved1F1B"
    known: dict = {}
    plan = plan_run(config, 4, DEVICES["h100"], 8, known)
    # Of 8 stages the first (with the embedding), one with 4 and one with 5 layers, and the last.
    assert traced == [0, 4, 1, 7] and len(plan.ranks) == 4
    config.parallelism.pipeline_parallel_schedule = "LoopedBFS"
    config.training.local_batch_size = 16
    plan_run(config, 4, DEVICES["h100"], 8, known)
    assert len(traced) == 4


def test_stages_of_more_or_fewer_of_the_same_layers_share_their_traces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first and the last of some layers, from which all are extrapolated."""
    traced: list[tuple[int, int]] = []

    def tracing(config: Any, shallow: int, dims: Any, stage: int, **kwargs: Any) -> StageTrace:
        traced.append((stage, shallow))
        layers = 4 + shallow
        return StageTrace(parameters=layers, groups=CollectiveRecorder(dims.groups()).groups)

    monkeypatch.setattr("torchtitan.planning.estimate.trace_step", tracing)
    options = ["--parallelism.pipeline_parallel_degree=4", "--training.local_batch_size=4"]
    known: dict = {}
    plan = plan_run(job("70B", 4, 256, *options), 4, DEVICES["h100"], 8, known)
    assert traced == [(stage, shallow) for stage in (0, 1, 3) for shallow in (0, 1)]
    assert len(known) == len(traced) + 4  # the stages between have different numbers of layers
    assert sum(rank.memory.parameters for rank in plan.ranks) == 80


def test_places_that_are_alike_have_links_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four places with three ranks each, the third has one on the next host."""
    gathered = PassTrace(Counter(), Counter({Collective("all_gather", "fsdp", 3, 1000): 1}))
    traced: list[int] = []

    def tracing(*args: Any, stage: int, **kwargs: Any) -> StageTrace:
        traced.append(stage)
        groups = CollectiveRecorder(args[2].groups()).groups
        return StageTrace(forward=gathered, groups=groups)

    monkeypatch.setattr("torchtitan.planning.estimate.trace_step", tracing)
    options = ["--parallelism.pipeline_parallel_degree=4", "--training.local_batch_size=4"]
    plan = plan_run(job("debugmodel", 12, 64, *options), 12, DEVICES["h100"])
    assert traced == [0, 1, 3]
    links = [t.link for rank in plan.ranks for t in rank.traffic if t.group == "fsdp"]
    assert links == ["host", "host", "network", "host"]


def test_a_group_across_places_is_the_same_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as all ranks, over which a model adds up statistics."""
    summed = PassTrace(Counter(), Counter({Collective("all_reduce", "all", 8, 1000): 1}))
    stage = StageTrace(forward=summed, groups={"all": [*range(8)]})
    monkeypatch.setattr("torchtitan.planning.estimate.trace_step", lambda *_, **options: stage)
    options = ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]
    plan = plan_run(job("debugmodel", 8, 64, *options), 8, DEVICES["h100"])
    assert [t.link for rank in plan.ranks for t in rank.traffic] == ["host"] * 2


@pytest.mark.parametrize(
    ("frozen", "flops"),
    # Layer 0 costs 2 FLOPs a weight, not 6, if nothing below it is trained; above others, 4.
    [("", 740_352), (r"tok_embeddings|layers\.0", 740_352 - 4 * 36_864), ("layers.1", 666_624)],
)
def test_the_figures_of_a_run(
    frozen: str, flops: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A layer has 64 x 64 + 2 x 64 x 32 + 64 x 64 weights of attention and 3 x 64 x 128 of its
    feed-forward layer, 36,864, and 2 norms of 64; embedding and output have 264 x 64 each. FLOPs:
    6 (2 x 36,864 + 264 x 64) + 12 x 2 x 64 x 128.
    """
    monkeypatch.setattr("torchtitan.planning.estimate.trace_step", lambda *_, **__: StageTrace())
    rules = f"[[optimizer.rules]]\npattern = '{frozen}'\nlr_scale = 0.0\n" if frozen else "[job]"
    (tmp_path / "job.toml").write_text(rules)
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 128}
    options = [
        f"--model.args.{name}={size}" for name, size in (sizes | {"vocab_size": 264}).items()
    ]
    options += [f"--job.config_file={tmp_path / 'job.toml'}", "--training.local_batch_size=2"]
    plan = plan_run(job("debugmodel", 12, 128, *options), 2, DEVICES["h100"])
    assert plan.nparams == 2 * (36_864 + 2 * 64) + 64 + 2 * 264 * 64
    assert plan.flops_per_token == flops
    assert (plan.accumulation_steps, plan.tokens_per_step) == (3, 12 * 128)


def test_stages_are_alike_for_schedules_that_split_backward_passes_alike() -> None:
    options = ["--parallelism.pipeline_parallel_degree=2", "--activation_checkpoint.mode=none"]
    whole, other, split = (
        _schedule_free(
            job("debugmodel", 8, 64, *options, f"--parallelism.pipeline_parallel_schedule={name}")
        )
        for name in ("1F1B", "LoopedBFS", "ZBVZeroBubble")
    )
    assert whole == other != split


@pytest.mark.long
def test_what_a_search_does_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text('[model]\nflavor = "debugmodel"\n[training]\nseq_len = 256\n')
    options = ["--search", "--gpus", "2", "--global-batch-size", "4", "--seconds", "0.1"]
    main([str(config), *options, "--out", str(tmp_path / "best.toml")])
    assert "tracing one layer" in capsys.readouterr().err
