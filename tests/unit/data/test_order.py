"""Documents have numbers; who asks for a number gets the same document on every layout."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data.encode import Encoder
from torchtitan.data.order import (
    Origin,
    Place,
    ShuffledDocuments,
    StreamedDocuments,
    count_lanes,
    epochs,
    permute,
)
from torchtitan.data.sources import num_shards
from torchtitan.errors import BadDocumentError, DataError

TEXTS = [f"{i}" for i in range(1, 12)]


def encode(text: str) -> np.ndarray:
    return np.array([int(text)])


class Files:
    """A sequential source whose shards are lists of texts; notes which of them are opened."""

    def __init__(self, shards: list[list[str]]) -> None:
        self._shards = shards
        self.num_shards = len(shards)
        self.opened: list[int] = []

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(map(self.shard, range(self.num_shards)))

    def shard(self, index: int) -> Iterator[str]:
        self.opened.append(index)
        return iter(self._shards[index])


def files(shards: int, texts: int = 6) -> Files:
    """Text `100 s + i` is the `i`-th of shard `s`."""
    return Files([[str(100 * s + i) for i in range(1, texts + 1)] for s in range(1, shards + 1)])


def stream(source, rows: range, stride: int, places=None) -> StreamedDocuments:
    lanes = count_lanes(num_shards(source), stride)
    places = places or [(row, Origin()) for row in rows]
    return StreamedDocuments(source, encode, stride, lanes, places)


def value(documents: StreamedDocuments, number: int) -> int:
    return int(documents.open(number)[0][0])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 37, 1000])
def test_the_shuffle_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**63):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_the_shuffle_stays_as_it_was() -> None:
    """Else runs that are resumed would read other documents."""
    assert permute(np.arange(10), 10, 7).tolist() == [1, 5, 8, 2, 7, 6, 4, 3, 9, 0]
    assert permute(np.array([0, 1, 999]), 1000, 2**64 - 3).tolist() == [911, 683, 687]
    assert permute(np.array([5]), 10**12, 12345).tolist() == [36584856756]
    documents = ShuffledDocuments(TEXTS, encode, seed=5)
    first, second = ([int(documents.open(n)[0][0]) for n in range(i, i + 11)] for i in (0, 11))
    assert first == [5, 9, 7, 3, 11, 4, 10, 8, 6, 1, 2]
    assert second == [1, 7, 10, 8, 6, 3, 5, 11, 4, 9, 2]


def test_each_epoch_has_every_document_once_in_an_order_of_its_own() -> None:
    documents = ShuffledDocuments(TEXTS, encode, seed=5)
    values = [int(documents.open(n)[0][0]) for n in range(4 * len(TEXTS))]
    epochs = [values[i : i + len(TEXTS)] for i in range(0, len(values), len(TEXTS))]
    assert all(sorted(epoch) == list(map(int, TEXTS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert not documents._planned  # of a long run, nothing is kept


def test_the_order_depends_on_the_seed() -> None:
    orders = {
        tuple(int(ShuffledDocuments(TEXTS, encode, seed).open(n)[0][0]) for n in range(11))
        for seed in range(4)
    }
    assert len(orders) == 4


def test_rows_that_have_the_same_document_open_share_its_tokens() -> None:
    documents = ShuffledDocuments(["7"], encode, seed=0)
    first, _ = documents.open(0)
    assert documents.open(3)[0] is first


@pytest.mark.parametrize(
    ("shards", "rows", "lanes"),
    [(1, 8, 1), (15, 8, 1), (16, 8, 2), (1024, 8, 8), (1024, 512, 64), (1024, 96, 48), (999, 7, 7)],
)
def test_lanes_divide_the_batch_and_have_shards_enough(shards: int, rows: int, lanes: int) -> None:
    assert count_lanes(shards, rows) == lanes


@pytest.mark.parametrize(
    ("shards", "rows", "lanes"),
    [(10**5, 10_000, 1250), (10**5, 9992, 1249), (1024, 10_000, 128), (1024, 251, 31)],
)
def test_rows_of_a_large_batch_share_a_lane_with_few(shards: int, rows: int, lanes: int) -> None:
    assert count_lanes(shards, rows) == lanes


def test_without_shards_rows_take_the_documents_in_turn() -> None:
    documents = stream(TEXTS, range(3), 3)
    assert [value(documents, n) for n in range(25)] == [n % 11 + 1 for n in range(25)]


def test_empty_texts_have_no_number() -> None:
    documents = stream(["", "1", "", "2", ""], range(1), 1)
    assert [value(documents, n) for n in range(4)] == [1, 2, 1, 2]


def test_of_arrays_too_only_empty_ones_have_no_number() -> None:
    ids = [np.array(ids, np.int32) for ids in ([], [3, 4], [0], [], [5])]
    documents = StreamedDocuments(ids, Encoder(BytesTokenizer()), 1, 1, [(0, Origin())])
    assert [documents.open(n)[0].tolist() for n in range(4)] == [[3, 4], [0], [5], [3, 4]]


def test_a_rank_opens_the_shards_of_its_own_rows_alone() -> None:
    """16 shards and 4 rows: two lanes of two rows each."""
    everything: list[int] = []
    for rank in range(2):
        source = files(16)
        documents = stream(source, range(2 * rank, 2 * rank + 2), stride=4)
        numbers = [4 * turn + row for turn in range(24) for row in (2 * rank, 2 * rank + 1)]
        everything += [value(documents, number) for number in numbers]
        assert source.opened == list(range(rank, 16, 2))
    assert sorted(everything) == [100 * s + i for s in range(1, 17) for i in range(1, 7)]


def test_a_lane_may_have_a_row_more_than_another() -> None:
    """16 shards and 17 rows: two lanes, of 8 rows and of 9."""
    source = files(16, texts=9)
    documents = stream(source, range(17), stride=17)
    first = [value(documents, number) for number in range(2 * 17)]
    assert first[:8] == list(range(101, 109)) and first[8:17] == list(range(201, 210))
    assert first[17:25] == [109, *range(301, 308)] and first[25:] == list(range(401, 410))
    ranks = [stream(files(16, texts=9), range(row, row + 1), stride=17) for row in range(17)]
    assert [value(ranks[number % 17], number) for number in range(2 * 17)] == first


def test_ranks_that_share_a_lane_get_what_one_rank_would_get() -> None:
    numbers = range(40)
    one = stream(files(16), range(4), stride=4)
    expected = [value(one, number) for number in numbers]
    ranks = [stream(files(16), range(row, row + 1), stride=4) for row in range(4)]
    assert [value(ranks[number % 4], number) for number in numbers] == expected


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_resumed_stream_begins_with_the_shard_of_its_place(epoch: int) -> None:
    source = files(16)
    documents = stream(source, range(2), stride=2)
    per_epoch = 16 * 6
    places = []
    for number in range(epoch * per_epoch + 52):
        _, origin = documents.open(number)
        places.append((number, origin))
    expected = [value(documents, number) for number in range(len(places), len(places) + 30)]

    resumed_source = files(16)
    resumed = stream(resumed_source, range(2), 2, places[-2:])
    for number, _ in places[-2:]:
        resumed.open(number)
    actual = [value(resumed, number) for number in range(len(places), len(places) + 30)]
    assert actual == expected
    # Two lanes of 8 shards with 6 texts each; both were at their 26th text, in the fifth shard.
    assert resumed_source.opened[:2] == [8, 9]
    # The texts before the place, which nobody asks for, are not held.
    assert not any(lane._waiting for lane in resumed._lanes.values())


def test_rows_of_a_lane_are_resumed_from_the_one_that_is_behind() -> None:
    whole = stream(files(16), range(2), stride=4)
    numbers = [80, 1, 84, 5]
    places = [(number, whole.open(number)[1]) for number in numbers[:2]]
    assert places[0][1] > places[1][1]
    resumed = stream(files(16), range(2), 4, places)
    expected = stream(files(16), range(2), stride=4)
    assert [value(resumed, n) for n in numbers] == [value(expected, n) for n in numbers]


def test_threads_take_turns_to_read_a_lane() -> None:
    class Slow:
        def __iter__(self) -> Iterator[str]:
            for text in TEXTS:
                time.sleep(0.001)  # in which another thread may run
                yield text

    documents = stream(Slow(), range(2), 2)

    def of_row(row: int) -> list[int]:
        return [value(documents, number) for number in range(row, 30, 2)]

    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(of_row, range(2)))
    assert taken == [[number % 11 + 1 for number in range(row, 30, 2)] for row in range(2)]


def test_rows_apart_wait_for_one_another_but_hold_only_their_own_texts() -> None:
    documents = stream(TEXTS, range(1, 3), stride=4)
    for turn in range(50):  # row 2 lags behind
        documents.open(4 * turn + 1)
    (lane,) = documents._lanes.values()
    assert len(lane._waiting) == 49
    assert [value(documents, 4 * turn + 2) for turn in range(50)] == [
        (4 * turn + 2) % 11 + 1 for turn in range(50)
    ]
    assert not lane._waiting


def test_empty_shards_are_passed_over() -> None:
    shards = [[] for _ in range(16)]
    shards[4] = ["1", "2"]
    documents = stream(Files(shards), range(2), stride=2)
    assert [value(documents, n) for n in (0, 2, 4, 6)] == [1, 2, 1, 2]
    # The second lane of 17 shards comes to shard 4 in its second turn around them.
    documents = stream(Files([*shards, []]), range(2), stride=2)
    assert [value(documents, n) for n in (1, 3, 5, 7)] == [1, 2, 1, 2]


@pytest.mark.parametrize("source", [[""], [], Files([[], [""]])])
def test_a_source_without_text_is_empty(source) -> None:
    with pytest.raises(DataError, match="empty"):
        stream(source, range(1), 1).open(0)


def test_a_lane_of_empty_shards_is_told() -> None:
    source = Files([["1"], ["", ""]] * 8)
    with pytest.raises(DataError, match=r"of its 16 files, .* from 0, 1, 3 and .* Remove the emp"):
        stream(source, range(2), stride=2).open(1)


def test_a_malformed_document_is_counted_each_time_it_comes() -> None:
    class Table:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> str:
            if index:
                raise BadDocumentError("no text")
            return "text"

    encoder = Encoder(BytesTokenizer(), on_error="skip")
    documents = ShuffledDocuments(Table(), encoder, seed=0)
    for number in range(40):
        documents.open(number)
    assert encoder.skipped == 30


def test_epochs_of_a_stream_are_counted_in_the_shards_of_all_lanes() -> None:
    files = Files([[text] for text in TEXTS[:8]])
    read = [epochs(files, 4, lanes=2, place=Place(0, turn=turn), read=0.5) for turn in (0, 2, 4, 6)]
    assert read == [0, 0.5, 1, 1.5]
