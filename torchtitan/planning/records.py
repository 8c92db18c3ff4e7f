"""The contents of a trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from .collectives import Collective
from .memory import Memory
from .operations import Operation


@dataclass
class PassTrace:
    """Work of a forward or backward pass of one stage, or of the optimizer step."""

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)


@dataclass
class StageTrace:
    """Work of a rank with one stage in a step, in a steady state. Bytes are those on this rank."""

    parameters: float = 0
    """Includes buffers of the model."""
    gradients: float = 0
    optimizer_state: float = 0
    activations: float = 0
    """Kept by a forward pass for its backward pass, including the output, without the input."""
    kept_for_weights: float = 0
    """Kept between the two parts of a split backward pass; `inputs` and `weights` are these."""
    hidden_in: float = 0
    """Received from the stage before."""
    hidden_out: float = 0
    """Sent to the next stage."""
    shared_gradients: float = 0
    """Of weights that other stages have, too; see `StageCopies`."""
    moments: list[Memory] = field(default_factory=list)
    """The fullest moment of each part of a step, without parameters and optimizer state. Without a
    pipeline: of the forward pass before, in and after the last layer, and of the backward pass
    before the last layer and in each layer. In a pipeline: the temporary memory of a backward
    pass, as the schedule decides the rest; the next three likewise."""
    moments_first: list[Memory] = field(default_factory=list)
    """Of the first backward pass, which makes the gradients."""
    moments_inputs: list[Memory] = field(default_factory=list)
    moments_weights: list[Memory] = field(default_factory=list)
    between: Memory = field(default_factory=Memory)
    """In a pipeline, what passes leave in memory for the next ones, without activations."""
    reducing: Memory = field(default_factory=Memory)
    """Additional memory of the fullest moment of the reduction of gradients by FSDP."""
    forward: PassTrace = field(default_factory=PassTrace)
    """The forward pass of one micro-batch; the three below likewise."""
    backward: PassTrace = field(default_factory=PassTrace)
    inputs: PassTrace = field(default_factory=PassTrace)
    weights: PassTrace = field(default_factory=PassTrace)
    start: PassTrace = field(default_factory=PassTrace)
    """Additional work of a pass that gathers parameters, in a pipeline."""
    finish: PassTrace = field(default_factory=PassTrace)
    """Additional work of a step's last backward pass: reducing gradients that were postponed."""
    clipping: PassTrace = field(default_factory=PassTrace)
    """Of gradients, before the optimizer's step."""
    optimizer: PassTrace = field(default_factory=PassTrace)
    """The optimizer's step on this stage."""
    optimizer_temporary: float = 0
    """Bytes at the peak of the optimizer's step, above parameters, gradients and its state."""
    exchanged: float = 0
    """Matrices, or stacks of them, that ranks exchange in the optimizer's step. With any, it is not
    linear in the layers: each rank works on some of the matrices."""
    groups: dict[str, list[int]] = field(default_factory=dict)
    """Name -> ranks of each group that takes part in a collective."""

    def keep(self, activations: float) -> None:
        """Reduce the activations to this many bytes, at each moment in proportion."""
        share = min(1.0, activations / max(self.activations, 1))
        self.activations *= share
        self.moments = [
            replace(moment, activations=share * moment.activations) for moment in self.moments
        ]
