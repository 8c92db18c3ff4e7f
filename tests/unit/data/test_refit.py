"""A run goes on with other sources, or a larger batch, without repeating or leaving out data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config.batch import BatchSizes
from torchtitan.data import DataLoader
from torchtitan.data.encode import Encoder
from torchtitan.data.mixing import Blend, Phase, split_rows
from torchtitan.data.order import Place
from torchtitan.data.refit import count_read_again, refit

SEQ_LEN = 16


def loader(batch: int, *sources: str) -> DataLoader:
    """Each source has documents of several lengths, of one letter of its own."""
    texts = {name: [name * (number * 7 % 23 + 1) for number in range(120)] for name in sources}
    blend = Blend(texts, (Phase(1, (1.0,) * len(sources)),))
    return DataLoader(blend, Encoder(BytesTokenizer()), SEQ_LEN, batch, batch, seed=3)


def read(one: DataLoader, steps: int) -> list[torch.Tensor]:
    return [next(one)["tokens"] for _ in range(steps)]


def go_on(before: DataLoader, was: list[str], after: DataLoader, now: list[str]) -> DataLoader:
    rows = refit(
        before.state_dict()["rows"].numpy(),
        was,
        now,
        BatchSizes.of(after.global_batch_size),
        step=6,
    )
    after.load_state_dict({"rows": torch.from_numpy(rows), "seq_len": SEQ_LEN})
    before.close()
    return after


def remaining(one: DataLoader) -> list[list[tuple[int, int]]]:
    """For each source: the documents of the first ten epochs to be read, and from which token."""
    batch, parts = one.global_batch_size, split_rows(one._places, len(one._blend.sources))[1]
    parts = [[Place(*numbers) for numbers in part.tolist()] for part in parts]
    for part in parts:
        assert [place.document % batch for place in part] == list(range(batch))
    return [
        sorted(
            (document, place.offset if document == place.document else 0)
            for place in part
            for document in range(place.document, 1200, batch)
        )
        for part in parts
    ]


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("sources", [["a"], ["a", "b"]])
def test_a_larger_batch_shares_the_documents_not_read_yet(sources: list[str], factor: int) -> None:
    before = loader(4, *sources)
    read(before, 6)
    expected, told = remaining(before), before.metrics()
    after = go_on(before, sources, loader(4 * factor, *sources), sources)
    assert remaining(after) == expected
    assert after.metrics() == pytest.approx(told, rel=0.2)  # epochs count begun documents alike
    assert len(torch.cat(read(after, 2))) == 8 * factor
    after.close()


def test_a_smaller_batch_leaves_no_document_out() -> None:
    before = loader(12, "a", "b")
    read(before, 9)
    was, rows = remaining(before), before.state_dict()["rows"].numpy()
    after = go_on(before, ["a", "b"], loader(4, "a", "b"), ["a", "b"])
    again = 0
    for left, now in zip(was, remaining(after), strict=True):
        whole, cut = set(now), {document for document, offset in left if offset}
        assert {document for document, _ in left} <= {document for document, _ in now}
        assert all(entry in left for entry in whole if entry[1])
        again += len({document for document, _ in now} - {document for document, _ in left})
        again += len([document for document, offset in now if not offset and document in cut])
    assert again == count_read_again(rows, ["a", "b"], 4) > 0
    assert count_read_again(rows, ["a", "b"], 12) == count_read_again(rows, ["a", "b"], 24) == 0
    assert len(torch.cat(read(after, 2))) == 8
    after.close()


def test_sources_come_go_and_change_places() -> None:
    whole = loader(4, "a", "b")
    read(whole, 6)
    places = dict(zip("ab", remaining(whole), strict=True))
    state = whole.state_dict()
    for now in (["b", "a"], ["c", "a", "b"], ["b"], ["c", "b"]):
        before = loader(4, "a", "b")
        before.load_state_dict(state)
        after = go_on(before, ["a", "b"], loader(4, *now), now)
        fresh = loader(4, *now)
        for name, found, first in zip(now, remaining(after), remaining(fresh), strict=True):
            assert found == places.get(name, first)
        if len(now) > 1:  # shares begin anew, by the step of the run
            assert after.state_dict()["rows"][0, 0] == 6
            tokens = torch.cat(read(after, 3)).flatten().tolist()
            assert {name for name in now if ord(name) in tokens} == set(now)
            drawn = {name: after.metrics()[f"data_tokens/{name}"] for name in now}
            shares = {name: drawn[name] - (name != "c") * 12 * SEQ_LEN for name in now}
            assert max(shares.values()) - min(shares.values()) <= SEQ_LEN
        after.close()


def test_one_dataset_becomes_a_mixture() -> None:
    before = loader(4, "a")
    read(before, 6)
    (expected,) = remaining(before)
    after = go_on(before, ["a"], loader(4, "b", "a"), ["b", "a"])
    assert remaining(after)[1] == expected
    assert after.metrics()["data_tokens/a"] == 6 * 4 * SEQ_LEN
    after.close()


def test_rows_of_the_same_sources_and_batch_stay() -> None:
    before = loader(4, "a", "b")
    read(before, 3)
    rows = before.state_dict()["rows"].numpy()
    assert np.array_equal(refit(rows, ["a", "b"], ["a", "b"], BatchSizes.of(4), step=3), rows)
    before.close()
