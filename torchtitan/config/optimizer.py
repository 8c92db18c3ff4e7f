from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from .base import NonNegativeInKernels, PositiveInKernels, Range


@dataclass
class ParamRule:
    """One `[[optimizer.rules]]` table: overrides for parameters whose names match."""

    pattern: str = ""
    """Regular expression searched in the parameter's full name (`layers\\.0\\..*`)."""
    lr_scale: Annotated[float, Range(ge=0, le=1e6)] | None = None
    """Factor on the learning rate; 0 freezes. Unset: value of the earlier rules, or else 1."""
    weight_decay: Annotated[float, NonNegativeInKernels] | None = None
    """Weight decay. Unset: value of the earlier rules, or else the optimizer's."""


@dataclass
class Optimizer:
    """How weights are updated."""

    name: str = "AdamW"
    """AdamW, Adam, SGD or Muon (Muon updates the matrices of the layers and other blocks, each
    expert's too; AdamW updates everything else: embeddings, norms, biases, the output layer), or a
    name registered with `register_optimizer`."""
    lr: Annotated[float, PositiveInKernels] = 8e-4
    """Peak learning rate."""
    beta1: Annotated[float, Range(ge=0, lt=1)] = 0.9
    """Adam: decay of the first moment."""
    beta2: Annotated[float, Range(ge=0, lt=1)] = 0.95
    """Adam: decay of the second moment."""
    eps: Annotated[float, Range(gt=0)] = 1e-8
    """Adam: term added to the denominator."""
    weight_decay: Annotated[float, NonNegativeInKernels] = 0.1
    """Decoupled weight decay (L2 for SGD and Adam)."""
    no_decay: list[Literal["norm", "bias", "embedding"]] = field(default_factory=list)
    """Kinds of parameters that get no weight decay. `bias` includes the other vectors of layers,
    such as attention sinks."""
    momentum: Annotated[float, Range(ge=0, lt=1)] = 0.95
    """Momentum of SGD and Muon."""
    muon_lr: Annotated[float, PositiveInKernels] = 0.02
    """Peak learning rate of the matrices under Muon; `lr` applies to the AdamW part."""
    muon_weight_decay: Annotated[float, NonNegativeInKernels] = 0.01
    """Weight decay of the matrices under Muon; `weight_decay` applies to the AdamW part. Each step
    shrinks weights by learning rate x decay, and `muon_lr` is many times `lr`."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """Kernel of Adam, AdamW and SGD (SGD uses foreach for `fused`)."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of Adam's moments and Muon's momentum between steps. `bfloat16` saves 4 bytes per
    parameter (Muon: 2), and needs betas and momentum of at most 0.99, since it rounds smaller
    changes to nothing."""
    rules: list[ParamRule] = field(default_factory=list)
    """Overrides by parameter name; for each key, the last matching rule that sets it wins (TOML
    only: `[[optimizer.rules]]`)."""
