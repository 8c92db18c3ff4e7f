"""Multi-token prediction in every layout trains like in one process; see test_layouts.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from equality import assert_equal_runs
from harness import read_lines, short_and_long
from test_layouts import CHUNKED, COMPILE, CP2, DOCUMENTS, FULL_AC, REPLICATE2, TP2, train_in

# The rate is that of test_expert_layouts.py.
SHARED = ("--model.name=deepseek_v3", "--model.flavor=debugmodel_mtp", "--optimizer.lr=3e-4")
PP2 = "--parallelism.pipeline_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
ZBV = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"

# Two micro-batches: each costs as much time as a larger one.
MICRO4 = "--parallelism.pipeline_parallel_microbatch_size=4"

LAYOUTS = {"pp2": (2, 8, PP2, MICRO4), "cp2": (2, 8, CP2, DOCUMENTS)}
LONG_LAYOUTS = {
    "pp2xtp2": (4, 8, PP2, TP2, MICRO4),
    "accumulation": (1, 2),
    "fsdp2": (2, 4),
    "hsdp2x2_ep2": (4, 2, REPLICATE2, EP2),
    "tp2_chunked_loss": (2, 8, TP2, CHUNKED),
    "fsdp2xtp2_full_ac_compile": (4, 4, TP2, FULL_AC, *COMPILE),
    "pp2xfsdp2": (4, 4, PP2),
    "pp2xcp2_chunked_loss": (4, 8, PP2, CP2, CHUNKED),
    "zero_bubble": (2, 8, PP2, ZBV),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("multi_token"), (1, 8), *SHARED)


@pytest.fixture(scope="module")
def one_process_of_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("multi_token"), (1, 8, DOCUMENTS), *SHARED)


def check(folder: Path, layout: tuple, one_process: Path) -> None:
    trained = train_in(folder, layout, *SHARED)
    assert_equal_runs(trained, one_process)
    lines, expected = (read_lines(path / "metrics.jsonl") for path in (trained, one_process))
    for line, other in zip(lines, expected, strict=True):
        assert math.isclose(line["mtp_loss"], other["mtp_loss"], rel_tol=1e-5), (line, other)


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_layout_trains_like_one_process(
    layout, one_process, one_process_of_documents, tmp_path: Path
) -> None:
    check(tmp_path, layout, one_process_of_documents if DOCUMENTS in layout else one_process)


def test_further_tokens_are_learned(one_process) -> None:
    lines = read_lines(one_process / "metrics.jsonl")
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"] - 0.5
