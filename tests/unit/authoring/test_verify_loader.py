"""What `contract.dataloader` tells of the samples of two data ranks."""

from __future__ import annotations

import torch

from torchtitan.authoring.verify.loss_and_loader import _note_on_shares

WHOLE = {
    "tokens": torch.arange(12).view(4, 3),
    "labels": torch.tensor([[0.0, float("nan")]] * 4),
    "times": torch.arange(4),
    "latents": torch.ones(4, 2, dtype=torch.bfloat16),
}


def part(rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in WHOLE.items()}


def test_samples_of_ranks_that_one_process_has_too_need_no_note() -> None:
    assert _note_on_shares(WHOLE, part([0, 2]), part([3, 1])) == ""
    longer = part([0, 1]) | {"tokens": torch.zeros(2, 5)}
    assert _note_on_shares(WHOLE, longer, part([2, 3])) == ""


def test_samples_that_depend_on_the_rank_are_told() -> None:
    other = part([2, 3]) | {"labels": torch.zeros(2, 2)}
    note = _note_on_shares(WHOLE, part([0, 1]), other)
    assert note.startswith(". Two data ranks get other samples than one process")
