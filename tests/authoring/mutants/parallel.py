"""`base.parallelize` with one of its steps replaced, for mutants of how a model is spread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mutants import base


def parallelize_with(**replaced: Callable[..., Any]) -> Callable[..., Any]:
    """A `parallelize_fn`. `replaced` are of apply_tp, apply_cp, apply_ac, apply_compile and
    apply_fsdp."""
    names = ("apply_tp", "apply_cp", "apply_ac", "apply_compile", "apply_fsdp")
    steps = {name: getattr(base, name) for name in names} | replaced

    def parallelize(model, world_mesh, parallel_dims, job_config):
        if parallel_dims.tp_enabled:
            steps["apply_tp"](model, world_mesh["tp"], job_config)
        if parallel_dims.cp_enabled:
            steps["apply_cp"](model, world_mesh["cp"], job_config)
        steps["apply_ac"](model, job_config)
        model = steps["apply_compile"](model, job_config)
        if parallel_dims.dp_enabled:
            steps["apply_fsdp"](model, world_mesh["dp"], job_config)
        return model

    return parallelize


def with_plan(**changes: Any) -> Callable[..., None]:
    """An `apply_tp` whose plan has other styles; None takes a module out of it.

    Names have `__` in the place of the dot.
    """

    def apply_tp(model, tp_mesh, job_config):
        plan = base.tp_plan() | {name.replace("__", "."): s for name, s in changes.items()}
        plan = {name: style for name, style in plan.items() if style is not None}
        base.apply_tensor_parallel(model, tp_mesh, job_config, plan)

    return apply_tp
