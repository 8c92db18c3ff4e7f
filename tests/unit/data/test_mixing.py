from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.data import DataPhase, DataSource
from torchtitan.data import DataLoader, build_dataloader
from torchtitan.data.encode import Encoder
from torchtitan.data.mixing import (
    Blend,
    Mixture,
    MixtureState,
    Phase,
    Steps,
    integer_weights,
    join_rows,
    split_rows,
)
from torchtitan.errors import CheckpointError, ConfigError, DataError
from torchtitan.preflight.validate import validate

weights = st.lists(st.integers(0, 50).map(lambda n: n / 10), min_size=2, max_size=6).filter(any)


def draw(mixture: Mixture, steps: int) -> np.ndarray:
    """`[steps, rows]`"""
    return np.stack([mixture.step() for _ in range(steps)])


@given(weights=weights, rows=st.integers(1, 9), steps=st.integers(1, 60))
@settings(max_examples=100)
def test_every_window_has_its_share_of_each_source(
    weights: list[float], rows: int, steps: int
) -> None:
    """Sequences have equally many tokens, so what holds for them holds for tokens."""
    chosen = draw(Mixture([Phase(1, tuple(weights))], rows, seed=0), steps)
    whole = integer_weights(weights)
    for source, weight in enumerate(whole):
        share = Fraction(weight, sum(whole))
        counts = np.cumsum([0, *(chosen == source).sum(axis=1)]).tolist()
        ahead = [count - share * rows * step for step, count in enumerate(counts)]
        assert max(map(abs, ahead)) < 1  # from the start on; so a window is off by less than 2
        assert weight or counts[-1] == 0


def test_every_row_gets_every_source() -> None:
    """Also where the pattern of sources would fit the number of rows."""
    chosen = draw(Mixture([Phase(1, (0.5, 0.5))], rows=8, seed=0), 400)
    shares = (chosen == 0).mean(axis=0)
    assert shares.min() > 0.4 and shares.max() < 0.6


def test_the_seed_says_which_rows_of_a_step_have_which_source() -> None:
    phases = (Phase(1, (0.5, 0.5)),)
    blend = Blend({"a": ["a" * 99], "b": ["b" * 99]}, phases)
    loader = DataLoader(blend, Encoder(BytesTokenizer()), 8, 8, 8, seed=5)
    rows = torch.stack([(next(loader)["tokens"] == ord("b")).any(1) for _ in range(3)])
    loader.close()
    assert rows.tolist() == draw(Mixture(phases, rows=8, seed=5), 3).tolist()


def test_the_order_of_the_sources_stays_as_it_was() -> None:
    """Else runs that are resumed would read other documents."""
    chosen = draw(Mixture([Phase(1, (0.5, 0.3, 0.2))], rows=8, seed=5), 2)
    assert chosen.tolist() == [[0, 2, 1, 0, 0, 0, 1, 2], [1, 0, 1, 2, 1, 0, 0, 0]]


def test_phases_change_the_weights_at_their_steps() -> None:
    phases = [Phase(1, (1.0, 1.0)), Phase(11, (0.0, 1.0)), Phase(21, (3.0, 1.0))]
    chosen = draw(Mixture(phases, rows=4, seed=0), 40)
    counts = [(chosen[start:end] == 0).sum() for start, end in ((0, 10), (10, 20), (20, 40))]
    assert counts == [20, 0, 60]


@given(weights=weights, taken=st.integers(0, 20))
@settings(max_examples=30)
def test_the_state_goes_on(weights: list[float], taken: int) -> None:
    phases = [Phase(1, tuple(weights)), Phase(9, tuple(reversed(weights)))]
    whole = Mixture(phases, rows=5, seed=3)
    draw(whole, taken) if taken else None
    table = join_rows(whole.state, [np.zeros((5, 4), np.int64)] * len(weights))
    state, _ = split_rows(table, len(weights))
    assert state == whole.state
    resumed = Mixture(phases, rows=5, seed=3, state=state)
    assert np.array_equal(draw(resumed, 10), draw(whole, 10))
    assert sum(whole.state.drawn) == 5 * (taken + 10)


@pytest.mark.parametrize("now", [(0.7, 0.3, 0.0), (0.5, 0.5, 0.0)])
@pytest.mark.parametrize("before", [(0.3, 0.3, 0.4), (0.1, 0.6, 0.3)])
def test_weights_that_change_within_a_phase_begin_anew(
    before: tuple[float, ...], now: tuple[float, ...]
) -> None:
    """Also where their sum stays: a source that is paused now is not read."""
    saved = Mixture([Phase(1, before)], rows=3, seed=0)
    draw(saved, 2)
    chosen = draw(Mixture([Phase(1, now)], rows=3, seed=0, state=saved.state), 10)
    assert (chosen < 2).all() and (chosen >= 0).all()
    fresh = Mixture([Phase(1, now)], rows=3, seed=0, state=MixtureState.at(2, [0] * 3))
    assert np.array_equal(chosen, draw(fresh, 10))


def test_readers_share_the_steps() -> None:
    made = []

    class Counted(Mixture):
        def step(self) -> np.ndarray:
            made.append(1)
            return super().step()

    phases = [Phase(1, (0.5, 0.5))]
    steps = Steps(Counted(phases, rows=5, seed=1), readers=3)
    taken: list[list] = [[], [], []]

    def run(number: int) -> None:
        taken[number] += itertools.islice(steps.of_reader(number), 50)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Mixture(phases, rows=5, seed=1)
    expected = [(alone.step().tolist(), alone.state.numbers) for _ in range(50)]
    for own in taken:
        assert [(chosen.tolist(), state) for chosen, state in own] == expected
    assert len(made) == 50


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((0.7, 0.2, 0.1), [7, 2, 1]),
        ((1.0, 1.0), [1, 1]),
        ((0.0, 2.5), [0, 1]),
        ((1e300, 1e-300), [2**40, 1]),
    ],
)
def test_weights_are_taken_as_written(weights: tuple[float, ...], whole: list[int]) -> None:
    assert integer_weights(weights) == whole


def test_the_metrics_count_tokens_and_epochs_of_each_source() -> None:
    sources = {"a": ["aaa"] * 10, "b": ["b" * 15] * 4}
    blend = Blend(sources, (Phase(1, (3.0, 1.0)),))
    loader = DataLoader(blend, Encoder(BytesTokenizer()), 8, 4, 4)
    batches = [next(loader) for _ in range(25)]
    metrics = loader.metrics()
    loader.close()
    assert metrics["data_tokens/a"] == 75 * 8 and metrics["data_tokens/b"] == 25 * 8
    rows = [row for batch in batches for row in batch["tokens"].tolist()]
    assert sum(ord("a") in row for row in rows) == 75
    assert metrics["data_epoch/a"] == pytest.approx(75 * 8 / 40, abs=0.5)
    assert metrics["data_epoch/b"] == pytest.approx(25 * 8 / 64, abs=1.0)
    alone = DataLoader(
        Blend({"a": ["aaa"]}, (Phase(1, (1.0,)),)), Encoder(BytesTokenizer()), 8, 4, 4
    )
    assert alone.metrics() == {"data_epoch": 0}  # of one source, which is no mixture


def test_a_loader_tells_how_large_its_sources_are() -> None:
    class Files:
        num_shards = 3

        def __iter__(self) -> Iterator[str]:
            return iter(["a text"])

        def shard(self, index: int) -> list[str]:
            return ["a text"]

    class Stream:
        def __iter__(self) -> Iterator[str]:
            return iter(["a text"])

    sources = {"texts": ["a", "b"], "files": Files(), "stream": Stream()}
    loader = DataLoader(Blend(sources, (Phase(1, (1.0,) * 3),)), Encoder(BytesTokenizer()), 8, 4, 4)
    assert loader.describe()["sources"] == [
        {"name": "texts", "documents": 2, "sample": zlib.crc32(repr([*"aaaabbbb"]).encode())},
        {"name": "files", "shards": 3, "lanes": 1},
        {"name": "stream"},
    ]
    one = DataLoader(["a", "b"], Encoder(BytesTokenizer()), 8, 4, 4)
    assert [source["documents"] for source in one.describe()["sources"]] == [2]


def test_data_begun_anew_in_a_run_keeps_to_its_phases() -> None:
    phases = (Phase(1, (1.0, 0.0)), Phase(6, (0.0, 1.0)))
    loader = DataLoader(
        Blend({"a": ["aaa"], "b": ["bbb"]}, phases), Encoder(BytesTokenizer()), 8, 4, 4
    )
    first = next(loader)
    loader.begin_at(4)
    assert torch.equal(next(loader)["tokens"], first["tokens"])
    assert loader.metrics()["data_tokens/a"] == 4 * 8
    assert ord("b") in next(loader)["tokens"]
    assert loader.metrics()["data_tokens/b"] == 4 * 8
    loader.close()
    one = DataLoader(["a"], Encoder(BytesTokenizer()), 8, 4, 4)
    rows = one.state_dict()["rows"]
    one.begin_at(4)
    assert torch.equal(one.state_dict()["rows"], rows)


def test_rows_may_begin_with_an_empty_text_of_a_paused_source() -> None:
    blend = Blend({"a": ["aaa"], "b": ["b", "", ""]}, (Phase(1, (1.0, 0.0)),))
    loader = DataLoader(blend, Encoder(BytesTokenizer()), 8, 3, 3)
    next(loader)
    assert loader.metrics()["data_epoch/b"] == 0
    loader.close()


def test_tokens_are_counted_on_with_another_seq_len() -> None:
    blend = Blend({"a": ["aaa"] * 10, "b": ["b" * 15] * 4}, (Phase(1, (3.0, 1.0)),))
    loader = DataLoader(blend, Encoder(BytesTokenizer()), 8, 4, 4)
    for _ in range(15):
        next(loader)
    state = loader.state_dict() | {"seq_len": 8}
    loader.close()
    longer = DataLoader(blend, Encoder(BytesTokenizer()), 32, 4, 4)
    longer.load_state_dict(state)
    metrics = longer.metrics()
    # Of 45 and 15 sequences of 8 tokens; that is 11.25 and 3.75 of 32.
    assert metrics["data_tokens/a"] == 11 * 32 and metrics["data_tokens/b"] == 4 * 32
    one = DataLoader(blend.sources["a"], Encoder(BytesTokenizer()), 8, 4, 4)
    next(one)
    state = one.state_dict()
    one.load_state_dict(state | {"seq_len": 32})  # whose places are no counts
    assert (one.state_dict()["rows"] == state["rows"]).all()
    one.close()


def config_of(*sources: DataSource, phases: tuple[DataPhase, ...] = ()) -> JobConfig:
    config = JobConfig()
    config.model.name, config.model.flavor = "llama3", "debugmodel"
    config.data.sources, config.data.phases = list(sources), list(phases)
    return config


STDLIB = DataSource(name="code", dataset="stdlib", weight=0.5)
TEXT = DataSource(name="text", dataset="text", dataset_path="/no/such/file")

MISTAKES = {
    "unknown": ((DataSource(dataset="stdlb"),), (), r"data\.sources\.0\.dataset.*Did you mean"),
    "path": ((DataSource(dataset="jsonl"),), (), r"needs data\.sources\.0\.dataset_path"),
    "twice": ((STDLIB, STDLIB), (), r"data\.sources\.1\.name.*is also the name of another"),
    "weights": ((DataSource(dataset="stdlib", weight=0.0),), (), "all weights are 0"),
    "count": (
        (STDLIB, TEXT),
        (DataPhase(2, [1.0]),),
        r"phases\.0\.weights: must have one weight per source",
    ),
    "zeros": ((STDLIB,), (DataPhase(2, [0.0]),), r"phases\.0\.weights: all weights are 0"),
    "order": (
        (STDLIB,),
        (DataPhase(5, [1.0]), DataPhase(5, [2.0])),
        r"phases\.1\.from_step.*more than from_step of the previous phase .5.",
    ),
    "no sources": ((), (DataPhase(2, [1.0]),), r"data\.phases.*needs data\.sources"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_a_mixture_are_found_before_the_run(case: str) -> None:
    sources, phases, message = MISTAKES[case]
    with pytest.raises(ConfigError, match=message):
        validate(config_of(*sources, phases=phases), 1)


def test_an_error_names_the_source() -> None:
    with pytest.raises(DataError, match=r"^data\.sources: 'text': dataset_path = '/no/such/file'"):
        build_dataloader(config_of(STDLIB, TEXT), BytesTokenizer(), 0, 1)

    def open_two(text: str) -> DataLoader:
        blend = Blend({"a": ["aaa"], "b": [text]}, (Phase(1, (1.0, 1.0)),))
        return DataLoader(blend, Encoder(BytesTokenizer()), 8, 4, 4)

    with pytest.raises(DataError, match=r"^the dataset: 'b': empty"):
        open_two("")
    loader = open_two("bbb")
    state = loader.state_dict()
    state["rows"][:, -3] = 9
    loader.load_state_dict(state)
    with pytest.raises(DataError, match=r"^the dataset: 'b': the checkpoint is at token 9 of"):
        next(loader)


def test_before_the_first_phase_the_sources_own_weights_count() -> None:
    other = DataSource(name="rest", dataset="stdlib_validation", weight=1.5)
    config = config_of(STDLIB, other, phases=(DataPhase(3, [1.0, 0.0]),))
    config.training.local_batch_size, config.training.seq_len = 4, 16
    loader = build_dataloader(config, BytesTokenizer(), 0, 1)
    found = []
    for _ in range(4):
        next(loader)
        found.append(loader.metrics()["data_tokens/code"] / 16)
    loader.close()
    assert found == [1, 2, 6, 10]


def test_a_state_of_another_number_of_sources_is_refused():
    """7 contiguous sources have rows of the same shape as 6 of best fit."""
    loaders = [
        DataLoader(
            Blend({str(n): ["aaa"] for n in range(count)}, (Phase(1, (1.0,) * count),)),
            Encoder(BytesTokenizer()),
            8,
            1,
            1,
            packing=packing,
        )
        for count, packing in ((7, "contiguous"), (6, "best_fit"))
    ]
    state = loaders[0].state_dict()
    assert state["rows"].shape == loaders[1].state_dict()["rows"].shape
    with pytest.raises(CheckpointError, match=r"data\.sources or data\.packing changed"):
        loaders[1].load_state_dict(state)
