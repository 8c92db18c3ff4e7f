"""A set of the layers that attend, which the manifest of a checkpoint holds as text."""

from __future__ import annotations

from dataclasses import dataclass

from mutants import base

CAUGHT_BY = ("contract.args",)
SAYS = r"Args\.attending is frozenset\(\{0\}\), but is restored from a checkpoint as 'frozenset"


@dataclass
class Args(base.Args):
    attending: frozenset[int] = frozenset({0})


base.register(__name__, model_args=Args())
