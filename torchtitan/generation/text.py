"""Encodes text as prompts, and decodes tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan.components.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4
"""Most tokens of a character: UTF-8 has at most 4 bytes, and a token has at least one."""


def encode_prompt(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, add_bos: bool = False
) -> list[int]:
    """Return the token ids of a prompt; an empty prompt becomes the token before a document.

    Args:
        add_special_tokens: begin as in the tokenizer's `encode_prompt`, with bos for example.
        add_bos: begin with bos, as in training with this setting; the tokenizer must have it.
    """
    encode = tokenizer.encode
    if add_special_tokens:
        encode = getattr(tokenizer, "encode_prompt", encode)
    ids = list(encode(text))
    if add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids or [first_token(tokenizer)]


def first_token(tokenizer: Tokenizer) -> int:
    """Return the token before a text without context: bos, or else the end of another document."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class TextStream:
    """The text of tokens that come one by one, without partial characters.

    A tokenizer may decode a token differently at the beginning of a text, so each is decoded
    together with some before it.

    Args:
        prompt: the tokens before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._tokens = list(prompt)[-2 * _LONGEST_CHARACTER :]
        self._begin, self._shown = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """Return the text completed by `token`; empty within a character."""
        self._tokens.append(token)
        text = self._pending()
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}")
        if incomplete and len(self._tokens) - self._shown < _LONGEST_CHARACTER:
            return ""
        if text:  # a special token has none, and what follows would be decoded as a beginning
            self._begin = self._shown
        self._shown = len(self._tokens)
        return text

    def end(self) -> str:
        """Return the remaining text."""
        return self._pending()

    def _pending(self) -> str:
        before = self._decode(self._tokens[self._begin : self._shown])
        return self._decode(self._tokens[self._begin :])[len(before) :]
