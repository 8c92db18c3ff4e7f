"""Numbers as people read them."""

from __future__ import annotations

import pytest

from torchtitan.tools.text import duration, human, natural_order, three_digits


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7.00"),
        (999, "999"),
        (999.6, "1.00 K"),
        (12_345, "12.3 K"),
        (124_000_000, "124 M"),
        (999_960_000, "1.00 B"),
        (8_030_261_248, "8.03 B"),
        (405_853_388_800, "406 B"),
        (1.2e12, "1.20 T"),
    ],
)
def test_human(number: float, text: str) -> None:
    assert human(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (0.5, "0.500"),
        (9.999, "10.0"),
        (99.96, "100"),
        (1234.5, "1234"),
        (-0.25, "-0.250"),
        (1.4e-43, "1.40e-43"),
        (-2.5e9, "-2.50e9"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_three_digits(number: float, text: str) -> None:
    assert three_digits(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (65, "0:01:05"), (86_399, "23:59:59"), (183_900, "2d 03:05")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_in_names_are_in_order() -> None:
    names = ["x.10", "x.2²", "x.2"]  # a superscript is no number
    assert sorted(names, key=natural_order) == ["x.2", "x.2²", "x.10"]
