from __future__ import annotations

import logging

import numpy as np
import pytest

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data import encode
from torchtitan.data.encode import Encoder
from torchtitan.errors import BadDocumentError, DataError

EOS = BytesTokenizer.eos_id


def test_ids_are_taken_as_they_are() -> None:
    ids = np.array([5, 6], np.uint16)
    assert Encoder(BytesTokenizer())(ids) is ids
    assert Encoder(BytesTokenizer())("a").tolist() == [97, EOS]


def test_a_tokenizer_derived_from_ours_encodes_its_own_way() -> None:
    class LowerCase(BytesTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

    assert Encoder(LowerCase())("A").tolist() == [97, EOS]


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1.0, 3.7]),
        np.array([[1, 2], [3, 4]]),
        np.array([5, 2**32 + 5]),
        np.array([2**31], np.uint32),
        np.array(["a", "b"]),
    ],
)
def test_an_array_of_other_numbers_holds_no_token_ids(ids: np.ndarray) -> None:
    with pytest.raises(BadDocumentError, match=rf"array of {ids.dtype} .*not of token ids"):
        Encoder(BytesTokenizer())(ids)


def test_a_list_of_numbers_is_no_conversation() -> None:
    with pytest.raises(BadDocumentError, match="a list, not text, a list of messages, or a NumPy"):
        Encoder(BytesTokenizer(), chat=lambda: None)([1, 2, 3])


@pytest.mark.parametrize(
    "document", [5, [{"role": "user"}], "a \ud800", BadDocumentError("line 7")]
)
def test_what_is_malformed_stops_or_is_counted(document: object, caplog) -> None:
    with pytest.raises(BadDocumentError):
        Encoder(BytesTokenizer())(document)
    encoder = Encoder(BytesTokenizer(), on_error="skip")
    assert encoder(document).size == 0 and encoder("a").size == 2
    assert encoder.skipped == 1
    assert caplog.text.encode()  # a lone surrogate would have no UTF-8


def test_the_first_skipped_documents_are_in_the_log(caplog) -> None:
    encoder = Encoder(BytesTokenizer(), on_error="skip")
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        for number in range(20):
            encoder(BadDocumentError(f"line {number}"))
    assert len(caplog.messages) == 10 and caplog.messages[0] == "skipped: line 0"
    assert caplog.messages[-1] == "skipped: line 9 (further ones are only counted)"
    assert encoder.skipped == 20


def test_a_dataset_of_malformed_documents_does_not_run_for_ever() -> None:
    encoder = Encoder(BytesTokenizer(), on_error="skip")
    with pytest.raises(DataError, match=r"10,000 malformed documents in a row: line 1"):
        while True:
            encoder(BadDocumentError("line 1"))


@pytest.mark.parametrize("good", ["good", np.array([5, 6])], ids=type)
def test_a_good_document_ends_the_row(good: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_MOST_IN_A_ROW", 2)
    encoder = Encoder(BytesTokenizer(), on_error="skip")
    for _ in range(5):
        encoder(BadDocumentError("bad"))
        encoder(good)
    assert encoder.skipped == 5
