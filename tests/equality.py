"""Asserts that two runs computed the same: loss and gradient norm at each step, final weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from harness import read_lines

RELATIVE = 1e-4
"""Of losses, gradient norms and weights: what the order of sums may change in 20 steps in fp32."""
ABSOLUTE = 1e-4
"""Of weights, of which some are nearly 0."""

SAVE = ("--checkpoint.enable", "--checkpoint.interval=1000")
"""Options of a run whose final weights are compared."""


def assert_equal_runs(folder: Path, expected: Path) -> None:
    """The runs in two dump folders, both started with `SAVE`, are equal."""
    lines, reference = (read_lines(path / "metrics.jsonl") for path in (folder, expected))
    assert_equal_curves(lines, reference)
    assert_equal_weights(newest_weights(folder), newest_weights(expected))


def assert_equal_curves(
    lines: list[dict],
    expected: list[dict],
    *,
    loss_tolerance: float = RELATIVE,
    norm_tolerance: float = RELATIVE,
) -> None:
    """`lines` of a metrics.jsonl or validation.jsonl have the steps and numbers of `expected`.

    Args:
        loss_tolerance, norm_tolerance: relative, of losses and gradient norms.
    """
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, reference in zip(lines, expected, strict=True):
        for key in reference:
            kind = key.partition("/")[0]  # grad_norm/layers.0 too
            if kind not in ("loss", "grad_norm", "weight_norm"):
                continue
            tolerance = loss_tolerance if kind == "loss" else norm_tolerance
            close = math.isclose(line[key], reference[key], rel_tol=tolerance)
            assert close, (key, line, reference)


def assert_equal_weights(
    weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=RELATIVE, atol=ABSOLUTE, msg=lambda m, n=name: f"{n}: {m}"
        )


def newest_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The whole tensors of the model in the newest checkpoint of a dump folder."""
    checkpoints = (folder / "checkpoint").glob("step-*[0-9]")
    checkpoint = max(checkpoints, key=lambda path: int(path.name.removeprefix("step-")))
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state
