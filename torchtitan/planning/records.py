"""What a trace holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from .collectives import Collective
from .memory import Memory
from .operations import Operation


@dataclass
class PassTrace:
    """What a forward or backward pass of one stage, or the optimizer step, does."""

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)


@dataclass
class StageTrace:
    """One stage of this rank. Bytes of this rank."""

    parameters: float = 0
    """Buffers of the model included."""
    gradients: float = 0
    optimizer_state: float = 0
    activations: float = 0
    """What a forward pass keeps for its backward pass, the output included, the input not."""
    hidden_in: float = 0
    """What comes from the stage before."""
    hidden_out: float = 0
    """What goes to the next stage."""
    moments: list[Memory] = field(default_factory=list)
    """The fullest moment of each part of a step, without parameters and optimizer state: of the
    forward pass before, in and after the last layer, of the backward pass before the last layer
    and in each layer. In a
    pipeline of one micro-batch and of the reduction of gradients, without activations and buffers,
    which the schedule decides."""
    forward: PassTrace = field(default_factory=PassTrace)
    """The forward pass of one micro-batch; `backward` likewise."""
    backward: PassTrace = field(default_factory=PassTrace)
    start: PassTrace = field(default_factory=PassTrace)
    """What else the first forward pass of a step does: gather parameters, in a pipeline."""
    finish: PassTrace = field(default_factory=PassTrace)
    """What else the last backward pass of a step does: reduce gradients that were postponed."""

    def keep(self, activations: float) -> None:
        """Of the activations only so many bytes, at each moment in proportion."""
        share = min(1.0, activations / max(self.activations, 1))
        self.activations *= share
        self.moments = [
            replace(moment, activations=share * moment.activations) for moment in self.moments
        ]


@dataclass
class StepTrace:
    """What one rank does in an optimizer step, in a steady state."""

    parameters: float
    """Elements of all stages of this rank that this rank holds."""
    stages: list[StageTrace] = field(default_factory=list)
    optimizer: PassTrace = field(default_factory=PassTrace)
    optimizer_temporary: float = 0
    """Bytes at the peak of the optimizer step, above parameters, gradients and its state."""

    @property
    def collectives(self) -> Counter[Collective]:
        """Those of a whole step with one micro-batch."""
        total = Counter(self.optimizer.collectives)
        for stage in self.stages:
            for part in (stage.start, stage.forward, stage.backward, stage.finish):
                total.update(part.collectives)
        return total
