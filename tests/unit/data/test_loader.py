"""The data of a step depends on the seed and the step alone, and resuming goes on exactly."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.config import JobConfig
from torchtitan.data import DataLoader, build_dataloader
from torchtitan.data.encode import Encoder
from torchtitan.data.order import ShuffledDocuments
from torchtitan.errors import CheckpointError, ConfigError, DataError

TEXTS = [f"document {i} " + "abcdefg"[: i % 7] * (i % 5) for i in range(37)]
ROWS, SEQ_LEN = 8, 24


class Stream:
    """A sequential source."""

    def __init__(self, texts: Sequence[str] = ("", *TEXTS)) -> None:
        self._texts = texts

    def __iter__(self):
        return iter(self._texts)


def loader(rank: int = 0, ranks: int = 1, local: int = 1, source=TEXTS, **options) -> DataLoader:
    return DataLoader(
        source,
        Encoder(BytesTokenizer()),
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
    first, second = (loader(rank, 2) for rank in range(2))
    with pytest.raises(CheckpointError, match="global_batch_size"):
        second.load_state_dict(first.state_dict())


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


@given(
    texts=st.lists(st.text(alphabet="ab\n é", max_size=30), min_size=1, max_size=12).filter(any),
    sequential=st.booleans(),
    seq_len=st.integers(1, 20),
    taken=st.integers(0, 5),
    layouts=st.tuples(*[st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])] * 2),
)
@settings(max_examples=60)
def test_rows_are_their_documents_and_go_on_after_a_resume(
    texts: list[str], sequential: bool, seq_len: int, taken: int, layouts: tuple
) -> None:
    """Of any texts, on any layout, resumed at any step on any other layout."""
    source = Stream(texts) if sequential else texts

    def loaders(ranks: int, local: int) -> list[DataLoader]:
        return [
            DataLoader(source, Encoder(BytesTokenizer()), seq_len, local, 4, rank, ranks, seed=1)
            for rank in range(ranks)
        ]

    before = loaders(*layouts[0])
    got = steps(before, taken)
    state = torch.cat([loader.state_dict()["rows"] for loader in before])
    after = loaders(*layouts[1])
    for loader, rows in zip(after, state.chunk(len(after)), strict=True):
        loader.load_state_dict({"rows": rows})
    got += steps(after, 4)
    for loader in before + after:
        loader.close()

    encode = Encoder(BytesTokenizer())
    shuffled, numbered = ShuffledDocuments(texts, encode, seed=1), [text for text in texts if text]

    def document(number: int) -> list[int]:
        if sequential:
            return encode(numbered[number % len(numbered)]).tolist()
        return shuffled.open(number)[0].tolist()

    for row in range(4):
        tokens = torch.cat([batch[row] for batch in got]).tolist()
        start = 0
        if not sequential:  # rows that share a document of the first epoch begin within it
            start = len(document(row)) * (row - row % len(texts)) // 4
        stream = itertools.chain.from_iterable(document(n) for n in itertools.count(row, 4))
        assert tokens == list(itertools.islice(stream, start, start + len(tokens)))


def test_where_ranks_do_not_divide_the_batch_the_rest_predicts_nothing() -> None:
    def labels(rank: int, ranks: int) -> torch.Tensor:
        one = DataLoader(
            TEXTS, Encoder(BytesTokenizer()), SEQ_LEN, 2, 6, rank, ranks, seed=3, pad=True
        )
        assert one.gradient_accumulation_steps == 3 // ranks + (3 % ranks > 0)
        return torch.cat([next(one)["labels"] for _ in range(one.gradient_accumulation_steps)])

    expected = labels(0, 1)
    shared = torch.cat([labels(rank, 2) for rank in range(2)])
    assert torch.equal(shared[:6], expected)
    assert shared.shape[0] == 8 and (shared[6:] == IGNORE_INDEX).all()


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_a_rank_with_more_rows_than_the_batch_reads_each_document_of_a_stream_once(
    packing: Literal["contiguous", "best_fit"],
) -> None:
    def tokens(local: int) -> torch.Tensor:
        one = DataLoader(
            Stream(), Encoder(BytesTokenizer()), SEQ_LEN, local, 6, pad=True, packing=packing
        )
        batch = [next(one) for _ in range(one.gradient_accumulation_steps)]
        one.close()
        assert (torch.cat([part["labels"] for part in batch])[6:] == IGNORE_INDEX).all()
        return torch.cat([part["tokens"] for part in batch])[:6]

    assert torch.equal(tokens(8), tokens(3))
    assert torch.equal(tokens(4), tokens(3))


def test_a_batch_that_ranks_do_not_divide_is_otherwise_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size 6 is not a multiple"):
        DataLoader(TEXTS, Encoder(BytesTokenizer()), SEQ_LEN, 2, 6, 0, 2)


def test_looking_for_text_reads_no_more_than_the_first() -> None:
    class Table:
        asked: ClassVar[list[int]] = []

        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, index: int) -> str:
            self.asked.append(index)
            return "text"

    one = loader(local=8, source=Table())
    assert Table.asked == [0]
    next(one)
    assert max(Table.asked) > 10**9  # and the shuffle needs no table
    one.close()


def test_no_thread_is_without_a_row() -> None:
    """It would make the steps of the mixture for ever, which nobody takes."""
    before = set(threading.enumerate())
    one = loader(ranks=ROWS, workers=4)
    next(one)
    assert len(set(threading.enumerate()) - before) == 1
    one.close()


def test_threads_read_a_few_batches_ahead_however_many_passes_a_step_has() -> None:
    read: list[int] = []

    class Counted(list[str]):
        def __getitem__(self, index):  # type: ignore[override]
            read.append(index)
            return super().__getitem__(index)

    texts = Counted(["a" * SEQ_LEN] * 10_000)  # a document is a sequence
    one = DataLoader(texts, Encoder(BytesTokenizer()), SEQ_LEN, 2, 400, workers=2)
    next(one)
    before = 0
    while before != len(read):  # until all wait
        before = len(read)
        time.sleep(0.1)
    one.close()
    assert before < 400 + 30  # of each row its first document, and of some the next


def test_reset_goes_back_to_the_first_batch_and_a_state_to_its_own() -> None:
    one = loader(local=8)
    first = next(one)
    state = one.state_dict()
    second = next(one)
    next(one)
    one.reset()
    assert torch.equal(next(one)["tokens"], first["tokens"])
    next(one)
    next(one)
    one.load_state_dict(state)
    assert torch.equal(next(one)["tokens"], second["tokens"])


def test_an_iterator_is_no_source() -> None:
    with pytest.raises(DataError, match=r"iterator.* starts from the beginning"):
        loader(source=iter(TEXTS))


def config_of(path: Path, **training) -> JobConfig:
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "text", str(path)
    config.training.local_batch_size, config.training.seq_len = 2, 16
    for key, value in training.items():
        setattr(config.training, key, value)
    return config


def test_the_loader_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    config = config_of(tmp_path, global_batch_size=8, document_mask=True)
    one = build_dataloader(config, BytesTokenizer(), 1, 2)
    assert (one.global_batch_size, one.gradient_accumulation_steps) == (8, 2)
    batch = next(one)
    assert batch["tokens"].shape == (2, 16)
    one.close()
    with pytest.raises(ConfigError, match=r"training\.global_batch_size"):
        build_dataloader(config, BytesTokenizer(), 0, 3)


def test_errors_name_the_setting_when_opened_and_while_reading(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^training\.dataset = 'text': dataset_path = .*no such"):
        build_dataloader(config_of(tmp_path), BytesTokenizer(), 0, 1)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"^training\.dataset = 'text': empty"):
        build_dataloader(config_of(tmp_path), BytesTokenizer(), 0, 1)
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes(b"fine\n\xff")
    one = build_dataloader(config_of(tmp_path), BytesTokenizer(), 0, 1)
    with pytest.raises(DataError, match=r"^training\.dataset = 'text': .*b\.txt:2: not UTF-8"):
        list(itertools.islice(one, 20))


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
@pytest.mark.parametrize("documents", [1, 10, 64, 100])
def test_the_epoch_is_the_share_that_was_read(documents: int, packing: str) -> None:
    """Also with fewer documents than rows, which then begin in the middle of them."""
    loader = DataLoader(
        ["x" * 1999] * documents,
        Encoder(BytesTokenizer()),
        seq_len=100,
        local_batch_size=64,
        global_batch_size=64,
        packing=packing,
    )
    for step in range(1, 61):
        next(loader)
        true = step * 64 * 100 / (documents * 2000)
        assert loader.metrics()["data_epoch"] == pytest.approx(true, rel=0.03, abs=1.3 / documents)
    loader.close()
