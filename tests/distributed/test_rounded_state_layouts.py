"""Optimizer state in bfloat16 is the same on every layout, and from one to another.

The gradients are exact (see test_muon_layouts.py), so parameters and state are equal bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import on_ranks
from test_muon_layouts import Run, check_resume, full, layouts_of, train_side_by_side

from torchtitan.components import rounded_adam
from torchtitan.components.unsaved_state import check_optimizer_state


class Rounded(Run):
    optimizer = "AdamW"

    def build_optimizers(self) -> None:
        self.config.optimizer.name = self.optimizer
        self.config.optimizer.state_dtype = "bfloat16"
        # On a CPU, PyTorch's fused kernel computes the last elements of a tensor a bit differently.
        self.config.optimizer.implementation = "foreach"
        super().build_optimizers()

    def compared(self) -> dict[str, torch.Tensor]:
        """All parameters and moments, whole."""
        state = self.optimizers.state_dict()
        tensors: dict[str, Any] = dict(self.model.named_parameters())
        tensors |= {name: value for name, value in state.items() if name.startswith("state.")}
        return {name: full(tensor).detach().clone() for name, tensor in tensors.items()}


class RoundedMuon(Rounded):
    optimizer = "Muon"


def compare_with_one_process(folder: Path, layouts: list[str]) -> None:
    rounded_adam._MOST_ELEMENTS = 50  # so that other layouts cut parameters elsewhere
    for kind in (Rounded, RoundedMuon):
        for run in train_side_by_side(kind, layouts):
            check_optimizer_state(run.optimizers, [run.model])
            state = run.compared().items()
            kept = {v.dtype for name, v in state if ".exp_" in name or ".mom" in name}
            assert kept == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_layout_has_the_state_of_one_process(tmp_path: Path, ranks: int) -> None:
    on_ranks(ranks, compare_with_one_process, tmp_path, layouts_of(ranks))


def test_it_goes_to_another_layout(tmp_path: Path) -> None:
    check_resume(tmp_path, Rounded, "fsdp2", "tp2")
