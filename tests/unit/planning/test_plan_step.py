"""How a step adds up from the traces of its stages: time, traffic, memory, and what they mean."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from test_plan_roofline import DEVICE as ROUND

from torchtitan.config import load_config
from torchtitan.planning.collectives import Collective
from torchtitan.planning.estimate import RankTrace, _Step
from torchtitan.planning.memory import Memory
from torchtitan.planning.operations import Operation
from torchtitan.planning.plan import Plan, RankPlan
from torchtitan.planning.records import PassTrace, StageTrace
from torchtitan.planning.report import Budget, memory_table
from torchtitan.planning.roofline import Roofline
from torchtitan.planning.schedule import Timeline

DEVICE = replace(
    ROUND,
    memory=1000.0,
    flops=1.0,
    float8_flops=1.0,
    float32_flops=1.0,
    bandwidth=1.0,
    link=1.0,
    network=1.0,
    host_memory_reserved=100.0,
)
GROUPS = {"fsdp": [0, 1], "tp": [0, 1], "pp": [0, 1]}


def work(products: int = 0, others: int = 0, **sent: int) -> PassTrace:
    """Seconds of each. Args: sent: to a group."""
    operations = Counter({Operation("mm", 1, 0): products, Operation("add", 0, 1): others})
    return PassTrace(operations, Counter({Collective("send", g, 2, n): 1 for g, n in sent.items()}))


def step_of(stages: list[dict[int, StageTrace]], *options: str, dp: int = 1) -> _Step:
    """Args: stages: of each rank."""
    dims: Any = SimpleNamespace(dp=dp, pp=len(stages))
    degree = f"--parallelism.pipeline_parallel_degree={len(stages)}"
    config = load_config([degree, "--parallelism.pipeline_parallel_microbatch_size=1", *options])
    ranks = [RankTrace(of_rank, GROUPS) for of_rank in stages]
    return _Step(config, dims, Roofline(DEVICE, 8, compiled=False), ranks)


def traffic(rank: RankPlan) -> dict[str, tuple[float, float]]:
    return {t.group: (t.calls, t.sent) for t in rank.traffic}


def test_micro_batches_repeat_and_the_end_of_a_step_does_not() -> None:
    stage = StageTrace(
        parameters=100,
        gradients=40,
        optimizer_state=200,
        moments=[Memory(activations=50), Memory(activations=10, gradients=45)],
        forward=work(1, tp=3),
        backward=work(2, 1),
        finish=work(fsdp=10),
        optimizer=work(0, 4, tp=1),
        optimizer_temporary=16,
    )
    step = step_of(
        [{0: stage}], "--training.local_batch_size=2", "--training.global_batch_size=12", dp=2
    )
    # 3 micro-batches of 4 and 3 s; 10 s of sending overlap with the last 3; the optimizer.
    assert (step.accumulation, step.global_batch, step.seconds) == (3, 12, 3 * 7 + 7 + 5)
    assert step.pass_seconds == 7
    rank = step.rank_plan(0)
    assert (rank.compute_seconds, rank.other_seconds) == (3 * 3, 3 * 1 + 4)
    assert rank.waiting_seconds == 3 * 3 + 7 + 1
    assert traffic(rank) == {"tp": (4, 10), "fsdp": (1, 10)}
    # The optimizer's step is fuller than the passes.
    assert rank.memory == Memory(100, gradients=40, optimizer_state=200, temporary=16)
    stage.optimizer_temporary = 14
    assert step.rank_plan(0).memory == Memory(100, 45, 200, activations=10)


def test_a_pipeline_runs_as_often_as_it_accumulates() -> None:
    stage = StageTrace(
        parameters=100,
        gradients=40,
        optimizer_state=200,
        activations=30,
        moments=[Memory(temporary=7)],
        moments_first=[Memory(temporary=5)],
        between=Memory(whole_parameters=20, whole_gradients=60),
        forward=work(1),
        backward=work(2),
        start=work(fsdp=3),
        finish=work(fsdp=4),
        optimizer=work(0, 5),
    )
    first, last = stage, StageTrace(**vars(stage))
    first.hidden_out = last.hidden_in = 1
    given = ["--training.local_batch_size=2", "--parallelism.pipeline_parallel_schedule=GPipe"]
    step = step_of([{0: first}, {1: last}], *given, "--training.global_batch_size=4")
    # Of a run: 2 s more until each rank has its parameters, 3 * (2 + 1) s, 1 s to send each way.
    run = 2 * 2 + 9 + 2 + 4
    assert (step.accumulation, step.seconds, step.pass_seconds) == (2, 2 * run + 5, run)
    begin, end = step.rank_plan(0), step.rank_plan(1)
    for rank in (begin, end):
        assert (rank.compute_seconds, rank.other_seconds) == (2 * 2 * 3, 5)
        assert rank.waiting_seconds == 2 * 2 + 2 * 4
        assert traffic(rank) == {"pp": (4, 4), "fsdp": (4, 2 * 3 + 2 * 4)}
    # Gradients of the run before are in shards; the first of two backward passes made whole ones.
    assert begin.memory == Memory(
        *(100, 40, 200, 20, 60), activations=30, pipeline_buffers=2, temporary=7
    )
    assert end.memory.pipeline_buffers == 4
    first.optimizer_temporary = 130
    full = step.rank_plan(0).memory
    assert full == Memory(100, 40, 200, pipeline_buffers=2, temporary=130)


def test_the_optimizers_of_stages_step_one_after_the_other() -> None:
    first, last = (
        StageTrace(optimizer=work(0, n), clipping=work(0, 1), optimizer_temporary=100 * n)
        for n in (1, 2)
    )
    step = step_of(
        [{0: first, 2: last}, {1: StageTrace(), 3: StageTrace()}],
        "--training.local_batch_size=4",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    )
    assert step.seconds == step.rank_plan(0).other_seconds == 1 + 2 + 2 * 1
    assert step.rank_plan(0).memory.temporary == 200


def test_gradients_of_shared_weights_come_from_each_partner() -> None:
    """And their sum is a tensor more."""
    stage = StageTrace(shared_gradients=30, optimizer_temporary=50)
    options = ["--training.local_batch_size=1", "--parallelism.pipeline_parallel_schedule=GPipe"]
    step = step_of([{0: stage}, {1: stage}, {2: stage}], *options)
    for rank in step._ranks:
        rank.partners = 2
    found = step.rank_plan(1)
    assert traffic(found) == {"pp": (2, 60)}
    assert found.memory.temporary == 90


def test_nothing_is_sent_between_stages_of_one_rank() -> None:
    """The second rank of a V has both stages of its tip, and sends only to the first."""
    first, second, third, fourth = (
        StageTrace(inputs=work(1), weights=work(1), hidden_in=1, hidden_out=1) for _ in range(4)
    )
    first.hidden_in = fourth.hidden_out = 0
    step = step_of(
        [{0: first, 3: fourth}, {1: second, 2: third}],
        "--training.local_batch_size=4",
        "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
        "--activation_checkpoint.mode=none",
    )
    assert [traffic(step.rank_plan(place)) for place in (0, 1)] == [{"pp": (8, 8)}] * 2


def test_stages_on_one_host_do_not_send_over_the_network() -> None:
    """Of four places of 4 ranks on two hosts of 8; the network is 10 times as slow."""
    stages = [{n: StageTrace(forward=work(1), backward=work(1))} for n in range(4)]
    for number, of_rank in enumerate(stages):
        of_rank[number].hidden_in, of_rank[number].hidden_out = float(number > 0), float(number < 3)
    ranks = [
        RankTrace(of_rank, {"pp": [0, 4, 8, 12]}, first=4 * place)
        for place, of_rank in enumerate(stages)
    ]
    options = ["--parallelism.pipeline_parallel_degree=4", "--training.local_batch_size=1"]
    options += ["--parallelism.pipeline_parallel_microbatch_size=1"]
    config = load_config([*options, "--parallelism.pipeline_parallel_schedule=GPipe"])
    dims: Any = SimpleNamespace(dp=4, pp=4)
    step = _Step(config, dims, Roofline(replace(DEVICE, network=0.1), 8, compiled=False), ranks)
    # One micro-batch forward and back: 4 stages of 1 s, and sends of 1, 10 and 1 s.
    assert step.pass_seconds == 2 * (4 + 1 + 10 + 1)
    found = [{t.group: (t.link, t.seconds) for t in step.rank_plan(n).traffic} for n in (0, 1)]
    assert found[0] == {"pp on a host": ("host", 1.0)}
    assert found[1] == {"pp": ("network", 10.0), "pp on a host": ("host", 1.0)}


def test_a_budget_of_batches_that_grow() -> None:
    """Smaller steps take less time, but not in proportion: each has an optimizer step."""
    batch = ["--training.local_batch_size=2", "--training.global_batch_size=32"]
    ramp = ["--training.batch_size_ramp", "8:10", "16:20", "--training.seq_len=64"]
    plan = Plan(
        config=load_config([*batch, *ramp]),
        device=DEVICE,
        dims=SimpleNamespace(world_size=2, dp=2),  # type: ignore[arg-type]
        ranks=[],
        step_seconds=80.0,  # of 8 passes
        pass_seconds=8.0,
        tokens_per_step=32 * 64,
        flops_per_token=3,
        nparams=1,
        accumulation_steps=8,
    )
    for sequences, steps, seconds in (
        (1, 1, 32),
        (10 * 8, 10, 10 * 32),
        (10 * 8 + 2 * 16 + 1, 13, 10 * 32 + 3 * 48),
        (10 * 8 + 10 * 16 + 5 * 32, 25, 10 * 32 + 10 * 48 + 5 * 80),
    ):
        budget = Budget.of(plan, sequences * 64, None)
        assert (budget.steps, budget.seconds) == (steps, seconds)


def test_rates_and_room_of_a_plan() -> None:
    ranks = [
        RankPlan(0, [0], Memory(parameters=300), 3.5, 1.0, 9.0),
        RankPlan(1, [1], Memory(parameters=700, temporary=50), 3.0, 4.0, 2.0),
    ]
    plan = Plan(
        config=load_config([]),
        device=DEVICE,
        dims=SimpleNamespace(world_size=4),  # type: ignore[arg-type]
        ranks=ranks,
        step_seconds=10.0,
        pass_seconds=8.0,
        tokens_per_step=80,
        flops_per_token=3,
        nparams=1,
        accumulation_steps=1,
    )
    assert (plan.tokens_per_second, plan.mfu) == (2.0, 6.0)
    assert (plan.peak, plan.available, plan.room) == (750, 900, 150)
    assert (plan.busiest, plan.bound) == (ranks[1], "memory bandwidth")
    plan.timeline = Timeline(10.0, {0: []})  # all of it is a bubble
    assert plan.bound == "pipeline bubble"


def test_a_narrow_terminal_has_ranks_in_columns_and_whole_numbers() -> None:
    """Of a pipeline of four places, whose rows would be 170 characters wide."""
    memory = Memory(*(number * 2**30 for number in (11, 12, 13, 14, 15, 16, 17, 18.25)))
    ranks = [
        RankPlan(n, [n], replace(memory, temporary=n * 2**30), 1.0, 1.0, 1.0) for n in range(4)
    ]
    plan = SimpleNamespace(ranks=ranks, available=101.5 * 2**30)
    shown = {}
    for width in (80, 200):
        out = Console(width=width)
        with out.capture() as captured:
            out.print(memory_table(plan, out))  # type: ignore[arg-type]
        shown[width] = [line.split() for line in captured.get().splitlines() if line.strip()]
        assert all(len(line) <= width for line in captured.get().splitlines())
    assert ["parameters", *["11.00"] * 4] in shown[80]
    assert ["peak", *(f"{98 + n:.2f}" for n in range(4))] in shown[80]
    assert shown[200][-1][:4] == ["3", "3", "11.00", "12.00"]
