"""From named datasets to batches of token ids."""

from .loader import DataLoader, build_dataloader, build_validation_dataloader
from .sources import DATASETS, register_dataset

__all__ = [
    "DATASETS",
    "DataLoader",
    "build_dataloader",
    "build_validation_dataloader",
    "register_dataset",
]
