from __future__ import annotations

import itertools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data import DataLoader
from torchtitan.data.best_fit import POOL_SEQUENCES, BestFitRow, best_fit, cut
from torchtitan.data.encode import Encoder
from torchtitan.data.mixing import Blend, Phase
from torchtitan.data.order import Origin, Place
from torchtitan.data.packing import to_batch
from torchtitan.errors import DataError
from torchtitan.models import llama3

EOS = BytesTokenizer.eos_id


@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_bins_hold_every_item_once_and_are_not_overfull(lengths: list[int]) -> None:
    bins = best_fit(lengths, 20)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in items) <= 20 for items in bins)
    assert all(items == sorted(items) for items in bins)
    # No bin is less than half full but one, as of two such the second would have been the first's.
    assert sum(sum(lengths[item] for item in items) <= 10 for items in bins) <= 1


@given(length=st.integers(0, 50), seq_len=st.integers(1, 12))
def test_the_pieces_of_a_document_have_every_label_once(length: int, seq_len: int) -> None:
    pieces = cut(np.arange(length), seq_len)
    assert all(len(piece) <= seq_len + 1 for piece in pieces)
    pairs = [(abs_id(a), b) for piece in pieces for a, b in itertools.pairwise(piece)]
    assert pairs == [(i, i + 1) for i in range(length - 1)]
    assert all(piece[0] < 0 for piece in pieces[1:])  # read, not learned again
    prompt = cut(~np.arange(length), seq_len)  # never learned
    assert all((piece < 0).all() for piece in prompt) and len(prompt) == len(pieces)


def abs_id(token: int) -> int:
    return int(~token if token < 0 else token)


class Documents:
    """Document `n` is the tokens `1000 n`, `1000 n + 1`, ..., so that none is like another."""

    size, stride = None, 1

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def open(self, number: int) -> tuple[np.ndarray, Origin]:
        length = self._lengths[number % len(self._lengths)]
        return 1000 * number + np.arange(length, dtype=np.int32), Origin()


@pytest.mark.parametrize("document_mask", [False, True])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any),
    seq_len=st.integers(2, 12),
    begin=st.integers(0, 9),
)
@settings(max_examples=40)
def test_no_token_is_lost_or_repeated(
    document_mask: bool, lengths: list[int], seq_len: int, begin: int
) -> None:
    """Of whole pools, each token but the first of a document is a label once."""
    documents = Documents(lengths)
    begin = min(begin, max(lengths[0] - 1, 0))  # as of rows that share a document
    row = BestFitRow(documents, seq_len, Place(0, begin))
    found, pools = Counter(), 0
    while pools < 2:
        arrays = np.empty((3, 1, seq_len + 1), np.int32)
        row.fill(*arrays[:, 0])
        batch = to_batch(*arrays, document_mask)
        for token, label in zip(
            batch["tokens"][0].tolist(), batch["labels"][0].tolist(), strict=True
        ):
            if label != IGNORE_INDEX and (document_mask or label == token + 1):
                found[token, label] += 1
        pools += row.place[-1] == 0
    expected = Counter()
    for number in range(row.place[0]):
        document = documents.open(number)[0][begin if number == 0 else 0 :]
        expected.update(itertools.pairwise(document.tolist()))
    assert found == expected


def test_documents_that_fill_a_sequence_and_its_last_label_are_packed_together() -> None:
    row = BestFitRow(Documents([4, 5]), 8, Place(0))
    padded = [row.fill(*np.empty((3, 9), np.int32)) > 0 for _ in range(29)]
    assert row.place[-1] == 0 and sum(padded) == 1  # of 57 documents, one is alone


def test_the_long_documents_of_different_rows_come_in_different_steps() -> None:
    documents = Documents([13, 12, 9, 7, 5, 3] * 8)
    orders = []
    for first in (0, 48):
        row, arrays = BestFitRow(documents, 12, Place(first)), np.empty((3, 13), np.int32)
        orders.append([row.fill(*arrays) or arrays[2].tolist() for _ in range(20)])
    assert orders[0] != orders[1]


def test_padding_after_tokens_that_are_not_learned_is_not_learned_either() -> None:
    class Prompts(Documents):
        def open(self, number: int) -> tuple[np.ndarray, Origin]:
            tokens, origin = super().open(number)
            return ~tokens, origin

    row, arrays = BestFitRow(Prompts([5]), 8, Place(0)), np.empty((3, 9), np.int32)
    assert row.fill(*arrays) == 3 and (arrays[0] < 0).all()


def test_padding_is_text_of_another_sequence_which_routers_treat_as_text() -> None:
    row, arrays = BestFitRow(Documents([5]), 8, Place(0)), np.empty((3, 9), np.int32)
    written: list[list[int]] = []
    while not written or row.place[-1] > 0:  # until the pool ends
        row.fill(*arrays)
        written.append(arrays[0].tolist())
    for sequence, following in itertools.pairwise([*written, written[0]]):
        assert sequence[5:] == [~token for token in following[:4]] and min(sequence[:5]) >= 0


def test_the_order_of_a_pool_stays_as_it_was() -> None:
    """A place in a checkpoint is the number of a sequence of its pool."""
    row, arrays = BestFitRow(Documents(list(range(2, 11))), 8, Place(0)), np.empty((3, 9), np.int32)
    firsts = []
    for _ in range(6):
        row.fill(*arrays)
        firsts.append(abs_id(arrays[0, 0]))
    assert firsts == [26000, 37000, 8000, 7000, 17000, 17008]


class Texts:
    """Random access that keeps the names of the threads that take its documents."""

    def __init__(self) -> None:
        self.takers: Counter[str] = Counter()

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> str:
        self.takers[threading.current_thread().name] += 1
        return "x" * (index % 7 + 1)


def test_pools_are_packed_by_the_reading_threads_and_not_for_a_source_that_pauses() -> None:
    rows, used, paused = 4, Texts(), Texts()
    blend = Blend({"used": used, "paused": paused}, (Phase(1, (1.0, 0.0)),))
    loader = DataLoader(
        blend, Encoder(BytesTokenizer()), 16, rows, rows, packing="best_fit", workers=2
    )
    next(loader)
    here = threading.current_thread().name
    for source in (used, paused):
        assert source.takers.pop(here) == rows + 1  # one to see that there is any
    assert used.takers.total() > rows * POOL_SEQUENCES and not paused.takers
    places = loader.state_dict()["rows"]
    loader.close()
    assert (places[:, -5] == torch.arange(rows)).all() and not places[:, -4:].any()


def test_a_sequence_that_the_pool_does_not_have_is_refused() -> None:
    with pytest.raises(DataError, match=r"sequence 32 of .* from document 4 on.*has changed"):
        row = BestFitRow(Documents([8]), 8, Place(4, sequence=32))
        row.fill(*np.zeros((3, 9), dtype=np.int64))


def test_whole_documents_stay_whole_and_padding_predicts_nothing() -> None:
    texts = ["a" * n for n in (5, 9, 3, 12, 7, 2, 10)]
    loader = DataLoader(
        texts, Encoder(BytesTokenizer()), 16, 1, 1, packing="best_fit", document_mask=True
    )
    for batch in itertools.islice(loader, 200):
        tokens, labels = batch["tokens"][0], batch["labels"][0]
        for number in batch["document_ids"][0].unique():
            part = batch["document_ids"][0] == number
            positions = batch["positions"][0][part]
            assert torch.equal(positions, torch.arange(len(positions)))
            document = tokens[part].tolist()
            learned = labels[part] != IGNORE_INDEX
            if not learned.any():  # padding
                assert number == batch["document_ids"].max()
                continue
            ids = [*document, *labels[part][-1:].tolist()]
            length = ids.index(EOS) if EOS in ids else -1
            assert length in {len(text) for text in texts}
    loader.close()


def test_the_share_of_padding_is_reported_and_small() -> None:
    rng = np.random.default_rng(0)
    texts = ["x" * n for n in rng.integers(1, 200, 500)]
    loader = DataLoader(
        texts, Encoder(BytesTokenizer()), 128, 4, 4, packing="best_fit", document_mask=True
    )
    padding = tokens = 0
    for _ in range(3 * POOL_SEQUENCES):
        batch = next(loader)
        tokens += batch["tokens"].numel()
        for ids, labels in zip(batch["document_ids"], batch["labels"], strict=True):
            last = ids == ids.max()
            if (labels[last] == IGNORE_INDEX).all():  # no document, but padding
                padding += int(last.sum())
    share = loader.metrics()["data_padding_share"]
    loader.close()
    assert 0 < share < 0.05
    assert share == pytest.approx(padding / tokens, rel=1e-9)


def test_a_packed_sequence_gives_what_its_documents_give_alone() -> None:
    """The model's attention with masks and positions, against each document on its own."""
    spec = llama3.get_train_spec("debugmodel")
    torch.manual_seed(0)
    args = spec.model_args
    model = spec.model_cls(args)
    model.init_weights()
    model.eval()
    texts = ["a few", "documents of", "several lengths", "are packed into", "one"]
    for packing in ("best_fit", "contiguous"):
        loader = DataLoader(
            texts, Encoder(BytesTokenizer()), 24, 2, 2, packing=packing, document_mask=True, seed=1
        )
        batch = next(loader)
        loader.close()
        with torch.no_grad():
            packed = model(
                batch["tokens"], positions=batch["positions"], document_ids=batch["document_ids"]
            )
            for row in range(2):
                for number in batch["document_ids"][row].unique():
                    part = batch["document_ids"][row] == number
                    alone = model(batch["tokens"][row][part][None])[0]
                    torch.testing.assert_close(packed[row][part], alone, atol=1e-5, rtol=1e-5)
