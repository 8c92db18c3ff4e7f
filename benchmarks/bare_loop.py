"""The loop that the trainer is measured against: PyTorch alone, with nothing but training.

It computes the same as the trainer: gradient accumulation, clipping, fused AdamW. It saves no
state, logs nothing, checks nothing, waits for no data and supports one device.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

MicroBatch = tuple[torch.Tensor, torch.Tensor]
"""Tokens and labels, each `[batch, seq]` int64."""


class BareLoop:
    """Trains `model`, which is initialised and on its device."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_norm: float,
        dtype: torch.dtype,
        compile_model: bool,
    ) -> None:
        self.model = torch.compile(model) if compile_model else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        self.max_norm = max_norm
        self.device = next(model.parameters()).device
        self.autocast = nullcontext()
        if dtype != torch.float32:
            self.autocast = torch.autocast(self.device.type, dtype=dtype)

    def step(self, micro_batches: Iterable[MicroBatch]) -> torch.Tensor:
        """Run one optimizer step over equal micro-batches. Return the mean loss, on the device."""
        micro_batches = list(micro_batches)
        total = torch.zeros((), device=self.device)
        for tokens, labels in micro_batches:
            tokens = tokens.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            with self.autocast:
                logits = self.model(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            loss = loss / len(micro_batches)
            del logits  # its memory is needed in the backward pass
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
