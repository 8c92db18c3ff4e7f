"""The loss of rectified flow."""

from __future__ import annotations

import torch

from torchtitan.config import JobConfig


def build_loss(job_config: JobConfig) -> object:
    return velocity_loss


def velocity_loss(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed squared error of velocities `[batch, patches, channels]`, NaN left out."""
    errors = pred.float() - labels
    return torch.where(labels.isnan(), 0.0, errors).square().sum()
