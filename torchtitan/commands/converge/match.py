"""Determines which configs may be compared: those with the same computation, seed and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torchtitan.components.run_folder import differing, flatten, shown
from torchtitan.errors import ConfigError, did_you_mean
from torchtitan.tools.logging import logger

from .runs import Run

HOW = (
    "job",
    "parallelism",
    "activation_checkpoint",
    "compile",
    "checkpoint",
    "metrics",
    "profiling",
    "validation",
    "comm",
    "model.attention",
    "optimizer.implementation",
    "training.local_batch_size",  # only the global one matters
    "training.mixed_precision_param",
    "training.mixed_precision_reduce",
    "training.enable_cpu_offload",
    "training.gc_freq",
    "training.replay_freq",
    "data.workers",
    "data.verify_hashes",
    "loss.name",
    "loss.chunk_size",
    "debug.deterministic",
)
"""Sections and keys that define how a run computes, not what; they may differ. All other keys, and
every key that a user's module adds, must be the same unless the user allows it."""

WHAT = ("checkpoint.initial_load_path", "checkpoint.initial_load_model_only")
"""Keys of those sections that must be the same nevertheless."""

_BATCH = "training.global_batch_size"


def check_match(control: Run, tests: Sequence[Run], allowed: Sequence[str]) -> None:
    """Refuse a test that differs from the control in more than how it computes.

    Args:
        allowed: keys (`optimizer.lr`) or sections (`optimizer`) that may differ as well.

    Raises:
        ConfigError: names each key that differs and both values; or an allowed key is unknown.
    """
    tables = {run.name: flat_config(run) for run in [control, *tests]}
    for key in allowed:
        _check_known(key, [known for table in tables.values() for known in table])
    expected = tables[control.name]
    for test in tests:
        found = tables[test.name]
        others = [
            key
            for key in sorted({*expected, *found})
            if expected.get(key) != found.get(key)
            and not may_differ(key)
            and not _covers(allowed, key)
        ]
        if others:
            raise ConfigError(_mismatch(control, test, others))


def warn_of_repeats(control: Run, tests: Sequence[Run]) -> None:
    """Warn if a job only repeats the control's. (A finished run may be of other code.)"""
    for test in tests:
        started = not control.finished and not test.finished
        if started and test.processes == control.processes and not differences([control, test]):
            logger.warning(
                "%s has the same config and layout as %s: this only shows that a run is "
                "reproducible",
                test.name,
                control.name,
            )


def may_differ(key: str) -> bool:
    """Whether runs that differ only in this key should have the same curves."""
    return _covers(HOW, key) and not _covers(WHAT, key)


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return key -> its value in each run, as in TOML, for keys that differ."""
    return differing([flat_config(run) for run in runs])


def flat_config(run: Run) -> dict[str, Any]:
    """Return `{"training.seq_len": 256, ...}`, with the resolved global batch size."""
    table = flatten(asdict(run.config))
    return table | {_BATCH: run.global_batch_size}


def _covers(names: Sequence[str], key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _check_known(key: str, known: Sequence[str]) -> None:
    if any(_covers([key], name) for name in known):
        return
    section = key.partition(".")[0]
    siblings = [name for name in known if _covers([section], name)]
    candidates = siblings or {name.partition(".")[0] for name in known}
    raise ConfigError(f"--allow-different {key}: no such key.{did_you_mean(key, candidates)}")


def _mismatch(control: Run, test: Run, keys: Sequence[str]) -> str:
    expected, found = flat_config(control), flat_config(test)
    lines = [f"{test.argument} does not compute the same as {control.argument}:"]
    for key in keys:
        values = shown(expected.get(key)), shown(found.get(key))
        lines.append(f"  {key} = {values[0]} in {control.argument}, {values[1]} in {test.argument}")
    if _BATCH in keys and -1 in [r.config.training.global_batch_size for r in (control, test)]:
        lines.append("  (-1 stands for local_batch_size x data ranks: set it to the same number)")
    options = " ".join(f"--allow-different {key}" for key in keys)
    return "\n".join([*lines, f"If you intend this difference, give {options}"])
