"""Runs a suite of benchmarks and writes a dated Markdown page.

python -m benchmarks.run --suite cpu
python -m benchmarks.run --suite gpu
python -m benchmarks.run --suite cpu --only loss
"""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

from benchmarks import (
    checkpoint,
    convert,
    data,
    gpu_llama3,
    gpu_plan,
    loss,
    models,
    parallel,
    products,
    startup,
    trainer,
)
from benchmarks.peers import compare as peers
from benchmarks.plot import draw
from benchmarks.report import machine

BENCHMARKS = {
    "trainer": trainer,
    "peers": peers,
    "startup": startup,
    "loss": loss,
    "models": models,
    "parallel": parallel,
    "convert": convert,
    "data": data,
    "checkpoint": checkpoint,
    "gpu_llama3": gpu_llama3,
    "products": products,
    "gpu_plan": gpu_plan,
}
"""Name -> module with `run(quick) -> list[Table]`."""

SUITES = {
    "cpu": [
        "trainer",
        "peers",
        "startup",
        "loss",
        "models",
        "parallel",
        "convert",
        "data",
        "checkpoint",
    ],
    "gpu": ["gpu_llama3", "peers", "gpu_plan", "products", "loss"],
}
RESULTS = Path(__file__).parent / "results"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument(
        "--only", choices=BENCHMARKS, nargs="+", help="only these benchmarks of the suite"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the page")
    args = parser.parse_args(argv)

    names = args.only or SUITES[args.suite]
    tables = [table for name in names for table in BENCHMARKS[name].run(args.quick)]
    today = date.today().isoformat()
    page = f"# Benchmarks, {args.suite}, {today}\n\n{machine()}.\n"
    page += "".join(f"\n{table.markdown()}" for table in tables)
    args.out.mkdir(parents=True, exist_ok=True)
    # A part of a suite must not overwrite the page of the whole suite.
    path = args.out / f"{'-'.join([today, args.suite, *(args.only or [])])}.md"
    if draw(tables, picture := path.with_suffix(".png")):
        page += f"\n![The medians and their ranges]({picture.name})\n"
    path.write_text(page)
    print(f"{page}\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
