"""Computes the loss of a model on the documents of a dataset, each token predicted once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from torchtitan.components import Loss, build_loss
from torchtitan.components.loss import IGNORE_INDEX, count_of
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.data.encode import Encoder
from torchtitan.data.sources import Source, documents_of
from torchtitan.errors import CheckpointError, DataError
from torchtitan.generation import cache
from torchtitan.generation.load import LoadedModel
from torchtitan.generation.sampling import NO_NUMBERS
from torchtitan.generation.text import first_token
from torchtitan.tools.logging import rank0

_SECONDS_OF_A_LINE = 10.0
"""Interval of an evaluation's progress messages."""


@dataclass
class Perplexity:
    """The result of `evaluate`; the loss is in nats, per token."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    """Bits to predict all tokens, including the ends of documents, over the bytes of the text. None
    if the text has no whole character, see `max_tokens`."""
    tokens: int
    """Predicted tokens: those of the documents, and the eos that ends each."""
    bytes: int
    """Size of the documents' text in UTF-8."""
    documents: int
    """The last one may have been read in part, see `max_tokens`."""


class TokenStream:
    """The documents of a dataset in order, each ended by eos, as one stream of tokens.

    The stream is cut into sequences, the last of which is shorter.

    Args:
        max_tokens: predict at most this many, the last document only in part; None: all.
        add_bos: bos begins each document. It is not predicted, and stored as its complement.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        max_tokens: int | None,
        add_bos: bool = False,
    ) -> None:
        self._source, self._tokenizer, self._max_tokens = source, tokenizer, max_tokens
        self._add_bos = add_bos
        self._encode = Encoder(tokenizer, add_bos=add_bos)
        self.tokens = self.bytes = self.documents = 0
        """Counts of the documents read so far."""

    def sequences(self, seq_len: int) -> Iterator[list[int]]:
        """Yield sequences of at most `seq_len + 1` tokens.

        Each begins with the last token of the one before, so that every token of the documents has
        a predecessor.

        Raises:
            DataError: the dataset holds no text, or something other than text.
        """
        pending = [] if self._add_bos else [first_token(self._tokenizer)]
        text: Any
        for text in documents_of(self._source):
            if isinstance(text, list | np.ndarray):
                kind = "a conversation" if isinstance(text, list) else "an array of token ids"
                raise DataError(f"a document of the dataset is {kind}, but eval measures texts")
            tokens = self._encode(text).tolist()
            if not tokens:
                continue
            if self._add_bos:
                tokens[0] = ~tokens[0]
            left = None if self._max_tokens is None else self._max_tokens - self.tokens
            if left is not None and left < len(tokens) - self._add_bos:
                tokens = tokens[: left + self._add_bos]
                text = self._text_of(tokens, text)
            self.tokens += len(tokens) - self._add_bos
            self.bytes += len(text.encode())
            self.documents += 1
            pending += tokens
            whole = (len(pending) - 1) // seq_len * seq_len
            for start in range(0, whole, seq_len):
                yield pending[start : start + seq_len + 1]
            pending = pending[whole:]
            if self._max_tokens is not None and self.tokens >= self._max_tokens:
                break
        if len(pending) > 1:
            yield pending
        if not self.tokens:
            raise DataError("empty: it has no document with text")

    def _text_of(self, tokens: list[int], text: str) -> str:
        """Return the part of a text that its first tokens cover, without a cut character."""
        part = self._tokenizer.decode([token for token in tokens if token >= 0]).rstrip("\ufffd")
        return part if len(part) < len(text) else text


@torch.no_grad()
def evaluate(
    loaded: LoadedModel,
    source: Source,
    seq_len: int,
    batch_size: int,
    max_tokens: int | None = None,
    add_bos: bool = False,
) -> Perplexity:
    """Evaluate a model on all documents of a dataset, or its first `max_tokens` tokens.

    The data ranks take turns with the batches. All read all documents, so the result does not
    depend on the number of ranks.

    Args:
        seq_len: tokens in a sequence; the model sees none from before it.
        add_bos: bos begins each document.
    """
    dims = loaded.parallel_dims
    rank = dims.world_mesh["dp"].get_local_rank() if dims.world_size > 1 else 0
    device = next(loaded.model.parameters()).device
    spec, config = loaded.source.spec, loaded.source.job_config
    loss_fn = spec.build_loss_fn(config)
    # A loss of the user's may relate tokens of different pieces.
    in_pieces = seq_len > cache.PIECE and spec.build_loss_fn is build_loss
    in_pieces = in_pieces and cache.can_cache(loaded.model, loaded.source.max_seq_len)
    stream = TokenStream(source, loaded.source.tokenizer, max_tokens, add_bos)
    count = count_of(loss_fn)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, and labels that count
    batches = _batched(stream.sequences(seq_len), batch_size)
    told = time.monotonic()
    for turn in _batched(batches, dims.dp):
        # Ranks without a batch of their own run one too, since sharded weights are gathered by all.
        batch = turn[rank] if rank < len(turn) else turn[0]
        tokens, labels = (x.to(device) for x in pad_batch(batch))
        if in_pieces:
            longest = max(len(sequence) for each in turn for sequence in each) - 1
            loss_of_batch = _loss_in_pieces(loaded.model, loss_fn, tokens, labels, longest)
        else:
            loss_of_batch = loss_fn(loaded.model(tokens), labels)
        if rank < len(turn):
            sums += torch.stack([loss_of_batch.double(), count(labels).double()])
        if time.monotonic() - told >= _SECONDS_OF_A_LINE:
            told = time.monotonic()
            total, seen = sums.tolist()
            rank0.info(
                "%s tokens so far, loss %.4f", f"{int(seen) * dims.dp:,}", total / max(seen, 1)
            )
    if dims.dp > 1:
        dist.all_reduce(sums, group=dims.world_mesh["dp"].get_group())
    total, counted = sums.tolist()
    if not math.isfinite(total):
        raise CheckpointError(NO_NUMBERS)
    loss = total / max(counted, 1)
    return Perplexity(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / stream.bytes if stream.bytes else None,
        tokens=stream.tokens,
        bytes=stream.bytes,
        documents=stream.documents,
    )


def _loss_in_pieces(
    model: nn.Module, loss_fn: Loss, tokens: torch.Tensor, labels: torch.Tensor, length: int
) -> torch.Tensor:
    """Return `loss_fn(model(tokens), labels)`, without holding the logits of all tokens.

    Args:
        length: tokens of the longest batch of all data ranks: they make as many passes together.
    """
    padding = (0, length - tokens.shape[1])
    tokens, labels = F.pad(tokens, padding), F.pad(labels, padding, value=IGNORE_INDEX)
    keys = cache.KVCache(model, length, torch.zeros_like(tokens[:, 0]))
    with keys.attached():
        pairs = zip(keys.in_pieces(tokens), labels.split(cache.PIECE, dim=1), strict=True)
        return torch.stack([loss_fn(logits, part) for logits, part in pairs]).sum()


def pad_batch(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and labels `[batch, longest - 1]` int64 of sequences.

    Padding at the end of a sequence predicts nothing, and no token before sees it. A complement is
    not predicted.
    """
    tokens = pad_sequence([torch.tensor(s[:-1]) for s in sequences], batch_first=True)
    labels = pad_sequence([torch.tensor(s[1:]) for s in sequences], True, padding_value=-1)
    return torch.where(tokens < 0, ~tokens, tokens), labels.where(labels >= 0, IGNORE_INDEX)


def _batched(items: Iterator, size: int) -> Iterator[list]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
