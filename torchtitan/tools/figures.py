"""The common part of the pictures that commands draw with matplotlib (optional)."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which colour-blind people can distinguish."""
DASHES = ((0, (4, 3)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (2, 4)), (0, (8, 3)))

MISSING = "matplotlib is not installed: pip install 'torchtitan[plots]'"


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def png(figure: Figure) -> bytes:
    """Return the picture as PNG bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def grid(axes: Axes) -> None:
    """Draw pale lines behind the curves."""
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["right"].set_visible(False)
