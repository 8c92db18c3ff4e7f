"""What the tests that all models share have to be told of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    published: Mapping[str, dict[str, Any]]
    """Flavor -> its `config.json`, as published."""
    refused: list[tuple[dict[str, Any], str]]
    """Changes of the first of `published` that make another architecture -> the error's pattern."""
    required: list[str]
    """Fields that the first of `published` must have."""
    variants: Mapping[str, Any]
    """Small args in which all choices of the architecture differ, to compare with those of
    `transformers`."""
    hf_model: Callable[[Any], PreTrainedModel]
    """The same model in `transformers`, from one of `variants`, with random weights."""
    published_sizes: Mapping[str, int] = field(default_factory=dict)
    """Flavor -> parameters of the published checkpoint."""
    uncounted_flops: Callable[[Any, int], int] = lambda args, seq_len: 0
    """FLOPs a token, at `(args, seq_len)`, of matrix products that are no matrices of weights or
    attention, and that `get_nparams_and_flops` so leaves out."""


def adding_up_experts(args: Any, n_layers: int) -> int:
    """FLOPs a token of adding up what its experts made of it, a product in `n_layers` layers."""
    return 6 * args.moe.top_k * args.dim * n_layers
