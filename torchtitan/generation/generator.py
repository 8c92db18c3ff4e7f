"""Continues a batch of prompts, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

from torchtitan.distributed.dtensor import whole_tensor
from torchtitan.errors import DataError
from torchtitan.generation.cache import KVCache, can_cache
from torchtitan.generation.sampling import Sampler, Sampling

NextLogits = Callable[[list[list[int]]], torch.Tensor]
"""The tokens of each sequence so far -> logits of the next tokens, `[batch, vocab]`."""


@dataclass
class Completion:
    """The continuation of a prompt."""

    tokens: list[int] = field(default_factory=list)
    """The generated tokens, without the one that ended the text."""
    finish_reason: Literal["stop", "length"] = "length"
    """`stop`: the model ended the text. `length`: the limit of tokens was reached."""


class Generator:
    """Generates with a model.

    Models that attend by `torchtitan.models.common.attention` cache the keys and values of earlier
    tokens; for others, the whole sequence is recomputed for every token.

    Args:
        model: with its weights, on its device. It is put into eval mode.
        stop_tokens: tokens that end a text.
        group: the ranks that share the model (tensor parallelism); they must make all calls
            together.
        max_seq_len: tokens that the model is made for, if known.
    """

    def __init__(
        self,
        model: nn.Module,
        stop_tokens: Iterable[int] = (),
        group: dist.ProcessGroup | None = None,
        max_seq_len: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.stop_tokens = frozenset(stop_tokens)
        self.device = next(model.parameters()).device
        self.uses_cache = can_cache(model, max_seq_len)
        self._group = group

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        streams: Sequence[int] | None = None,
        on_token: Callable[[int, int | None], bool | None] | None = None,
    ) -> list[Completion]:
        """Continue each prompt until it ends or has `max_new_tokens` more.

        Args:
            prompts: token ids, at least one per prompt; their lengths may differ.
            streams: number of each prompt's stream of random numbers; None counts from 0.
            on_token: called with the number of a prompt and its next token, and with None when the
                text is over; it ends the text by returning true.

        Raises:
            DataError: a prompt is empty.
        """
        if not all(prompts):
            raise DataError("a prompt has no tokens; it needs at least one, such as bos or eos")
        sampler = Sampler(sampling, range(len(prompts)) if streams is None else streams)
        completions = [Completion() for _ in prompts]
        sequences = [list(prompt) for prompt in prompts]
        active = set(range(len(prompts))) if max_new_tokens > 0 else set()
        with self._open(sequences, max_new_tokens) as next_logits:
            while active:
                tokens = sampler.next_tokens(next_logits(sequences))
                if self._group is not None:  # ranks must not diverge over the last bit of a logit
                    dist.broadcast(tokens, group=self._group, group_src=0)
                for number, token in enumerate(tokens.tolist()):
                    sequences[number].append(token)  # has no effect if the text is over
                    if number not in active:
                        continue
                    completion = completions[number]
                    over = token in self.stop_tokens
                    if not over:
                        completion.tokens.append(token)
                        over = bool(on_token and on_token(number, token))
                    if over:
                        completion.finish_reason = "stop"
                    if over or len(completion.tokens) == max_new_tokens:
                        active.remove(number)
                        if on_token:
                            on_token(number, None)
        return completions

    @contextmanager
    def _open(self, sequences: list[list[int]], max_new_tokens: int) -> Iterator[NextLogits]:
        if not self.uses_cache:
            yield self._logits_of_last
            return
        longest = max(map(len, sequences), default=0)
        padding = torch.tensor([longest - len(s) for s in sequences], device=self.device)
        cache = KVCache(self.model, longest + max_new_tokens, padding)

        def next_logits(sequences: list[list[int]]) -> torch.Tensor:
            if cache.length:
                new = [s[-1:] for s in sequences]
            else:
                new = [[0] * (longest - len(s)) + s for s in sequences]
            for logits in cache.in_pieces(torch.tensor(new, device=self.device)):
                last = logits[:, -1]
            return whole_tensor(last)

        with cache.attached(), _last_token_only(self.model):
            yield next_logits

    def _logits_of_last(self, sequences: list[list[int]]) -> torch.Tensor:
        # Padding is at the end, where a causal model does not see it.
        tokens = pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
        logits = whole_tensor(self.model(tokens.to(self.device)))
        last = torch.tensor([len(s) - 1 for s in sequences], device=self.device)
        return logits[torch.arange(len(sequences), device=self.device), last]


@contextmanager
def _last_token_only(model: nn.Module) -> Iterator[None]:
    """Restrict the output layer to the last token, within the context: only that is used."""
    output = getattr(model, "output", None)
    if not isinstance(output, nn.Module):
        yield
        return
    # Prepended, so that it sees the last block's output before tensor parallelism's hook does.
    handle = output.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],), prepend=True)
    try:
        yield
    finally:
        handle.remove()
