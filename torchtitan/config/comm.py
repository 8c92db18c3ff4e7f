from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .base import Positive


@dataclass
class Comm:
    """Process groups."""

    timeout_seconds: Annotated[int, Positive] = 600
    """A collective that waits longer than this ends the run."""
