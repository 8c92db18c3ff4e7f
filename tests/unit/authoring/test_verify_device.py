"""`contract.device` tells tensors of the weights' device from those made on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pack_padded_sequence

from torchtitan.authoring.verify.check import CheckFailedError
from torchtitan.authoring.verify.device import _TwoDevices

X = torch.ones(3, 2)
"""Stands for a tensor on a GPU."""


@pytest.mark.parametrize(
    "run",
    [
        lambda: X * torch.tensor(2.0),
        lambda: X * torch.arange(2, device=X.device),
        lambda: X * torch.arange(2).to(X.device),
        lambda: X * torch.arange(2).type_as(X),
        lambda: X * X.new_zeros(2),
        lambda: X[torch.tensor([0, 1])] + X[:2],
        lambda: X.clone().copy_(torch.zeros(3, 2)) + X,
        lambda: torch.arange(6).view_as(X) + torch.ones(3, 2),
        lambda: X.tensor_split(torch.tensor([1]))[0] + X[:1],
        lambda: X * sum(torch.arange(3).tolist()),
        lambda: (
            F.ctc_loss(*(X[:, None], X[:2, 0].long()), torch.tensor([3]), torch.tensor([2])) + X
        ),
        lambda: pack_padded_sequence(X[None], torch.tensor([2]), batch_first=True).data + X[:2],
    ],
)
def test_what_a_gpu_allows_passes(run: Callable[[], torch.Tensor]) -> None:
    with _TwoDevices():
        run()


@pytest.mark.parametrize(
    ("run", "where"),
    [
        (lambda: X * torch.arange(2), r"torch\.Tensor\.mul"),
        (lambda: torch.cat([X, torch.zeros(3, 2)]), r"torch\.cat"),
        (lambda: X.masked_fill(torch.ones(3, 2).tril() > 0, 0.0), r"torch\.Tensor\.masked_fill"),
        (lambda: F.linear(torch.ones(1, 2), X), "linear"),
        (lambda: torch.ones(3)[X[:, 0].long()], "__getitem__"),
        (lambda: X + torch.zeros_like(torch.arange(2) * 2.0), r"torch\.Tensor\.add"),
    ],
)
def test_what_a_gpu_refuses_is_refused(run: Callable[[], torch.Tensor], where: str) -> None:
    with _TwoDevices(), pytest.raises(CheckFailedError, match=where) as caught:
        run()
    assert "test_verify_device.py:" in caught.value.problem
