"""Llama 3 1B, bfloat16 and float8, sequences of 4,096 tokens, one GPU: tokens/s, MFU, memory.

Runs the trainer as a user does, each time in a process of its own, all modes by turns, and reads
what it logs. Further arguments are options of the trainer. It runs on a CPU too, to see that
it works:

    python -m benchmarks.gpu_llama3 [--rounds 3] [--training.local_batch_size 4]
    python -m benchmarks.gpu_llama3 --tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Spread, Table, verdict

CONFIGS = Path(__file__).parent / "configs"
H100_PEAK_TFLOPS = 989.0
"""Dense bf16 matrix products of an H100 SXM, by NVIDIA's data sheet."""
TARGET_MFU = 0.5

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
    """One training. The logged steps but the first, which warms up or compiles, are `steady`."""

    first: dict[str, Any]
    steady: list[dict[str, Any]]

    @classmethod
    def of(cls, options: list[str]) -> Run:
        """Train in a new process."""
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torchtitan.train", "--job.dump_folder", folder]
            subprocess.run([*command, *options], check=True)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        first, *steady = map(json.loads, lines)
        return cls(first, steady)

    def median(self, key: str) -> float:
        return statistics.median(line[key] for line in self.steady)


def measure(config: Path, rounds: int, peak_tflops: float, options: list[str]) -> Table:
    """All modes by turns. MFU appears where there is a GPU, in float8 over the bf16 peak too."""
    runs: dict[str, list[Run]] = defaultdict(list)
    base = ["--job.config_file", str(config), "--metrics.progress", "plain", *options]
    for _ in range(rounds):
        for mode, mode_options in MODES.items():
            runs[mode].append(Run.of([*base, *mode_options]))

    rows = []
    for mode, of_mode in runs.items():
        flops = Spread.of([run.median("tflops_per_second_per_device") for run in of_mode])
        mfu, target = "", ""
        if _has_gpu():
            mfu = f"{flops.median / peak_tflops:.1%}"
            target = verdict(flops.median / peak_tflops, at_least=TARGET_MFU)
        peak = max(run.steady[-1]["peak_memory_bytes"] for run in of_mode)
        rows.append(
            [
                mode,
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


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(quick: bool = False) -> list[Table]:
    config = CONFIGS / "llama3_1b.toml"
    if quick:
        return [measure(config, 1, H100_PEAK_TFLOPS, TINY)]
    return [measure(config, 3, H100_PEAK_TFLOPS, [])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "llama3_1b.toml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, default=H100_PEAK_TFLOPS)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one round")
    args, options = parser.parse_known_args(argv)
    rounds, options = (1, [*TINY, *options]) if args.tiny else (args.rounds, options)
    print(measure(args.config, rounds, args.peak_tflops, options).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
