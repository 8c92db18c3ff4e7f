from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from .base import NonNegative, Positive


@dataclass
class Loss:
    """The training objective."""

    name: Literal["cross_entropy", "chunked_cross_entropy"] = "cross_entropy"
    """`chunked_cross_entropy` fuses the output layer with the loss and never holds all logits."""
    chunk_size: Annotated[int, Positive] = 2048
    """Tokens whose logits the chunked loss holds at once. Smaller chunks take less memory, but each
    chunk reads and writes the gradient of the output layer once."""
    z_loss_weight: Annotated[float, NonNegative] = 0.0
    """Weight of the z-loss, the squared log-partition (PaLM, arXiv:2204.02311). The logged loss
    includes it; that of a validation does not."""
