"""What a pipeline stage may hand on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from torchtitan.authoring.verify.stages import _problem_with, _run


class HandsOn(nn.Module):
    def __init__(self, *more: Any) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: torch.Tensor, *received: Any) -> Any:
        return (x, *self.more) if self.more else x


def test_a_stage_hands_on_tensors_only() -> None:
    tokens, whole = torch.zeros(2, 4), HandsOn()
    assert not _problem_with([HandsOn(torch.ones(2)), HandsOn()], whole, tokens, {})
    problem = _problem_with([HandsOn(None), HandsOn()], whole, tokens, {})
    assert problem == "a stage passes on Tensor, NoneType, not a tensor or a tuple of tensors"


class HandsOnAList(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, 2 * x]


class TakesTwo(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_stages_may_hand_on_a_list() -> None:
    """PyTorch's pipelines take it as a tuple, but it was refused."""
    (out,) = _run([HandsOnAList(), TakesTwo()], torch.ones(2), {})
    assert out.tolist() == [3, 3]
