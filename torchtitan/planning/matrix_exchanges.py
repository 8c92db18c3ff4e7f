"""Counts the matrices that ranks exchange in an optimizer's step, or leaves the exchanges out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

from torchtitan.components.matrix_exchange import Cut, MatrixExchange


@contextmanager
def seeing_exchanged() -> Iterator[list[DTensor]]:
    """Yield the parameters whose matrices are exchanged within the context."""
    exchanged: list[DTensor] = []
    layout_of = MatrixExchange.layout

    def layout(exchange: MatrixExchange, matrix: DTensor) -> list[Cut]:
        exchanged.append(matrix)
        return layout_of(exchange, matrix)

    with patch.object(MatrixExchange, "layout", layout):
        yield exchanged


@contextmanager
def leaving_out_exchanges() -> Iterator[None]:
    """Make `MatrixExchange` return what it is given, within the context."""

    def apply(
        exchange: MatrixExchange,
        function: Callable[[torch.Tensor], torch.Tensor],
        layouts: Sequence[list[Cut]],
        local: Sequence[torch.Tensor],
    ) -> list[torch.Tensor]:
        return list(local)

    with patch.object(MatrixExchange, "apply", apply):
        yield
