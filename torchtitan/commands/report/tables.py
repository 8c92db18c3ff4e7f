"""Builds the tables of a report: runs, configs, environments, checkpoints."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from torchtitan.components.run_folder import differing, flatten, shown
from torchtitan.errors import CheckpointError
from torchtitan.tools.html import Html, badge
from torchtitan.tools.text import duration, human, human_bytes, three_digits

from .run import Run

RUN_HEADER = [
    "run",
    "state",
    "step",
    "loss",
    "validation",
    "tokens/s",
    "MFU",
    "peak memory",
    "time",
    "model",
    "layout",
]

CHECKPOINT_HEADER = ["run", "checkpoint", "holds", "saved at (UTC)", "size"]


def run_rows(runs: list[Run]) -> list[list[str]]:
    """Return a line for each run under `RUN_HEADER`.

    Throughput and MFU are medians. If a run was resumed, the time is the sum over its processes,
    and the memory that of the fullest process.
    """
    return [
        [
            run.name,
            _state(run),
            f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else ""),
            _shown(run.last("loss"), "{:.4f}".format),
            _shown(run.validation_loss, "{:.4f}".format),
            _shown(run.median("tokens_per_second"), human),
            _shown(run.median("mfu"), "{:.1%}".format),
            _shown(run.greatest("peak_memory_bytes"), lambda size: f"{size / 2**30:.2f} GiB"),
            _shown(run.seconds, duration),
            _model(run),
            _layout(run),
        ]
        for run in runs
    ]


def warnings(runs: list[Run]) -> list[str]:
    """Return warnings that a reader must not overlook."""
    found = []
    for run in runs:
        if not run.curves:
            found.append(f"{run.name} has not logged a step yet.")
        if run.skipped:
            found.append(
                f"{run.name}: the guard skipped the batches of {run.last('steps_skipped'):,.0f} "
                f"steps, the first by step {run.skipped[0]:,}."
            )
        for key, curve in run.curves.items():
            bad = [s for s, v in zip(curve.steps, curve.values, strict=True) if math.isnan(v)]
            if bad:
                found.append(
                    f"{run.name}: {key} is not finite at step {bad[0]:,}"
                    + (f" and {len(bad) - 1:,} more." if len(bad) > 1 else ".")
                )
    return found


def config_differences(runs: list[Run]) -> list[list[str]]:
    """Return the keys that differ between runs, with the value in each."""
    return _rows(differing([run.config for run in runs]))


def config_changes(runs: list[Run]) -> list[list[str]]:
    """Return the keys that differ from the default: the default, and the value in each run."""
    from torchtitan.config import JobConfig

    default = {k: v for k, v in flatten(asdict(JobConfig())).items() if v is not None}
    return _rows(differing([default, *(run.config for run in runs)]))


def _rows(values: dict[str, list[str]]) -> list[list[str]]:
    return [[key, *each] for key, each in values.items()]


def environment_rows(runs: list[Run]) -> list[list[str]]:
    """Return each fact, with its value in each run."""
    facts = dict.fromkeys(fact for run in runs for fact in run.environment)
    return [[fact, *(run.environment.get(fact, "") for run in runs)] for fact in facts]


def checkpoint_rows(runs: list[Run]) -> list[list[str]]:
    """Return a line for each checkpoint under `CHECKPOINT_HEADER`, the newest of a run first."""
    from torchtitan.components.checkpoint.manifest import Manifest

    rows = []
    for run in runs:
        for folder in reversed(run.checkpoints):
            try:
                manifest = Manifest.read(folder)
                holds = "weights" if manifest.model_only else "whole state"
                saved = manifest.saved_at[:19].replace("T", " ")
                size = human_bytes(manifest.nbytes)
            except CheckpointError:
                holds, saved, size = badge("damaged", "bad"), "", ""
            rows.append([run.name, folder.name, holds, saved, size])
    return rows


def _state(run: Run) -> str:
    if run.total_steps is not None and run.step >= run.total_steps:
        return badge("finished", "good")
    if run.written is None:
        return badge("unfinished")
    at = f"{run.written:%Y-%m-%d %H:%M}"
    return Html(f'{badge("unfinished")} <span class="soft">last step at {at}</span>')


def _layout(run: Run) -> str:
    """Format `4 processes: dp_shard 2, tp 2`, as far as the files show it."""
    from torchtitan.distributed.parallel_dims import CONFIG_KEYS

    degrees = {name: run.config.get(f"parallelism.{key}", 1) for name, key in CONFIG_KEYS.items()}
    processes = run.environment.get("processes")
    if processes == "1":
        return "1 process"
    parts = [
        f"{name} {degree}" if degree > 0 else f"{name} of the rest"
        for name, degree in degrees.items()
        if isinstance(degree, int) and degree != 1
    ]
    return _join(f"{processes} processes:" if processes else None, ", ".join(parts) or None)


def _shown(value: float | None, show: Any) -> str:
    if value is None:
        return ""
    return show(value) if math.isfinite(value) else three_digits(value)


def _model(run: Run) -> str:
    """Return `llama3 8B`, or `llama3 8B (n_layers = 8)` with changed args."""
    prefix = "model.args."
    args = {key: value for key, value in run.config.items() if key.startswith(prefix)}
    changed = ", ".join(f"{k.removeprefix(prefix)} = {shown(v)}" for k, v in args.items())
    names = run.config.get("model.name"), run.config.get("model.flavor")
    return _join(*names, f"({changed})" if changed else None)


def _join(*words: str | None) -> str:
    return " ".join(word for word in words if word)
