"""Chooses the next token from logits: greedy, or drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchtitan.distributed.determinism import derive_seed
from torchtitan.errors import CheckpointError, ConfigError

NO_NUMBERS = (
    "the model's logits are NaN or infinite: either its weights are, or activations overflow with "
    "--dtype float16; try bfloat16 or float32"
)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The temperature is applied first, then top-k, then top-p."""

    temperature: float = 1.0
    """Logits are divided by it. 0 takes the most likely token (greedy)."""
    top_k: int | None = None
    """Only this many of the most likely tokens, and those as likely as the last of them."""
    top_p: float | None = None
    """Only the smallest set of most likely tokens with at least this probability (nucleus sampling,
    arXiv:1904.09751)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature = {self.temperature}: must be at least 0, and finite. 0 is greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(
                f"top_k = {self.top_k}: must be at least 1; leave it out to sample from all tokens"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            name = "top_k" if self.top_k is not None else "top_p"
            raise ConfigError(f"{name} has no effect at temperature = 0, which is greedy")

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability of each token, `[..., vocab]` float32, for such logits."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            smallest = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return probabilities
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the probability of all more likely tokens
        ordered = ordered.masked_fill(before >= self.top_p, 0)
        kept = torch.zeros_like(ordered).scatter(-1, tokens, ordered)
        return kept / kept.sum(-1, keepdim=True)


class Sampler:
    """Draws the next tokens of a batch.

    Each sequence has its own stream of random numbers, so that its text does not depend on the
    others in the batch.

    Args:
        streams: number of each sequence's stream.
    """

    def __init__(self, sampling: Sampling, streams: Sequence[int]) -> None:
        self._sampling = sampling
        self._generators = [
            torch.Generator().manual_seed(derive_seed(sampling.seed, "generate", stream))
            for stream in streams
        ]

    def next_tokens(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the next token of each sequence, `[batch]` int64, for logits `[batch, vocab]`.

        Raises:
            CheckpointError: a logit is NaN, or the largest one is infinite.
        """
        if not logits.amax(-1).isfinite().all():
            raise CheckpointError(NO_NUMBERS)
        if self._sampling.temperature == 0:
            return logits.argmax(-1)
        # Inverse transform sampling, with one random number per token. They are drawn on the CPU,
        # so they are the same for every device.
        draws = [torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators]
        ends = self._sampling.probabilities(logits).double().cumsum(-1)
        places = torch.stack(draws).to(ends.device) * ends[:, -1:]
        return torch.searchsorted(ends, places, right=True).squeeze(-1)
