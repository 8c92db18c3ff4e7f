"""From named datasets to batches of token ids."""

from .loader import build_dataloader

__all__ = ["build_dataloader"]
