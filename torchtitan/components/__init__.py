"""Reusable parts of a `TrainSpec`."""

from .data_loader import DataLoader
from .loss import Loss, build_loss
from .lr_scheduler import build_lr_scheduler
from .optimizer import OptimizersContainer, build_optimizer, register_optimizer
from .tokenizer import Tokenizer, build_tokenizer
from .validator import Validator

__all__ = [
    "DataLoader",
    "Loss",
    "OptimizersContainer",
    "Tokenizer",
    "Validator",
    "build_loss",
    "build_lr_scheduler",
    "build_optimizer",
    "build_tokenizer",
    "register_optimizer",
]
