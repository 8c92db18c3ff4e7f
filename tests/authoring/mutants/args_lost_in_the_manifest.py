"""A set of the layers that attend, which the manifest of a checkpoint holds as text."""

from __future__ import annotations

from dataclasses import dataclass

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("contract.args",)
SAYS = r"Args\.attending is frozenset\(\{0\}\), but is restored from a checkpoint as 'frozenset"


@dataclass
class Args(base.Args):
    attending: frozenset[int] = frozenset({0})


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, model_args=Args())


register_train_spec("args_lost_in_the_manifest", get_train_spec)
