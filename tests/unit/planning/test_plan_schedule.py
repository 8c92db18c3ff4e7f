"""Schedules played: textbook bubbles, what is held, and what cannot be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from torchtitan.planning.memory import Memory
from torchtitan.planning.pipeline_memory import held_before, moments
from torchtitan.planning.records import StageTrace
from torchtitan.planning.schedule import Action, StageCost, actions_of, play

PP, MICRO_BATCHES = 4, 8


def equal_stages(count: int, **costs: float) -> list[StageCost]:
    return [StageCost(forward=1.0, backward=2.0, inputs=1.0, weights=1.0, **costs)] * count


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (4, 8), (8, 32)])
def test_the_textbook_bubble(schedule: str, pp: int, micro_batches: int) -> None:
    """(p - 1) / (m + p - 1): Narayanan et al., arXiv:2104.04473, section 2.2."""
    stages = [[rank] for rank in range(pp)]
    timeline = play(actions_of(schedule, stages, micro_batches), equal_stages(pp))
    assert timeline.bubble == pytest.approx((pp - 1) / (micro_batches + pp - 1))
    assert timeline.seconds == pytest.approx(3 * (micro_batches + pp - 1))


@pytest.mark.parametrize("per_rank", [2, 4])
def test_interleaving_divides_the_bubble(per_rank: int) -> None:
    """The idle time is that of 1F1B over the stages of a rank (section 2.2 of the same)."""
    stages = [[rank + i * PP for i in range(per_rank)] for rank in range(PP)]
    costs = [StageCost(1.0 / per_rank, 2.0 / per_rank)] * (PP * per_rank)
    timeline = play(actions_of("Interleaved1F1B", stages, MICRO_BATCHES), costs)
    busy, idle = 3 * MICRO_BATCHES, 3 * (PP - 1) / per_rank
    assert timeline.seconds == pytest.approx(busy + idle)
    assert timeline.bubble == pytest.approx(idle / (busy + idle))


def test_zero_bubble_is_shorter_than_1f1b() -> None:
    v_shaped = [[rank, 2 * PP - 1 - rank] for rank in range(PP)]
    costs = [StageCost(0.5, 1.0, inputs=0.5, weights=0.5)] * (2 * PP)
    zero = play(actions_of("ZBVZeroBubble", v_shaped, MICRO_BATCHES), costs)
    single = play(actions_of("1F1B", [[r] for r in range(PP)], MICRO_BATCHES), equal_stages(PP))
    assert zero.bubble < 0.5 * single.bubble


def most_held(schedule: str, split: bool = True, between: float = 10.0) -> list[float]:
    """Bytes on each rank, of stages that keep 10, or `between` the parts of a backward pass."""
    stages = [[rank] for rank in range(PP)]
    if schedule == "ZBVZeroBubble":
        stages = [[rank, 2 * PP - 1 - rank] for rank in range(PP)]
    kept = {number: (10.0, between) for own in stages for number in own}
    actions = actions_of(schedule, stages, MICRO_BATCHES, split)
    return [max(held for _, held in held_before(todo, kept)) for todo in actions.values()]


def test_1f1b_holds_a_micro_batch_for_each_later_stage_and_gpipe_all() -> None:
    assert most_held("1F1B") == [10.0 * (PP - rank) for rank in range(PP)]
    assert most_held("GPipe") == [10.0 * MICRO_BATCHES] * PP


def test_what_is_kept_for_weights_is_held_longer() -> None:
    """Each rank ends the warm-up with as many micro-batches, 80 bytes; one is between the parts."""
    assert most_held("ZBVZeroBubble", between=10.0) == [80.0] * PP
    assert max(most_held("ZBVZeroBubble", between=16.0)) > 80.0


def test_all_is_freed_by_the_last_action() -> None:
    todo = [Action(0, kind, number) for number in range(2) for kind in "FIW"]
    held = [held for _, held in held_before(todo, {0: (10.0, 16.0)})]
    assert held == [0.0, 10.0, 16.0] * 2


def test_passes_that_are_not_split_are_whole_at_the_place_of_the_first() -> None:
    stages = [[rank, 2 * PP - 1 - rank] for rank in range(PP)]
    split, whole = (actions_of("ZBVZeroBubble", stages, MICRO_BATCHES, s) for s in (True, False))
    for rank in range(PP):
        first = [action for action in split[rank] if action.kind != "W"]
        assert whole[rank] == [replace(a, kind="B") if a.kind == "I" else a for a in first]


@pytest.mark.parametrize(("per_rank", "gathers"), [(3, {1}), (4, {1, 3, 5, 6})])
def test_stages_are_gathered_again_if_a_rank_has_more_than_three(
    per_rank: int, gathers: set[int]
) -> None:
    """PyTorch's schedules then free some of them, and gather them before their next action."""
    stages = [[rank + i * PP for i in range(per_rank)] for rank in range(PP)]
    (todo, *_) = actions_of("Interleaved1F1B", stages, 4 * PP).values()
    counts = Counter(action.stage for action in todo if action.gathers)
    assert set(counts.values()) == gathers
    cost = StageCost(1.0, 2.0, start=0.25)
    assert sum(map(cost.seconds, todo)) == 4 * PP * per_rank * 3 + 0.25 * counts.total()


def test_sending_and_reducing_take_their_time() -> None:
    """The first micro-batch goes through all stages, and the last rank to end reduces last."""
    stages = [[0], [1]]
    costs = [StageCost(1.0, 2.0, send=0.25, start=0.5, finish=4.0), StageCost(1.0, 2.0)]
    timeline = play(actions_of("GPipe", stages, 1), costs)
    assert timeline.seconds == pytest.approx(0.5 + 1 + 0.25 + 1 + 2 + 0.25 + 2 + 4)
    costs[1] = StageCost(1.0, 2.0, finish=9.0)
    timeline = play(actions_of("GPipe", stages, 1), costs)
    assert timeline.seconds == pytest.approx(0.5 + 1 + 0.25 + 1 + 2 + 9)


def test_a_rank_reduces_the_gradients_of_all_its_stages() -> None:
    costs = [StageCost(1.0, 2.0, finish=finish) for finish in (4.0, 1.0, 8.0, 1.0)]
    actions = actions_of("Interleaved1F1B", [[0, 2], [1, 3]], 2)
    timeline = play(actions, costs)
    reduced = [(a.stage, end - start) for a, start, end in timeline.spans[0] if a.kind == "R"]
    assert reduced == [(0, 4.0), (2, 8.0)]
    without = play(actions, [StageCost(1.0, 2.0)] * 4)
    assert timeline.seconds == without.seconds + 12.0


def test_stages_of_one_rank_wait_for_no_network() -> None:
    """A V of two ranks: of the six hand-overs of a micro-batch, four are between ranks."""
    costs = [StageCost(1.0, 2.0, send=0.25)] * 4
    timeline = play(actions_of("ZBVZeroBubble", [[0, 3], [1, 2]], 4, split=False), costs)
    spans = {a: (start, end) for done in timeline.spans.values() for a, start, end in done}
    last = spans[Action(0, "B", 0)]
    assert spans[Action(1, "F", 0)] == (1.25, 2.25) and spans[Action(2, "F", 0)] == (2.25, 3.25)
    assert spans[Action(3, "F", 0)] == (3.5, 4.5) and last[1] - last[0] == 2.0


def test_every_action_waits_for_what_it_needs() -> None:
    stages = [[rank, rank + 2] for rank in range(2)]
    timeline = play(actions_of("Interleaved1F1B", stages, 4), equal_stages(4, send=0.1))
    spans = {a: (start, end) for done in timeline.spans.values() for a, start, end in done}
    for action, (start, end) in spans.items():
        assert end - start == pytest.approx(1.0 if action.kind == "F" else 2.0)
        if action.kind == "F" and action.stage > 0:
            assert start >= spans[Action(action.stage - 1, "F", action.micro_batch)][1] + 0.1
        if action.kind == "B":
            assert start >= spans[Action(action.stage, "F", action.micro_batch)][1]


def test_a_circular_wait_is_refused() -> None:
    actions = {
        0: [Action(0, "B", 0), Action(0, "F", 0)],
        1: [Action(1, "F", 0), Action(1, "B", 0)],
    }
    with pytest.raises(ValueError, match="wait for one another"):
        play(actions, equal_stages(2))


def memory_of_two_micro_batches(between: Memory, stages: int, accumulates: bool) -> list[Memory]:
    """Of a rank whose stages are alike, and of which only the first has actions."""
    stage = StageTrace(
        moments_first=[Memory(temporary=5)],
        moments=[Memory(temporary=7)],
        between=between,
        reducing=Memory(temporary=3),
    )
    todo = [Action(0, kind, number) for number in range(2) for kind in "FB"]
    return list(moments(todo, dict.fromkeys(range(stages), stage), accumulates))


@pytest.mark.parametrize("accumulates", [False, True])
def test_gradients_are_there_from_the_first_backward_pass_or_the_run_before(
    accumulates: bool,
) -> None:
    """FSDP's whole gradients are scattered at the end of a run."""
    *plain, _ = memory_of_two_micro_batches(Memory(gradients=10), 1, accumulates)
    assert [m.temporary for m in plain] == ([7, 7] if accumulates else [5, 7])
    assert [m.gradients for m in plain] == ([10, 10] if accumulates else [0, 10])
    *sharded, end = memory_of_two_micro_batches(Memory(whole_gradients=10), 1, accumulates)
    assert [(m.temporary, m.whole_gradients) for m in sharded] == [(5, 0), (7, 10)]
    assert (end.temporary, end.whole_gradients) == (3, 10)


def test_casts_of_all_stages_stay_but_only_three_are_gathered() -> None:
    for between, held in (
        (Memory(whole_parameters=2, gradients=1), 8),
        (Memory(whole_parameters=2, whole_gradients=1), 6),
    ):
        found = memory_of_two_micro_batches(between, 4, False)
        assert {m.whole_parameters for m in found} == {held}


def test_each_stage_may_be_the_fullest_when_its_gradients_are_reduced() -> None:
    stages = {number: StageTrace(reducing=Memory(temporary=number)) for number in (1, 2)}
    found = list(moments([], stages, accumulates=False))
    assert [moment.temporary for moment in found] == [1, 2]


def test_the_second_part_of_a_split_backward_pass_makes_gradients() -> None:
    stage = StageTrace(
        moments_inputs=[Memory(temporary=8)],
        moments_weights=[Memory(temporary=9)],
        between=Memory(gradients=10),
    )
    todo = [Action(0, kind, number) for number in range(2) for kind in "FIW"]
    *found, _ = moments(todo, {0: stage}, accumulates=False)
    assert [(m.temporary, m.gradients) for m in found] == [(8, 0), (9, 10), (8, 10), (9, 10)]
