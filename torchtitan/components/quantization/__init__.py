"""Matrix products in 8 bits: float8 and MXFP8 for linear layers and for experts.

Weights stay in high precision, so checkpoints are those of a run without. The numbers are those of
PyTorch's own scaled products, which need no further package.
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
