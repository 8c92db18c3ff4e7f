"""Caches keys and values of earlier tokens, so that each new token costs one token's work.

The cache is attached to a model from outside, like context parallelism: while it is attached, each
`ScaledDotProductAttention` attends to the keys of all tokens so far, and each `CausalMask` makes
the mask of the new tokens' queries. Models need no code for it, and training runs none.

Sequences of unequal lengths begin with padding, which counts as a separate document, so that the
rules for documents exclude it from windows, chunks and positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.distributed.fsdp import FSDPModule

from torchtitan.distributed.dtensor import whole_tensor
from torchtitan.models.common.attention import (
    AttentionMask,
    CausalMask,
    ScaledDotProductAttention,
    dense_mask,
)
from torchtitan.tools.logging import rank0

PIECE = 8192
"""Tokens in a pass over a long text: the memory of masks, logits and activations is limited so."""
_TRIED = 512
"""Tokens of the trial of an unknown model."""
_LEAST_TRIED = 6
_TRIED_ALONE = 16
"""Number of these that come one by one, after the others as a prompt."""


def can_cache(model: nn.Module, max_seq_len: int | None = None) -> bool:
    """Whether a model, in eval mode, computes the same through a cache.

    As far as the modules show, tokens must see each other only through `models.common.attention`,
    and `forward` must take the positions of its tokens. A model that is not ours may mix tokens in
    other ways too, so it is tried; a warning says if that fails.

    Args:
        max_seq_len: tokens that the model is made for, if known.
    """
    kinds = {type_ for m in model.modules() for type_ in type(m).__mro__}
    takes_positions = "positions" in inspect.signature(model.forward).parameters
    if not (takes_positions and {CausalMask, ScaledDotProductAttention} <= kinds):
        return False
    # FSDP makes a class of its own of a model's.
    own = type(model).__mro__[2] if isinstance(model, FSDPModule) else type(model)
    return own.__module__.startswith("torchtitan.models.") or _is_right(model, max_seq_len)


class KVCache:
    """The keys and values of a batch, `[batch, kv_heads, capacity, head_dim]` per layer.

    They are the inputs of the layer's kernel: under tensor parallelism, this rank's heads; for
    sliding windows, all tokens, most of them unseen; for multi-head latent attention, each head's
    keys.

    Args:
        model: a model for which `can_cache` is true.
        capacity: tokens of a sequence, padding included.
        padding: number of padding tokens at the beginning of each sequence, `[batch]` int64.
    """

    def __init__(self, model: nn.Module, capacity: int, padding: torch.Tensor) -> None:
        self.length = 0
        """Tokens of a sequence so far, including padding."""
        self._model = model
        slots = torch.arange(capacity, device=padding.device)[None]
        self._positions = (slots - padding[:, None]).clamp(min=0)  # [batch, capacity]
        self._document_ids = None
        if padding.any():
            self._document_ids = (slots >= padding[:, None]).long()  # [batch, capacity]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make the model attend through the cache, within the context."""
        original: dict[nn.Module, Callable[..., object] | None] = {}
        for module in self._model.modules():
            if isinstance(module, CausalMask):
                cached = self._cached_mask(module)
            elif isinstance(module, ScaledDotProductAttention) and module.causal:
                cached = self._cached_attention(module.forward)
            else:
                continue
            original[module] = vars(module).get("forward")
            module.forward = cached
        try:
            yield
        finally:
            for module, forward in original.items():
                del module.forward
                if forward is not None:  # it had been replaced before
                    module.forward = forward

    def in_pieces(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the logits of at most `PIECE` tokens at a time, see `forward`."""
        yield from map(self.forward, tokens.split(PIECE, dim=1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the model, with the cache attached, on the next tokens of each sequence.

        Args:
            tokens: `[batch, seq]` int64.

        Returns:
            Logits `[batch, seq, vocab]`.
        """
        begin, self.length = self.length, self.length + tokens.shape[1]
        return self._model(tokens, positions=self._positions[:, begin : self.length])

    def _cached_mask(self, causal: CausalMask) -> Callable[..., AttentionMask]:
        def forward(seq_len: int, document_ids: None, device: torch.device) -> AttentionMask:
            ids = self._document_ids
            ids = None if ids is None else ids[:, : self.length]
            if causal.is_plain(self.length, ids):
                return None
            # Never a block mask: compiling one for each length would take longer than it saves.
            queries = torch.arange(self.length - seq_len, self.length, device=device)
            batch = 1 if ids is None else len(ids)
            return dense_mask(causal.rule(ids, queries), batch, seq_len, self.length, device)

        return forward

    def _cached_attention(self, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        keys = values = torch.empty(0)

        def forward(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask = None
        ) -> torch.Tensor:
            nonlocal keys, values
            begin = self.length - k.shape[2]
            if begin == 0:
                capacity = self._positions.shape[1]
                keys, values = (x.new_empty(*x.shape[:2], capacity, x.shape[3]) for x in (k, v))
            keys[:, :, begin : self.length] = k
            values[:, :, begin : self.length] = v
            return attend(q, keys[:, :, : self.length], values[:, :, : self.length], mask)

        return forward


@torch.no_grad()
def _is_right(model: nn.Module, max_seq_len: int | None) -> bool:
    """Try the cache of a model.

    Some ways to mix tokens reach far, such as a memory of earlier chunks, so the text is long.
    """
    tokens = _trial_tokens(model, max_seq_len)
    try:
        whole = whole_tensor(model(tokens))
    except (AssertionError, IndexError, RuntimeError, ValueError):  # too many tokens
        tokens = tokens[:, :_LEAST_TRIED]
        whole = whole_tensor(model(tokens))
    prompt = tokens.shape[1] - min(_TRIED_ALONE, tokens.shape[1] // 2)
    cache = KVCache(model, tokens.shape[1], torch.zeros_like(tokens[:, 0]))
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
        rank0.warning(
            "%s gives different results with a key-value cache%s. Generating without one, which "
            "takes longer per token",
            type(model).__name__,
            reason,
        )
    return right


def _trial_tokens(model: nn.Module, max_seq_len: int | None) -> torch.Tensor:
    """Return random tokens, `[1, seq]`, as many as the model surely has positions for."""
    embedding = getattr(model, "tok_embeddings", None)
    if max_seq_len is None:
        max_seq_len = min(_sizes_of_tables(model, embedding), default=_TRIED)
    seq = max(min(_TRIED, max_seq_len), _LEAST_TRIED)
    # They depend on the model only, and do not advance the global random generator.
    generator = torch.Generator().manual_seed(0)
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    vocabulary = getattr(embedding, "num_embeddings", None) or min(sizes, default=2)
    device = next(model.parameters()).device
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
