"""FLOPs of a model's weights, to count what converters and frozen weights change."""

from __future__ import annotations

import torch.nn as nn


def flops_of_weights(model: nn.Module) -> int:
    """Return the FLOPs per token of the products with all matrices, forward plus backward.

    6 for a trained weight; 4 for a frozen one, which gets no gradient; 2 for one before all trained
    weights, through which none flows back either. An embedding is a look-up.
    """
    total, flows_back = 0.0, False

    def visit(module: nn.Module, share: float) -> None:
        nonlocal total, flows_back
        share *= getattr(module, "token_share", 1.0)
        for name, param in module.named_parameters(recurse=False):
            flows_back |= param.requires_grad
            is_matrix = param.ndim > 1 and not name.endswith("bias")  # experts have 2-D biases
            if is_matrix and not isinstance(module, nn.Embedding):
                each = 6 if param.requires_grad else 4 if flows_back else 2
                total += each * share * param.numel()
        for child in module.children():
            visit(child, share)

    visit(model, 1.0)
    return round(total)
