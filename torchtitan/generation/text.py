"""Text to prompts, and tokens to text as they come."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan.components.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4
"""Tokens that a character can need: UTF-8 has at most 4 bytes, and a token at least one."""


def encode_prompt(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, add_bos: bool = False
) -> list[int]:
    """Token ids of a prompt, at least one: an empty prompt is what comes before a document.

    Args:
        add_special_tokens: begin as the tokenizer's `encode_prompt` does, with bos for example.
        add_bos: begin with bos, as training did with this setting; the tokenizer must have it.
    """
    encode = tokenizer.encode
    if add_special_tokens:
        encode = getattr(tokenizer, "encode_prompt", encode)
    ids = list(encode(text))
    if add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids.insert(0, tokenizer.bos_id)
    return ids or [first_token(tokenizer)]


def first_token(tokenizer: Tokenizer) -> int:
    """What a text without context follows: bos, or else the end of another document."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


class TextStream:
    """The text of tokens that come one by one, without half characters.

    A tokenizer may write a token in other ways at the beginning of a text, so that each is decoded
    along with some before it.

    Args:
        prompt: the tokens before.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._tokens = list(prompt)[-2 * _LONGEST_CHARACTER :]
        self._begin, self._shown = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty within a character."""
        self._tokens.append(token)
        text = self._pending()
        incomplete = text.endswith("\N{REPLACEMENT CHARACTER}")
        if incomplete and len(self._tokens) - self._shown < _LONGEST_CHARACTER:
            return ""
        self._begin, self._shown = self._shown, len(self._tokens)
        return text

    def end(self) -> str:
        """What is left."""
        return self._pending()

    def _pending(self) -> str:
        before = self._decode(self._tokens[self._begin : self._shown])
        return self._decode(self._tokens[self._begin :])[len(before) :]
