"""From named datasets to batches of token ids."""

from .loader import DataLoader, build_dataloader, build_validation_dataloader
from .sources import register_dataset

__all__ = ["DataLoader", "build_dataloader", "build_validation_dataloader", "register_dataset"]
