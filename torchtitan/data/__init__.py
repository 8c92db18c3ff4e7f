"""Turns named datasets into batches of token ids."""

from .build import build_dataloader, build_validation_dataloader
from .loader import DataLoader
from .sources import DATASETS, register_dataset

__all__ = [
    "DATASETS",
    "DataLoader",
    "build_dataloader",
    "build_validation_dataloader",
    "register_dataset",
]
