"""The contract of a model: what the guide's steps 1, 2 and 4 ask of it."""

from __future__ import annotations

import torch
import torch.nn as nn

from .check import Check, CheckFailedError
from .subject import Subject


def layers_are_a_dict(subject: Subject) -> str:
    """The layers can be deleted one by one without renaming others."""
    with torch.device("meta"):
        model = subject.spec.model_cls(subject.args)
    layers = getattr(model, "layers", None)
    if isinstance(layers, nn.ModuleDict):
        return f"{len(layers)} layers"
    raise CheckFailedError(
        f"{type(model).__name__}.layers is {type(layers).__name__}, not nn.ModuleDict",
        "model.py: self.layers = nn.ModuleDict({str(i): Block(args) for i in ...}). A list would "
        "rename the layers that are left when a pipeline stage deletes some.",
    )


CHECKS = (
    Check(
        "contract.layers",
        "the layers are an nn.ModuleDict keyed by their number",
        layers_are_a_dict,
    ),
)
