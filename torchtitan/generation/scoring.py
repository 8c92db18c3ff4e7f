"""Computes log-likelihoods of given texts under a model, for evaluations of language models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from torchtitan.distributed.dtensor import whole_tensor
from torchtitan.errors import CheckpointError
from torchtitan.generation.sampling import NO_NUMBERS


@dataclass(frozen=True)
class Score:
    """Score of a continuation, given its context."""

    log_likelihood: float
    """Natural logarithm of its probability."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


@torch.no_grad()
def score(
    model: nn.Module,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
    max_seq_len: int | None = None,
) -> list[Score]:
    """Score continuations.

    Args:
        model: on its device, in eval mode.
        pairs: token ids of a context, at least one, and of a continuation, at least one.
        batch_size: pairs in one forward pass; pairs of similar lengths go together.
        max_seq_len: in longer texts, the model sees only this many tokens before the last one. A
            continuation has at most this many.

    Returns:
        One score per pair, in their order.

    Raises:
        CheckpointError: a logit is NaN.
    """
    device = next(model.parameters()).device
    texts = [(*context, *continuation) for context, continuation in pairs]
    if max_seq_len is not None:
        texts = [text[-max_seq_len - 1 :] for text in texts]
    order = sorted(range(len(pairs)), key=lambda i: -len(texts[i]))
    scores: dict[int, Score] = {}
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        # Padding is at the end, where a causal model does not see it.
        tokens = pad_sequence([torch.tensor(texts[i][:-1]) for i in numbers], batch_first=True)
        logits = whole_tensor(model(tokens.to(device)))
        for number, row in zip(numbers, logits, strict=True):
            scores[number] = _score(row, texts[number], len(pairs[number][1]))
    return [scores[i] for i in range(len(pairs))]


def _score(logits: torch.Tensor, text: Sequence[int], length: int) -> Score:
    """Score the last `length` tokens. `logits` `[seq, vocab]` are for all but the last token."""
    end = len(text) - 1
    logits = logits[end - length : end].float()
    targets = torch.tensor(text[-length:], device=logits.device)
    log_likelihood = -F.cross_entropy(logits, targets, reduction="sum").item()
    if math.isnan(log_likelihood):
        raise CheckpointError(NO_NUMBERS)
    return Score(log_likelihood, bool((logits.argmax(-1) == targets).all()))


def rolling_windows(
    tokens: Sequence[int], before: int, window: int
) -> list[tuple[list[int], list[int]]]:
    """Cut a text into pairs of context and continuation so that each token is predicted once.

    All windows but the last are disjoint, with the token before them as context; the last one
    reaches back to have a full context too.

    Args:
        before: token before the first one, such as bos.
        window: tokens that the model sees at a time.
    """
    text = [before, *tokens]
    pairs = []
    for start in range(1, len(text), window):
        end = min(start + window, len(text))
        first = max(end - window, 1) - 1
        pairs.append((text[first:start], text[start:end]))
    return pairs
