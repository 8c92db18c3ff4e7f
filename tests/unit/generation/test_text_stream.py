"""Text comes token by token, without half characters."""

import pytest

from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.generation.text import TextStream, encode_prompt


class Words:
    """Writes a space before each token but the first of a text, as SentencePiece does."""

    vocab_size, bos_id, eos_id = 100, None, 99

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if i != self.eos_id)


@pytest.mark.parametrize("text", ["plain", "naïve 東京 🏖️!", "\N{REPLACEMENT CHARACTER}x"])
def test_bytes(text):
    stream = TextStream(BytesTokenizer(), BytesTokenizer().encode("before "))
    parts = [stream.add(byte) for byte in text.encode()]
    assert "".join(parts) + stream.end() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_bytes_that_are_no_text_are_not_waited_for():
    stream = TextStream(BytesTokenizer(), [])
    parts = [stream.add(0xFF) for _ in range(20)]
    assert len("".join(parts)) >= 16


def test_a_space_that_depends_on_what_comes_before():
    stream = TextStream(Words(), [1, 2])
    assert [stream.add(3), stream.add(4), stream.end()] == [" 3", " 4", ""]


def test_a_space_after_a_special_token_within_the_text():
    stream = TextStream(Words(), [1, 2])
    assert [stream.add(3), stream.add(99), stream.add(4)] == [" 3", "", " 4"]


def test_an_empty_prompt_is_what_comes_before_a_document():
    assert encode_prompt(BytesTokenizer(), "", False) == [BytesTokenizer.bos_id]
    assert encode_prompt(Words(), "", True) == [99]


def test_a_prompt_begins_as_documents_did():
    bos = BytesTokenizer.bos_id
    assert encode_prompt(BytesTokenizer(), "a", False, add_bos=True) == [bos, 97]
    assert encode_prompt(BytesTokenizer(), "", False, add_bos=True) == [bos]
    assert encode_prompt(Words(), "3", False, add_bos=True) == [3]  # has none
