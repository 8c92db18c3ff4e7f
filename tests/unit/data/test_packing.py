from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data.encode import Encoder
from torchtitan.data.order import Origin, Place, ShuffledDocuments
from torchtitan.data.packing import Row, to_batch
from torchtitan.errors import DataError

EOS = BytesTokenizer.eos_id


class Documents:
    """Document `n` is `lengths[n]` tokens `100 n`, `100 n + 1`, ..."""

    size = None

    def __init__(self, lengths: list[int], stride: int = 1) -> None:
        self._lengths = lengths
        self.stride = stride

    def open(self, number: int) -> tuple[np.ndarray, Origin]:
        return 100 * number + np.arange(self._lengths[number]), Origin(number, 7)


def sequence(row: Row, seq_len: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, positions and document ids of the next sequence, with the token after it."""
    out = np.empty((3, seq_len + 1), dtype=np.int64)
    row.fill(*out)
    tokens, positions, document_ids = out.tolist()
    return tokens, positions, document_ids


def test_eos_ends_every_document() -> None:
    assert Encoder(BytesTokenizer())("aé").tolist() == [*"aé".encode(), EOS]
    other = SimpleNamespace(encode=lambda text: [70_000] * len(text), eos_id=3)
    assert Encoder(other)("ab").tolist() == [70_000, 70_000, 3]


def test_an_empty_text_is_no_document() -> None:
    assert Encoder(BytesTokenizer())("").size == 0


@pytest.mark.parametrize("text", [5, None, {"text": "a"}, b"bytes"])
def test_what_is_not_text_is_refused(text: object) -> None:
    with pytest.raises(DataError, match=f"a {type(text).__name__}, not text"):
        Encoder(BytesTokenizer())(text)


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(DataError, match="not Unicode"):
        Encoder(BytesTokenizer())("a \ud800")


def test_a_row_takes_every_stride_th_document() -> None:
    row = Row(Documents([2, 9, 3, 9, 4], stride=2), Place(0))
    tokens, positions, document_ids = sequence(row, 7)
    assert tokens == [0, 1, 200, 201, 202, 400, 401, 402]
    assert positions == [0, 1, 0, 1, 2, 0, 1, 2]
    assert document_ids == [0, 0, 1, 1, 1, 2, 2, 2]
    assert row.place == (4, 2, 4, 7)  # the last token begins the next sequence


def test_a_document_longer_than_a_sequence_goes_on_in_the_next_one() -> None:
    row = Row(Documents([10]), Place(0))
    assert sequence(row, 4) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0] * 5)
    assert sequence(row, 4) == ([4, 5, 6, 7, 8], [0, 1, 2, 3, 4], [0] * 5)


def test_empty_documents_are_passed_over() -> None:
    row = Row(Documents([0, 0, 2, 0, 2]), Place(0))
    assert sequence(row, 3)[0] == [200, 201, 400, 401]


def test_rows_that_share_a_document_begin_at_even_distances() -> None:
    documents = ShuffledDocuments(["x"], lambda text: np.arange(100), seed=0, stride=4)
    rows = [Row(documents, Place(row)) for row in range(4)]
    assert [row.place[1] for row in rows] == [0, 25, 50, 75]
    resumed = Row(documents, Place(4))  # where its second one begins
    assert resumed.place[1] == 0


def test_a_place_beyond_the_document_is_refused() -> None:
    Row(Documents([5]), Place(0, 4))
    with pytest.raises(DataError, match=r"token 5 of document 0.*5 tokens.*has changed"):
        Row(Documents([5]), Place(0, 5))


def test_a_last_token_that_is_not_learned_is_no_label() -> None:
    arrays = np.array([[[5, 6, ~7]], [[0, 1, 2]], [[0, 0, 0]]])
    batch = to_batch(*arrays, document_mask=False)
    assert batch["tokens"].tolist() == [[5, 6]] and batch["labels"].tolist() == [[6, IGNORE_INDEX]]


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_batch_predicts_the_next_token_of_each_row(document_mask: bool) -> None:
    rows = [Row(Documents([3, 9, 9], stride=2), Place(row)) for row in range(2)]
    arrays = np.empty((3, len(rows), 4 + 1), dtype=np.int64)
    for row, *out in zip(rows, *arrays, strict=True):
        row.fill(*out)
    batch = to_batch(*arrays, document_mask)
    assert batch["tokens"].tolist() == [[0, 1, 2, 200], [100, 101, 102, 103]]
    at_end = IGNORE_INDEX if document_mask else 200
    assert batch["labels"].tolist() == [[1, 2, at_end, 201], [101, 102, 103, 104]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert all(tensor.is_contiguous() for tensor in batch.values())


def later(document_mask: bool, count: int) -> dict[str, list]:
    """A row of two documents, 1 to 4 and 5 to 7, whose token 6 is a prompt's."""
    tokens = np.array([[1, 2, 3, 4, 5, ~6, 7]], np.int32)
    ids = np.array([[0, 0, 0, 0, 1, 1, 1]], np.int32)
    batch = to_batch(tokens, np.zeros_like(ids), ids, document_mask, count)
    return {name: batch[name][0].tolist() for name in ("next_tokens", "labels")}


def test_later_tokens_and_their_labels() -> None:
    no = IGNORE_INDEX
    assert later(False, 2) == {
        "next_tokens": [[2, 3], [3, 4], [4, 5], [5, 6], [6, 7], [7, 0]],
        "labels": [[2, 3, 4], [3, 4, 5], [4, 5, no], [5, no, 7], [no, 7, no], [7, no, no]],
    }
    assert later(True, 2) == {
        "next_tokens": [[2, 3], [3, 4], [4, 5], [5, 6], [6, 7], [7, 0]],
        "labels": [[2, 3, 4], [3, 4, no], [4, no, no], [no, no, no], [no, 7, no], [7, no, no]],
    }


def test_the_last_later_token_may_be_one_that_is_not_predicted() -> None:
    zeros = np.zeros((1, 2), np.int32)
    batch = to_batch(np.array([[1, ~2]], np.int32), zeros, zeros, False, later_tokens=1)
    assert batch["next_tokens"].tolist() == [[[2]]]
    assert batch["labels"].tolist() == [[[IGNORE_INDEX, IGNORE_INDEX]]]


def test_more_later_tokens_than_a_sequence_has() -> None:
    beyond = later(False, 9)
    first, second, *_ = beyond["next_tokens"]
    assert (first, second) == ([2, 3, 4, 5, 6, 7, 0, 0, 0], [3, 4, 5, 6, 7, 0, 0, 0, 0])
    assert beyond["labels"][0] == [2, 3, 4, 5, IGNORE_INDEX, 7, *[IGNORE_INDEX] * 4]
