"""The compiler's choice of what to recompute counts attention with fewer heads of keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch.utils import flop_counter

from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac


def test_attention_is_counted_by_its_query_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    count = flop_counter.sdpa_flop_count

    def of_torch_2_11(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> int:
        if not q[1] == k[1] == v[1]:
            raise AssertionError("sdpa_flop_count: query/key/value shapes are incompatible")
        return count(q, k, v)

    monkeypatch.setattr(flop_counter, "sdpa_flop_count", of_torch_2_11)
    config = JobConfig()
    config.activation_checkpoint.mode = "memory_budget"
    with torch._functorch.config.patch(activation_memory_budget=1.0):
        for _ in range(2):  # as for two stages of a pipeline
            apply_ac(nn.Module(), config)
    q, k, v = (2, 8, 64, 16), (2, 2, 96, 16), (2, 2, 96, 32)
    whole = (2, 8, 96, 16), (2, 8, 96, 32)
    assert flop_counter.sdpa_flop_count(q, k, v) == count(q, *whole)
