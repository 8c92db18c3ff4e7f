from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Compile:
    """`torch.compile`."""

    enable: bool = False
    """Compile `components`."""
    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model", "loss"])
    """Components to compile."""
    scope: Literal["block", "model"] = "block"
    """Compile each transformer block (fast start, one graph reused) or the whole model."""
    backend: str = "inductor"
    """Compiler backend (`inductor`, `aot_eager`, `eager`, ...)."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    """Inductor mode. `max-autotune-no-cudagraphs` benchmarks kernels during compilation.
    `reduce-overhead` replays the model's kernels as CUDA graphs, for one GPU whose kernels are too
    short for the host to keep up; `max-autotune` does both."""

    def compiles(self, component: Literal["model", "loss"]) -> bool:
        """Return whether compilation is enabled for this component."""
        return self.enable and component in self.components
