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
from torchtitan.tools.logging import logger

_TRIED = 512
"""Tokens of the trial of an unknown model's cache."""
_LEAST_TRIED = 6
_TRIED_ALONE = 16
"""Number of these that come one by one, after the others as a prompt."""

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
        is_ours = type(model).__module__.startswith("torchtitan.models.")
        self.uses_cache = can_cache(model) and (is_ours or self._cache_is_right(max_seq_len))
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

    @torch.no_grad()
    def _cache_is_right(self, max_seq_len: int | None) -> bool:
        """Try the cache of a model that is not ours: it may mix tokens in other ways too.

        Some of these reach far, such as a memory of earlier chunks, so the trial uses a long text.
        """
        tokens = _trial_tokens(self.model, self.device, max_seq_len)
        try:
            whole = whole_tensor(self.model(tokens))
        except (AssertionError, IndexError, RuntimeError, ValueError):  # too many tokens
            tokens = tokens[:, :_LEAST_TRIED]
            whole = whole_tensor(self.model(tokens))
        prompt = tokens.shape[1] - min(_TRIED_ALONE, tokens.shape[1] // 2)
        cache = KVCache(self.model, tokens.shape[1], torch.zeros_like(tokens[:, 0]))
        try:
            with cache.attached():
                first = whole_tensor(cache.forward(tokens[:, :prompt]))
                others = tokens[:, prompt:].split(1, dim=1)
                rest = torch.cat([whole_tensor(cache.forward(token)) for token in others], dim=1)
        except (RuntimeError, TypeError, ValueError) as error:
            differences, reason = [float("inf")], f": {error}"
        else:
            pairs = (first, whole[:, :prompt]), (rest, whole[:, prompt:])
            differences = [float((a - b).norm() / b.norm()) for a, b in pairs]
            reason = ""
        limit = 1e-3 if whole.dtype == torch.float32 else 5e-2
        right = all(difference < limit for difference in differences)  # False for NaN
        if not right:
            logger.warning(
                "%s gives different results with a key-value cache%s. Generating without one, "
                "which takes longer per token",
                type(self.model).__name__,
                reason,
            )
        return right


def _trial_tokens(model: nn.Module, device: torch.device, max_seq_len: int | None) -> torch.Tensor:
    """Return random tokens, `[1, seq]`, as many as the model surely has positions for."""
    embedding = getattr(model, "tok_embeddings", None)
    if max_seq_len is None:
        max_seq_len = min(_sizes_of_tables(model, embedding), default=_TRIED)
    seq = max(min(_TRIED, max_seq_len), _LEAST_TRIED)
    # They depend on the model only, and do not advance the global random generator.
    generator = torch.Generator().manual_seed(0)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = getattr(embedding, "num_embeddings", None) or min(sizes, default=2)
    return torch.randint(vocabulary, (1, seq), generator=generator).to(device)


def _sizes_of_tables(model: nn.Module, embedding: nn.Module | None) -> Iterator[int]:
    """Yield sizes of possible position tables. An index beyond one is an error that ends CUDA."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module is not embedding and module.num_embeddings >= _LEAST_TRIED:
                yield module.num_embeddings
        elif not type(module).__module__.startswith("torch.nn."):
            for table in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                yield from (size for size in table.shape[:-1] if size >= _LEAST_TRIED)


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
