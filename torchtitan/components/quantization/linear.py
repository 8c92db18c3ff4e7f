"""A linear layer that multiplies in 8 bits, with or without tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .products import quantized_linear
from .scaling import Grouping


class QuantizedLinear(nn.Linear):
    """`nn.Linear` that multiplies in 8 bits, see `products.py`.

    Args:
        linear: layer whose parameters this one takes over.
        grouping, quantize_weight_grad, emulate: as in `quantized_linear`.
        float8_gather: whether FSDP gathers the weight in float8, see `float8_gather.py`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        grouping: Grouping,
        quantize_weight_grad: bool,
        emulate: bool,
        float8_gather: bool = False,
    ) -> None:
        super().__init__(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.grouping: Grouping = grouping
        self.quantize_weight_grad = quantize_weight_grad
        self.emulate = emulate
        self.float8_gather = float8_gather
        self.weight_scale: torch.Tensor | None = None  # of a weight that was gathered in float8

    def forward(self, x: Any) -> torch.Tensor:
        """Map `[..., in]` to `[..., out]`, both DTensors if the weight is one."""
        out: torch.Tensor
        if isinstance(self.weight, DTensor):
            out = self._on_parts(x, self.weight)
        else:
            out = self._product(x, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        options = self.grouping, self.quantize_weight_grad, self.emulate
        return quantized_linear(x, weight, *options, self.weight_scale)

    def _on_parts(self, x: DTensor, weight: DTensor) -> DTensor:
        """Multiply this rank's parts under tensor parallelism.

        Each rank scales its own part. Since scales are powers of two, they round like those of the
        whole tensor (see `scaling.py`), so ranks need not exchange their largest numbers.
        """
        mesh = weight.device_mesh
        features = x.ndim - 1
        (place,) = weight.placements
        x_grad: list[Placement] = list(x.placements)
        weight_grad: list[Placement] = [place]
        out: list[Placement] = list(x.placements)
        if place == Shard(0):  # each rank computes some output features, from all input features
            # A replicated input is left alone, so that the partial gradients of several layers are
            # added before the sum over ranks; `redistribute` would sum each of them over ranks.
            if not x.placements[0].is_replicate():
                x = x.redistribute(placements=[Replicate()])
            x_grad, out = [Partial()], [Shard(features)]
        elif place == Shard(1):  # each rank computes a partial sum, from some input features
            x = x.redistribute(placements=[Shard(features)])
            x_grad, out = [Shard(features)], [Partial()]
        elif not x.placements[0].is_replicate():  # each rank has some of the tokens
            weight_grad = [Partial()]
        local = self._product(
            x.to_local(grad_placements=x_grad), weight.to_local(grad_placements=weight_grad)
        )
        return DTensor.from_local(local, mesh, out, run_check=False)
