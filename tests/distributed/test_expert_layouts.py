"""Experts in every layout train like in one process; see test_layouts.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import z_loss_qwen3
from equality import assert_equal_runs
from harness import read_lines, short_and_long
from test_layouts import train_in

# At test_layouts.py's rate, Adam makes rounding errors grow until, at step 15, a token whose second
# and third expert are nearly equal goes to the other one. That is one of 512 tokens, and changes
# the gradient's norm by 0.2%.
SHARED = (*z_loss_qwen3.OPTIONS, "--optimizer.lr=3e-4")

EP2 = "--parallelism.expert_parallel_degree=2"
EP4 = "--parallelism.expert_parallel_degree=4"
TP2 = "--parallelism.tensor_parallel_degree=2"
ETP2 = "--parallelism.expert_tensor_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"
REPLICATE2 = "--parallelism.data_parallel_replicate_degree=2"
WHOLE_SEQUENCE = "--parallelism.disable_sequence_parallel"
FULL_AC = "--activation_checkpoint.mode=full"
OP_AC = "--activation_checkpoint.mode=selective"
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")
ZBV = (
    "--parallelism.pipeline_parallel_degree=2",
    "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble",
)
BFLOAT16 = "--training.mixed_precision_param=bfloat16"
LAYOUTS = {
    "ep2xtp2xetp2": (4, 4, EP2, TP2, ETP2),
}
LONG_LAYOUTS = {
    "ep2_op_ac": (2, 4, EP2, OP_AC),
    "hsdp2_ep2": (4, 2, REPLICATE2, EP2),
    "tp2": (2, 8, TP2),
    "ep2xfsdp2": (4, 2, EP2),
    "accumulation": (1, 2),
    "fsdp2": (2, 4),
    "ep2": (2, 4, EP2),
    "ep2_accumulation": (2, 1, EP2),
    "ep4": (4, 2, EP4),
    "ep2_tp2_alone": (2, 8, EP2, TP2),
    "tp2xetp2": (2, 8, TP2, ETP2),
    "tp2_whole_sequence": (2, 8, TP2, WHOLE_SEQUENCE),
    "fsdp2xtp2": (4, 4, TP2),
    "ep2xtp2": (4, 4, EP2, TP2),
    "ep4xtp2": (4, 4, EP4, TP2),
    "ep2xcp2": (2, 8, EP2, CP2),
    "ep2xpp2": (4, 4, EP2, "--parallelism.pipeline_parallel_degree=2"),
    "ep2_full_ac": (2, 4, EP2, FULL_AC),
    "tp2xetp2_op_ac": (2, 8, TP2, ETP2, OP_AC),
    "ep2_compile": (2, 4, EP2, *COMPILE),
    "ep2_op_ac_compile": (2, 4, EP2, OP_AC, *COMPILE),
    "ep2_full_ac_compile": (2, 4, EP2, FULL_AC, *COMPILE),
    "tp2_op_ac_compile": (2, 8, TP2, OP_AC, *COMPILE),
    "zero_bubble_compile": (2, 8, *ZBV, *COMPILE),
    "zero_bubble_ep2_op_ac_compile": (4, 4, EP2, *ZBV, OP_AC, *COMPILE),
    "hsdp2xep2xtp2": (8, 2, REPLICATE2, EP2, TP2),
    "ep4xtp2xetp2": (8, 2, EP4, TP2, ETP2),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_in(tmp_path_factory.mktemp("experts"), (1, 8), *SHARED)


def check(folder: Path, layout: tuple, one_process: Path) -> None:
    trained = train_in(folder, layout, *SHARED)
    assert_equal_runs(trained, one_process)
    for line, expected in zip(metrics(trained), metrics(one_process), strict=True):
        for key in ("expert_imbalance", "expert_imbalance_max"):
            assert math.isclose(line[key], expected[key], rel_tol=1e-6), (key, line, expected)
        for key in ("router_aux_loss", "router_z_loss") if line["step"] > 1 else ():
            assert math.isclose(line[key], expected[key], rel_tol=1e-5), (key, line, expected)


def metrics(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_layout_trains_like_one_process(layout, one_process, tmp_path: Path) -> None:
    check(tmp_path, layout, one_process)


@pytest.mark.long
@pytest.mark.parametrize("layout", [(2, 4, EP2), (2, 8, TP2, ETP2)], ids=["ep2", "tp2xetp2"])
def test_bfloat16_stays_close(layout, one_process, tmp_path: Path) -> None:
    trained = train_in(tmp_path, layout, *SHARED, BFLOAT16)
    for line, expected in zip(metrics(trained), metrics(one_process), strict=True):
        assert math.isclose(line["loss"], expected["loss"], rel_tol=1e-3), (line, expected)


FORCED = ("--debug.moe_force_load_balance", "--training.seq_len=72", "--training.steps=3")
"""A rank has 18 tokens in a row, whose 36 or 54 turns end in the midst of the experts."""


@pytest.mark.parametrize(
    "layout",
    short_and_long(
        {"cp2xtp2": (4, 8, CP2, TP2)},
        {"accumulation": (1, 1), "cp2_ep2_compile": (2, 8, CP2, EP2, *COMPILE), "fsdp4": (4, 2)},
    ),
)
def test_a_forced_balance_is_the_same_in_every_layout(layout: tuple, tmp_path: Path) -> None:
    expected = train_in(tmp_path / "one", (1, 8), *SHARED, *FORCED)
    assert_equal_runs(train_in(tmp_path / "layout", layout, *SHARED, *FORCED), expected)
