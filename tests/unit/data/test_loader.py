"""The data of a step depends on the seed and the step alone, and resuming goes on exactly."""

from __future__ import annotations

import itertools

import pytest
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data import DataLoader
from torchtitan.data.order import permute
from torchtitan.errors import CheckpointError, DataError

TEXTS = [f"document {i} " + "abcdefg"[: i % 7] * (i % 5) for i in range(37)]
ROWS, SEQ_LEN = 8, 24


class Stream:
    """A sequential source."""

    def __iter__(self):
        return iter(["", *TEXTS])


def loader(rank: int = 0, ranks: int = 1, local: int = 1, source=TEXTS, **options) -> DataLoader:
    return DataLoader(
        source,
        BytesTokenizer(),
        seq_len=SEQ_LEN,
        local_batch_size=local,
        global_batch_size=ROWS,
        dp_rank=rank,
        dp_world_size=ranks,
        seed=3,
        **options,
    )


def steps(loaders: list[DataLoader], count: int) -> list[torch.Tensor]:
    """Tokens of the next global batches, `[rows, seq]` each."""
    return [
        torch.cat(
            [next(one)["tokens"] for one in loaders for _ in range(one.gradient_accumulation_steps)]
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("source", [TEXTS, Stream()], ids=["random_access", "stream"])
@pytest.mark.parametrize(("ranks", "local"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_every_layout_sees_the_same_global_batches(source, ranks: int, local: int) -> None:
    expected = steps([loader(local=8, source=source)], 30)
    actual = steps([loader(r, ranks, local, source) for r in range(ranks)], 30)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("source", [TEXTS, Stream()], ids=["random_access", "stream"])
def test_a_row_is_its_documents_one_after_another_over_several_epochs(source) -> None:
    batches = itertools.islice(loader(local=8, source=source), 40)
    rows = list(zip(*(batch["tokens"].tolist() for batch in batches), strict=True))
    for number, row in enumerate(rows):
        stream = list(itertools.chain(*row))
        documents, start = [], 0
        for place, token in enumerate(stream):
            if token == BytesTokenizer.eos_id:
                documents.append(bytes(stream[start:place]).decode())
                start = place + 1
        assert len(documents) * ROWS > 2 * len(TEXTS)
        assert set(documents) <= set(TEXTS)
        if isinstance(source, Stream):  # which keeps the order
            expected = [TEXTS[(number + i * ROWS) % len(TEXTS)] for i in range(len(documents))]
            assert documents == expected


def test_labels_are_the_next_tokens_of_the_stream() -> None:
    batches = list(itertools.islice(loader(local=8), 5))
    tokens = torch.cat([batch["tokens"] for batch in batches], dim=1)
    labels = torch.cat([batch["labels"] for batch in batches], dim=1)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])


def test_document_mask_predicts_nothing_across_documents() -> None:
    batch = next(loader(local=8, document_mask=True))
    at_end = batch["tokens"] == BytesTokenizer.eos_id
    assert at_end.any()
    assert torch.equal(batch["labels"] == IGNORE_INDEX, at_end)
    starts = torch.zeros_like(at_end)
    starts[:, 1:] = at_end[:, :-1]
    starts[:, 0] = True
    assert torch.equal(batch["positions"] == 0, starts)
    assert torch.equal(batch["document_ids"], starts.long().cumsum(1) - 1)


@pytest.mark.parametrize("source", [TEXTS, Stream()], ids=["random_access", "stream"])
@pytest.mark.parametrize("taken", [0, 1, 7, 20])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_resuming_on_another_number_of_ranks_goes_on_exactly(
    source, taken: int, ranks: int
) -> None:
    one = loader(local=4, source=source)
    steps([one], taken)
    rows = one.state_dict()["rows"]
    expected = steps([one], 10)

    share = ROWS // ranks
    resumed = [loader(r, ranks, 1, source) for r in range(ranks)]
    for r, each in enumerate(resumed):
        each.load_state_dict({"rows": rows[r * share : (r + 1) * share]})
    assert all(map(torch.equal, steps(resumed, 10), expected))


def test_a_state_of_another_batch_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="global_batch_size"):
        loader().load_state_dict({"rows": torch.zeros(4, 2, dtype=torch.int64)})


@pytest.mark.parametrize("source", [[], ["", ""]])
def test_an_empty_dataset_is_refused(source) -> None:
    with pytest.raises(DataError, match="empty"):
        loader(source=source)


def test_an_error_while_reading_reaches_the_consumer() -> None:
    def broken():
        yield "fine"
        raise DataError("file.jsonl:7: broken")

    class Broken:
        def __iter__(self):
            return broken()

    with pytest.raises(DataError, match=r"file.jsonl:7"):
        list(loader(local=8, source=Broken()))


@pytest.mark.parametrize("size", [1, 2, 3, 37, 1000])
def test_the_shuffle_is_a_permutation(size: int) -> None:
    for key in (0, 1, 2**63):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))
