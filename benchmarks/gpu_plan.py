"""Compare the peak memory and step time that `torchtitan plan` predicts on one GPU with a real run.

Llama 3 of 150M, 1B and 3B parameters under each activation checkpointing mode, eager. Further
arguments are options of the trainer, for runs and plans alike.

    python -m benchmarks.gpu_plan [--models 150m 1b]
    python -m benchmarks.gpu_plan --tiny

Each run is reported on stderr once it is over; a run that fails, for example out of memory, is a
row too. On a CPU, --tiny checks that the benchmark works: there is no plan of a CPU's time, and its
process's memory is not that of its tensors, so neither is compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gpu_llama3 import TINY, Failed, Run, refuse_cpu
from benchmarks.report import Table
from torchtitan.config import load_config
from torchtitan.models.plugins import load_plugins
from torchtitan.planning.devices import DEVICES, get_device
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.plan import Plan

MODELS = Path(__file__).parents[1] / "torchtitan" / "models" / "llama3" / "train_configs"
MODES = ("none", "selective", "full")
BASE = [
    *["--training.dataset", "stdlib", "--model.tokenizer_path", "bytes"],
    *["--training.seq_len", "4096", "--training.local_batch_size", "2"],
    *["--training.global_batch_size", "-1", "--training.steps", "12", "--metrics.log_freq", "2"],
    *["--compile.enable=false", "--checkpoint.enable=false", "--validation.enable=false"],
    *["--parallelism.data_parallel_shard_degree", "-1"],
]
_GIB = 2**30


def measure(models: list[str], device: str, options: list[str]) -> Table:
    """Make a row for each model and mode. Modes that do not fit by the plan are only planned."""
    gpu = _gpu()
    rows = []
    for model in models:
        for mode in MODES:
            words = ["--job.config_file", str(MODELS / f"llama3_{model}.toml"), *BASE]
            words += ["--activation_checkpoint.mode", mode, *options]
            config = load_config(words)
            load_plugins(config.job.custom_import)
            plan = plan_run(config, 1, get_device(device))
            name = f"{config.model.flavor}, {mode}, planned {plan.peak / _GIB:.2f} GiB"
            run = Run.of(name, words) if plan.room >= 0 else None
            rows.append([config.model.flavor, mode, *_cells(plan, run, gpu is not None)])
    return Table(
        f"plans for {device}, runs on {gpu or 'a CPU'} {' '.join(options)}".strip(),
        ["model", "checkpointing", "peak planned", "measured", "off by"]
        + ["step planned, s", "measured", "off by"],
        rows,
        "Peak: torch.cuda.max_memory_allocated of the whole run. Step: median of the logged steps "
        "after the first.",
    )


def _cells(plan: Plan, run: Run | Failed | None, gpu: bool) -> list[str]:
    planned = [f"{plan.peak / _GIB:.2f} GiB", f"{plan.step_seconds:.3f}"]
    if run is None:
        return [planned[0], "does not fit", "", planned[1], "", ""]
    if isinstance(run, Failed):
        return [planned[0], str(run), "", planned[1], "", ""]
    peak = run.peak_bytes
    seconds = plan.tokens_per_step / run.median("tokens_per_second")
    if not gpu:
        return [planned[0], "not compared", "", planned[1], f"{seconds:.3f} (CPU)", ""]
    return [
        planned[0],
        f"{peak / _GIB:.2f} GiB",
        f"{plan.peak / peak - 1:+.1%}",
        planned[1],
        f"{seconds:.3f}",
        f"{plan.step_seconds / seconds - 1:+.1%}",
    ]


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def device_of(gpu: str | None) -> str:
    """Return the name that plans have for a GPU; `h100` for others, and without one."""
    name = (gpu or "").lower().replace(" ", "-")
    return max((known for known in DEVICES if known in name), key=len, default="h100")


def run(quick: bool = False) -> list[Table]:
    if quick:
        return [measure(["150m"], "h100", TINY)]
    refuse_cpu("gpu_plan")
    return [measure(["150m", "1b", "3b"], device_of(_gpu()), [])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["150m", "1b", "3b"])
    parser.add_argument("--device", help="as for torchtitan plan; default: by the GPU's name")
    parser.add_argument("--tiny", action="store_true", help="a tiny model instead of all others")
    args, options = parser.parse_known_args(argv)
    if not args.tiny:
        refuse_cpu("gpu_plan")
    models, options = (["150m"], [*TINY, *options]) if args.tiny else (args.models, options)
    print(measure(models, args.device or device_of(_gpu()), options).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
