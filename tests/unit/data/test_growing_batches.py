"""The batches of a run grow: the data neither depend on the layout nor come twice."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elastic_resume import KINDS, ROWS, SEQ_LEN, close, open_ranks, pieces

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config.batch import BatchSizes
from torchtitan.data import DataLoader
from torchtitan.data.encode import Encoder
from torchtitan.data.mixing import Blend, Phase

RAMP = ((2, 2), (6, 5), (ROWS, sys.maxsize))
UNIT = 2
LAYOUTS = [(1, 1), (1, 2), (2, 1)]


def open_growing(kind: str, ranks: int, local: int, workers: int, **options) -> list[DataLoader]:
    sizes = BatchSizes(options.pop("stages", RAMP), ranks * local)
    return open_ranks(kind, ranks, local, workers, sizes=sizes, **options)


def step(loaders: list[DataLoader], number: int) -> list[torch.Tensor]:
    """The batch of a step in the order of one rank: each tensor `[rows, seq]`."""
    sizes, slices = loaders[0]._steps, loaders[0]._steps.at(number) // UNIT
    batches = [[next(one) for _ in range(sizes.passes(number))] for one in loaders]
    by_rank = [
        [torch.cat([batch[name] for batch in of_rank]) for of_rank in batches]
        for name in batches[0][0]
    ]
    by_slice = [torch.stack(ranks).unflatten(1, (slices, -1)).transpose(0, 1) for ranks in by_rank]
    return [tensor.flatten(0, 2) for tensor in by_slice]


def state_of(loaders: list[DataLoader]) -> dict:
    rows = torch.cat([one.state_dict()["rows"] for one in loaders])
    return {"rows": rows, "described": loaders[0].describe()}


def load(loaders: list[DataLoader], state: dict) -> None:
    for one, rows in zip(loaders, state["rows"].chunk(len(loaders)), strict=True):
        one.load_state_dict(state | {"rows": rows})


@given(
    kind=st.sampled_from(list(KINDS)),
    packing=st.sampled_from(["contiguous", "best_fit"]),
    runs=pieces(LAYOUTS),
)
@settings(max_examples=15)
def test_a_run_in_pieces_is_the_run_in_one(kind: str, packing: str, runs: list) -> None:
    """Also if a step, or a pass of a slice, is never finished: its data come again."""
    whole = open_growing(kind, 1, UNIT, 1, packing=packing)
    steps = sum(steps for steps, *_ in runs) + 2
    expected = [step(whole, number) for number in range(1, steps + 1)]
    metrics = whole[0].metrics()
    wanted = state_of(whole)
    close(whole)

    number, state = 0, None
    for steps, (ranks, local), workers, within in [*runs, (2, (2, 1), 2, False)]:
        loaders = open_growing(kind, ranks, local, workers, packing=packing)
        if state is not None:
            load(loaders, state)
        for _ in range(steps):
            number += 1
            got = step(loaders, number)
            assert all(map(torch.equal, got, expected[number - 1])), f"step {number}"
        state = state_of(loaders)
        if within and local < UNIT // ranks:
            next(loaders[0])
            assert torch.equal(state_of(loaders)["rows"], state["rows"])
        told = [one.metrics() for one in loaders]
        close(loaders)
    assert torch.equal(state["rows"], wanted["rows"])
    assert state["described"] == wanted["described"]
    if packing == "contiguous":  # of a pool that was not packed again, only whole documents count
        for name in metrics.keys() - {"data_skipped_documents"}:  # since the process began
            value = metrics[name]
            assert np.mean([one[name] for one in told]) == pytest.approx(value)


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
@pytest.mark.parametrize("kind", ["texts", "files", "tokens"])
def test_the_sequences_are_those_of_batches_of_one_size(kind: str, packing: str) -> None:
    """Steps 1 to 5 have 22 sequences, and the next two complete what is begun: 38 of 40."""
    (grows,), (fixed,) = (
        open_growing(kind, 1, 2, 1, packing=packing),
        open_ranks(kind, 1, ROWS, 1, packing=packing),
    )
    got = torch.cat([step([grows], number)[0] for number in range(1, 8)] + [next(grows)["tokens"]])
    expected = torch.cat([next(fixed)["tokens"] for _ in range(5)])
    assert torch.equal(grows.state_dict()["rows"], fixed.state_dict()["rows"])
    assert Counter(map(tuple, got.tolist())) == Counter(map(tuple, expected.tolist()))
    close([grows, fixed])


def test_each_step_has_its_share_of_each_source_and_phases_begin_with_their_step() -> None:
    texts = {name: [name * 100] * 50 for name in "abc"}
    phases = (Phase(1, (0.5, 0.5, 0.0)), Phase(5, (0.0, 0.5, 0.5)), Phase(7, (0.0, 0.0, 1.0)))
    stages = ((4, 3), (6, 5), (8, sys.maxsize))
    one = DataLoader(
        Blend(texts, phases), Encoder(BytesTokenizer()), SEQ_LEN, 2, 8, sizes=BatchSizes(stages, 2)
    )
    seen, sizes = [0.0] * 3, []
    for number in range(1, 9):
        for _ in range(one._steps.passes(number)):
            next(one)
        drawn = [one.metrics()[f"data_tokens/{name}"] / SEQ_LEN for name in "abc"]
        sizes.append([int(now - before) for now, before in zip(drawn, seen, strict=True)])
        seen = drawn
    assert sizes == [*[[2, 2, 0]] * 3, [3, 3, 0], [0, 3, 3], [0, 4, 4], [0, 0, 8], [0, 0, 8]]
    one.begin_at(6)
    next(one)
    assert one._places[0, 0] == (12 + 12 + 8) // 2 + 1  # slices of two
    close([one])


@pytest.mark.parametrize(
    ("stages", "steps"), [(((4, 2), (ROWS, sys.maxsize)), 4), (((ROWS, sys.maxsize),), 3)]
)
def test_the_ramp_may_change_within_a_run(stages: tuple, steps: int) -> None:
    """All rows go on where they are, and phases begin by the steps of the trainer."""
    (before,) = open_growing("blend", 1, 2, 1)
    for number in range(1, 4):
        step([before], number)
    assert before.describe()["slice"] == 1
    (after,) = open_growing("blend", 1, 2, 1, stages=stages)
    after.load_state_dict({**before.state_dict(), "step": 3})
    assert np.array_equal(after._places[:, 1:], before._places[:, 1:])
    assert (before._places[0, 0], after._places[0, 0]) == (5, steps)
    for _ in range(4):
        next(after)
    assert np.all(after._places[:, 0] == steps + 4 * 2 // after._steps.unit)
    close([before, after])


def test_a_run_whose_batches_do_not_grow_says_nothing_of_it() -> None:
    (one,) = open_ranks("texts", 1, ROWS, 1)
    assert set(one.describe()) == {"seed", "sources"}
