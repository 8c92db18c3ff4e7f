"""Optimizer state in bfloat16 is the same on every layout, and from one to another.

The gradients are exact (see test_muon_layouts.py), so parameters and state are equal bit for bit.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness import on_ranks
from test_muon_layouts import LAYOUTS, Run, assert_equal, full

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

    def tensors(self) -> dict[str, torch.Tensor]:
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
        compare(kind, layouts)


def compare(kind: type[Rounded], layouts: list[str]) -> None:
    one = kind("one")
    runs = [kind(layout) for layout in layouts]
    for number, skip in enumerate([None, "2", None]):
        one.step(number, skip)
        for run in runs:
            run.step(number, skip)
            assert_equal(run.tensors(), one.tensors())
    for run in runs:
        check_optimizer_state(run.optimizers, [run.model])
    kept = {v.dtype for name, v in one.tensors().items() if ".exp_" in name or ".mom" in name}
    assert kept == {torch.bfloat16}


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_layout_has_the_state_of_one_process(tmp_path: Path, ranks: int) -> None:
    layouts = [name for name, degrees in LAYOUTS.items() if math.prod(degrees) == ranks]
    on_ranks(ranks, compare_with_one_process, tmp_path, layouts)


def save(folder: Path) -> None:
    run = Rounded("fsdp2")
    for number in range(2):
        run.step(number)
    dcp.save(run.state(), checkpoint_id=folder / "checkpoint")


def resume(folder: Path) -> None:
    run = Rounded("tp2")
    state = run.state()
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    run.optimizers.load_state_dict(state["optimizer"])
    one = Rounded("one")
    for number in range(4):
        one.step(number)
        if number >= 2:
            run.step(number)
    assert_equal(run.tensors(), one.tensors())


def test_it_goes_to_another_layout(tmp_path: Path) -> None:
    on_ranks(2, save, tmp_path)
    on_ranks(2, resume, tmp_path)
