"""Experts that are balanced within each sequence train in every layout like in one process.

See test_layouts.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import sequence_balance
from equality import assert_equal_runs
from harness import read_lines, short_and_long
from test_layouts import CP2, DOCUMENTS, FULL_AC, TP2, WHOLE_SEQUENCE, train_in

# The rate is that of test_expert_layouts.py.
SHARED = (*sequence_balance.OPTIONS, "--optimizer.lr=3e-4", DOCUMENTS)
EP2 = "--parallelism.expert_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")

LAYOUTS = {"tp2xcp2": (4, 8, TP2, CP2)}
LONG_LAYOUTS = {
    "accumulation": (1, 2),
    "fsdp2": (2, 4),
    "tp2": (2, 8, TP2),
    "tp2_whole_sequence": (2, 8, TP2, WHOLE_SEQUENCE),
    "ep2xcp2_full_ac": (2, 8, EP2, CP2, FULL_AC),
    "pp2xtp2": (4, 8, PP2, TP2),
    "ep2xtp2_compile": (4, 4, EP2, TP2, *COMPILE),
    "cp2_full_ac_compile": (2, 8, CP2, FULL_AC, *COMPILE),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("sequence_balance"), (1, 8), *SHARED)


def losses(folder: Path) -> list[float]:
    return [line["router_aux_loss"] for line in read_lines(folder / "metrics.jsonl")[1:]]


def check(folder: Path, layout: tuple, one_process: Path) -> None:
    trained = train_in(folder, layout, *SHARED)
    assert_equal_runs(trained, one_process)
    for found, expected in zip(losses(trained), losses(one_process), strict=True):
        assert math.isclose(found, expected, rel_tol=1e-5), (found, expected)


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_layout_trains_like_one_process(layout, one_process, tmp_path: Path) -> None:
    check(tmp_path, layout, one_process)
