"""What a rank sends and holds is what the formulas of benchmarks/parallel.py say, within 10%."""

import pytest

from benchmarks.parallel import (
    LAYOUTS,
    TOLERANCE,
    expected_bytes,
    expected_memory,
    measure,
    planned,
)

QUICK = ("FSDP 8", "TP 4", "FSDP 8 x EP 4")


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=str(layout), marks=[] if str(layout) in QUICK else pytest.mark.long)
        for layout in LAYOUTS
    ],
)
def test_a_layout_follows_its_formulas(layout):
    sent, memory = measure(layout)
    assert memory == pytest.approx(expected_memory(layout), rel=TOLERANCE)
    if layout.pp > 1:  # measured in a real run
        assert memory == pytest.approx(planned(layout).peak, rel=TOLERANCE)
    for key, formula in expected_bytes(layout).items():
        assert sent[key] == pytest.approx(formula, rel=TOLERANCE), key
