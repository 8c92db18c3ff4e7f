"""Measure tokens/s, MFU and memory of Llama 3 1B and 3B on one GPU, in bfloat16 and float8.

Runs the trainer from Python, alternating between all modes in one process, and reads its log. Each
run is reported on stderr once it is over, so that its result survives the loss of the machine.
Further arguments are options of the trainer. The tiny version also runs on a CPU, as a check:

    python -m benchmarks.gpu_llama3 [--config benchmarks/configs/llama3_3b.toml] [--rounds 1]
        [--modes compiled "compiled, float8"] [--training.local_batch_size 1]
    python -m benchmarks.gpu_llama3 --tiny
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import Spread, Table, verdict
from torchtitan.config import load_config
from torchtitan.tools.text import first_line, three_digits
from torchtitan.train import Trainer

CONFIGS = Path(__file__).parent / "configs"
PLANS = {"llama3_1b": ["--training.local_batch_size=8"], "llama3_3b": []}
"""Config -> options for it."""
H100_PEAK_TFLOPS = 989.0
"""Dense bf16 matrix products of an H100 SXM, from NVIDIA's data sheet."""
TARGET_MFU = 0.55

MODES = {
    "eager": ["--compile.enable=false"],
    "compiled": ["--compile.enable=true"],
    "compiled, float8": [
        *["--compile.enable=true", "--model.converters", "quantize.linear.float8"],
    ],
    "compiled, float8 rowwise": [
        *["--compile.enable=true", "--model.converters", "quantize.linear.float8"],
        "--quantize.linear.float8.recipe_name=rowwise",
    ],
}
TINY = [
    *["--job.custom_import", "benchmarks.flavors", "--model.name", "benchmark_llama3"],
    *["--model.flavor", "tiny", "--training.seq_len", "64", "--training.local_batch_size", "1"],
    *["--training.steps", "6", "--metrics.log_freq", "2"],
]


@dataclass(frozen=True)
class Run:
    """One training run. `steady` has the logged steps after the first, which may compile."""

    first: dict[str, Any]
    steady: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str, options: list[str]) -> Run | Failed:
        """Train, and report the result on stderr."""
        with tempfile.TemporaryDirectory() as folder:
            problem = train([*options, "--job.dump_folder", folder])
            path = Path(folder) / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
        run: Run | Failed
        if problem or len(lines) < 2:
            run = Failed(problem or "too few steps were logged")
        else:
            first, *steady = map(json.loads, lines)
            run = cls(first, steady)
        print(f"{name}: {run}", file=sys.stderr, flush=True)
        return run

    def __str__(self) -> str:
        return (
            f"{three_digits(self.median('tokens_per_second'))} tokens/s, "
            f"{three_digits(self.median('tflops_per_second_per_device'))} TFLOP/s, "
            f"{self.peak_bytes / 2**30:.2f} GiB, "
            f"first step {three_digits(self.first['elapsed_seconds'])} s"
        )

    @property
    def peak_bytes(self) -> int:
        return max(line["peak_memory_bytes"] for line in self.steady)

    def median(self, key: str) -> float:
        return statistics.median(line[key] for line in self.steady)


@dataclass(frozen=True)
class Failed:
    """A training run that did not finish, for example out of memory, or logged too few steps."""

    problem: str

    def __str__(self) -> str:
        return f"failed: {self.problem}"


def train(options: list[str]) -> str | None:
    """Run the trainer, with an empty GPU before and after. Return its failure, in short."""
    problem = None
    try:
        Trainer(load_config(options)).train()
    except Exception as error:
        problem = first_line(error)
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return problem


def refuse_cpu(name: str) -> None:
    """End the program if a full-size benchmark would run on a CPU for hours."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"{name} needs a GPU that PyTorch can use; on a CPU, --tiny shows it works"
        )


def measure(
    config: Path, modes: list[str], rounds: int, peak_tflops: float, options: list[str]
) -> Table:
    """Alternate between the modes. MFU needs a GPU; in float8 it is also over the bf16 peak."""
    runs: dict[str, list[Any]] = defaultdict(list)
    base = ["--job.config_file", str(config), "--metrics.progress", "plain", *options]
    failures: dict[str, list[Any]] = defaultdict(list)
    for number in range(rounds):
        for mode in modes:
            run = Run.of(f"round {number + 1}, {mode}", [*base, *MODES[mode]])
            (runs if isinstance(run, Run) else failures)[mode].append(run)

    rows = []
    for mode in modes:
        of_mode, failed = runs[mode], failures[mode]
        name = f"{mode} ({len(failed)} {failed[0]})" if of_mode and failed else mode
        if not of_mode:
            rows.append([mode, str(failed[0]), *[""] * 5])
            continue
        flops = Spread.of([run.median("tflops_per_second_per_device") for run in of_mode])
        mfu, target = "", ""
        if torch.cuda.is_available():
            mfu = f"{flops.median / peak_tflops:.1%}"
            target = verdict(flops.median / peak_tflops, at_least=TARGET_MFU)
        peak = max(run.peak_bytes for run in of_mode)
        rows.append(
            [
                name,
                str(Spread.of([run.median("tokens_per_second") for run in of_mode])),
                str(flops),
                mfu,
                f"{peak / 2**30:.2f} GiB",
                str(Spread.of([run.first["elapsed_seconds"] for run in of_mode])),
                target,
            ]
        )
    return Table(
        f"{config.stem} {' '.join(options)}".strip(),
        ["mode", "tokens/s", "TFLOP/s", "MFU", "peak memory", "first step, seconds", "target MFU"],
        rows,
        f"Median (lowest to highest) of {rounds} runs, each the median of its logged steps after "
        f"the first. MFU: 6 FLOPs a weight and token, and attention in full, over {peak_tflops:g} "
        "TFLOP/s.",
    )


def run(quick: bool = False) -> list[Table]:
    if quick:
        return [measure(CONFIGS / "llama3_1b.toml", list(MODES), 1, H100_PEAK_TFLOPS, TINY)]
    refuse_cpu("gpu_llama3")
    compiled = [mode for mode in MODES if mode != "eager"]  # eager does not fit these batches
    return [
        measure(CONFIGS / f"{name}.toml", compiled, 3, H100_PEAK_TFLOPS, options)
        for name, options in PLANS.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "llama3_1b.toml")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, default=H100_PEAK_TFLOPS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one round")
    args, options = parser.parse_known_args(argv)
    if not args.tiny:
        refuse_cpu("gpu_llama3")
    rounds, options = (1, [*TINY, *options]) if args.tiny else (args.rounds, options)
    print(measure(args.config, args.modes, rounds, args.peak_tflops, options).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
