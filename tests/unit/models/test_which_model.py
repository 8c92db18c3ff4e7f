"""Args of a model, back from the manifest of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union

import pytest

from torchtitan.models.which_model import dataclass_of
from torchtitan.protocols.changed_args import plain_args


@dataclass(frozen=True)
class Window:
    size: int = 8


@dataclass(frozen=True)
class Layer:
    kind: Literal["attention", "recurrence"] = "attention"
    window: Window | None = None


@dataclass(frozen=True)
class Mixer:
    width: int = 4


@dataclass(frozen=True)
class GatedMixer:
    """Has all fields of `Mixer`."""

    width: int = 4
    gate: bool = True


@dataclass
class Args:
    kinds: tuple[str, ...] = ("recurrence", "attention")
    sizes: tuple[int, float] = (1, 0.5)
    pairs: list[tuple[int, int]] = field(default_factory=lambda: [(1, 2), (3, 4)])
    layers: list[Layer] = field(default_factory=lambda: [Layer(), Layer("recurrence", Window(2))])
    frozen_layers: tuple[Layer, ...] = (Layer(window=Window(3)),)
    by_number: dict[int, Layer] = field(default_factory=lambda: {3: Layer("recurrence")})
    by_name: Mapping[str, list[Layer]] = field(default_factory=lambda: {"a": [Layer()]})
    some: Sequence[Layer] = field(default_factory=lambda: [Layer("recurrence")])
    maybe: tuple[Layer, ...] | None = (Layer(),)
    old: Optional[tuple[Layer, ...]] = None  # noqa: UP045
    either: Union[Layer, GatedMixer, Mixer] = Mixer(2)  # noqa: UP007
    number: int | float | str = 3
    bare: tuple = (1, "a")
    plain: Any = None
    total: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.total = len(self.layers)


def test_lists_tuples_and_dicts_come_back_as_their_types_say() -> None:
    args = Args()
    back = dataclass_of(Args, plain_args(args))
    assert back == args
    assert type(back.layers[1].window) is Window and type(back.by_number[3]) is Layer


@pytest.mark.parametrize("change", [{"other": 1}, {"layers": [{"other": 1}]}, {"either": {"x": 1}}])
def test_an_unknown_field_is_an_error_at_any_depth(change: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument '(other|x)'"):
        dataclass_of(Args, plain_args(Args()) | change)


def test_a_tuple_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        dataclass_of(Args, plain_args(Args()) | {"sizes": [1, 2, 3]})


def test_what_a_manifest_of_before_has_is_left_as_it_is() -> None:
    assert dataclass_of(Args, {"kinds": None, "number": [1]}).number == [1]
