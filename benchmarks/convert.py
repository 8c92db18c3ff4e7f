"""Time the conversion from and to Hugging Face folders, against a plain copy of the same bytes.

The model is Llama 3 8B with every width times 3/8: 32 layers, 2.26 GB in bfloat16, all values 1.
Copy and conversions take turns, and each ends when its files are on the disk (fsync). Memory is
measured in separate processes.

    python -m benchmarks.convert [--rounds 5] [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import Spread, Table, verdict
from torchtitan.commands.convert import command
from torchtitan.commands.convert.from_hf import convert_from_hf
from torchtitan.commands.convert.to_hf import convert_to_hf
from torchtitan.components.checkpoint.huggingface import export_config
from torchtitan.components.checkpoint.safetensors_files import (
    SafetensorsWriter,
    TensorSpec,
    plan_files,
    write_index,
)
from torchtitan.models.llama3 import MODEL_CONFIGS, Llama3Model, Llama3StateDictAdapter
from torchtitan.models.which_model import model_of_hf_folder
from torchtitan.tools.text import human_bytes

TARGET = 0.5
ARGS = replace(
    MODEL_CONFIGS["8B"], dim=1536, n_heads=12, n_kv_heads=4, ffn_dim=5376, vocab_size=48096
)


def make_folder(folder: Path, layers: int) -> tuple[int, int]:
    """Write a Hugging Face folder. Return the bytes of all tensors and of the largest one."""
    args = replace(ARGS, n_layers=layers)
    with torch.device("meta"):
        state = Llama3StateDictAdapter(args).to_hf(Llama3Model(args).state_dict())
    specs = {key: TensorSpec(torch.bfloat16, tuple(t.shape)) for key, t in state.items()}
    files = plan_files(specs)
    folder.mkdir()
    for file, of_file in files.items():
        writer = SafetensorsWriter(folder / file, of_file)
        for key, spec in of_file.items():
            writer.write(key, torch.ones(spec.shape, dtype=spec.dtype))
        writer.close()
    write_index(folder, files)
    (folder / "config.json").write_text(json.dumps(export_config(args)))
    sizes = [spec.nbytes for spec in specs.values()]
    return sum(sizes), max(sizes)


def copy(source: Path, out: Path) -> None:
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
        with open(out / path.name, "rb") as file:
            os.fsync(file.fileno())


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_of(*arguments: object) -> int:
    """Return the bytes by which `torchtitan convert` with these arguments exceeds its imports."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.convert", "--peak", *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.splitlines()[-1])


def print_peak(arguments: list[str]) -> None:
    def high_water_mark() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    before = high_water_mark()
    command.main(arguments)
    print(high_water_mark() - before)


def measure(rounds: int, layers: int) -> Table:
    seconds: dict[str, list[float]] = {"copy": [], "from-hf": [], "to-hf": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, ours, out = folder / "hf", folder / "ours", folder / "out"
        total, largest = make_folder(source, layers)
        known = model_of_hf_folder(source)
        peaks = {"from-hf": peak_of("from-hf", source, ours), "to-hf": peak_of("to-hf", ours, out)}
        for path in source.glob("*.safetensors"):
            if path.read_bytes() != (out / path.name).read_bytes():
                raise RuntimeError(f"{path.name} is not what it was before the conversions")
        shutil.rmtree(out)
        for _ in range(rounds):
            turns = {
                "copy": lambda: copy(source, out),
                "from-hf": lambda: convert_from_hf(source, out, known, None),
                "to-hf": lambda: convert_to_hf(ours, out, known, None),
            }
            for turn, function in turns.items():
                seconds[turn].append(seconds_of(function))
                shutil.rmtree(out)
    copies = seconds["copy"]
    rows = [["plain copy", f"{total / Spread.of(copies).median / 1e9:.2f}", "1", "", ""]]
    for turn in ("from-hf", "to-hf"):
        speed = total / Spread.of(seconds[turn]).median / 1e9
        peak = human_bytes(peaks[turn])
        ratio = Spread.of_ratios(copies, seconds[turn])
        rows.append(
            [turn, f"{speed:.2f}", str(ratio), verdict(ratio.median, at_least=TARGET), peak]
        )
    return Table(
        f"Conversion of {human_bytes(total)}, {rounds} rounds",
        ["", "GB/s", "speed over the copy's", "target", "peak memory above the imports"],
        rows,
        f"Median (lowest to highest) of the rounds. The largest tensor has {human_bytes(largest)}.",
    )


def run(quick: bool = False) -> list[Table]:
    return [measure(1, 1) if quick else measure(5, 32)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--peak", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        print_peak(args.peak)
        return 0
    print(measure(args.rounds, args.layers).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
