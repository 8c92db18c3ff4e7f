"""Multiply matrices in 8 bits: float8 and MXFP8 for linear layers and experts.

Weights stay in high precision, so checkpoints are the same as without quantization. The matrix
products are PyTorch's own scaled ones, which need no further package.
"""

from .converters import (
    Float8GroupedConverter,
    Float8LinearConverter,
    MXGroupedConverter,
    MXLinearConverter,
)

__all__ = [
    "Float8GroupedConverter",
    "Float8LinearConverter",
    "MXGroupedConverter",
    "MXLinearConverter",
]
