"""Measure the speed of reading, resuming, preparing and streaming tokens, and if steps wait for it.

Each benchmark alternates between our code and the usual alternatives, in one run.

    python -m benchmarks.data [--rounds 5] [--only read prepare ...]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Spread, Table, verdict
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.data import DataLoader
from torchtitan.data.encode import Encoder
from torchtitan.data.json_lines import JsonLines, JsonLineStream
from torchtitan.data.mapped import map_file
from torchtitan.data.sources import open_dataset
from torchtitan.data.token_shards import Shard, TokenFiles

MEAN_TOKENS = 700
"""Mean length of a document; about that of web pages."""
VOCAB_SIZE = 16_384


@dataclass
class Samples:
    """Seconds of some rounds."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of all threads and child processes."""

    def measure(self, function: Callable[[], object]) -> None:
        cpu, start = _cpu_seconds(), time.perf_counter()
        function()
        self.wall.append(time.perf_counter() - start)
        self.cpu.append(_cpu_seconds() - cpu)

    def rates(self, amount: float, clock: str) -> Spread:
        return Spread.of([amount / seconds for seconds in getattr(self, clock)])


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def read(folder: Path, rounds: int, quick: bool) -> Table:
    """Read memory-mapped tokens in a global shuffle, in one process."""
    documents = 2_000 if quick else 60_000
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 2 * MEAN_TOKENS, documents))
    rng.integers(0, 256, ends[-1]).astype(np.uint16).tofile(folder / "tokens.bin")
    tokens = map_file(folder / "tokens.bin", np.dtype("<u2"))
    source = TokenFiles([Shard("tokens.bin", tokens, ends)])
    rows, seq_len, steps = 16, 2048, 10 if quick else 250

    def random_windows() -> None:
        """Read like nanoGPT's `get_batch`: no documents, no epochs, no resume."""
        for _ in range(steps):
            starts = torch.randint(len(tokens) - seq_len, (rows,)).tolist()
            windows = [tokens[i : i + seq_len + 1].astype(np.int64) for i in starts]
            torch.stack([torch.from_numpy(window[:-1]) for window in windows])
            torch.stack([torch.from_numpy(window[1:]) for window in windows])

    loaders = {
        packing: DataLoader(source, Encoder(BytesTokenizer()), seq_len, rows, rows, packing=packing)
        for packing in ("contiguous", "best_fit")
    }

    def of_loader(loader: DataLoader) -> None:
        for _ in range(steps):
            next(loader)

    measured = {name: Samples() for name in ("contiguous", "best_fit", "random windows")}
    for loader in loaders.values():
        for _ in range(10):
            next(loader)
    for _ in range(rounds):
        for name, loader in loaders.items():
            measured[name].measure(lambda loader=loader: of_loader(loader))
        measured["random windows"].measure(random_windows)
    amount = rows * seq_len * steps / 1e6
    table = Table(
        f"Memory-mapped tokens, one process, {rounds} rounds",
        ["what", "M tokens/s", "M tokens a CPU second", "target, M tokens/s"],
        note=f"Documents of {MEAN_TOKENS} tokens on average in a global shuffle, with positions "
        "and document ids; random windows are nanoGPT's get_batch, which has neither.",
    )
    for name, samples in measured.items():
        wall, cpu = samples.rates(amount, "wall"), samples.rates(amount, "cpu")
        target = "" if name == "random windows" else verdict(wall.median, at_least=20)
        table.rows.append([name, str(wall), str(cpu), target])
    for loader in loaders.values():
        loader.close()
    return table


def resume(folder: Path, rounds: int, quick: bool) -> Table:
    """Resume a state at the billionth sample, up to the first batch."""
    path, documents, rows, seq_len = folder / "huge.bin", 2 * 10**9, 8, 2048
    path.touch()
    os.truncate(path, 2 * 512 * documents)  # takes no space on the disk
    tokens = map_file(path, np.dtype("<u2"))
    source = TokenFiles([Shard(str(path), tokens, range(512, 512 * documents + 1, 512))])
    places = [[10**9 // rows * rows + row, 100, 0, 0] for row in range(rows)]
    state = {"rows": torch.tensor(places)}
    samples = Samples()

    def once() -> None:
        loader = DataLoader(source, Encoder(BytesTokenizer()), seq_len, rows, rows)
        loader.load_state_dict(state)
        next(loader)
        loader.close()

    for _ in range(rounds):
        samples.measure(once)
    wall = Spread.of(samples.wall)
    row = ["2 * 10^9 documents, 2 TB, at document 10^9", str(wall), verdict(wall.median, at_most=1)]
    return Table(
        f"Resume, {rounds} rounds", ["what", "seconds to the first batch", "target, seconds"], [row]
    )


def prepare(folder: Path, rounds: int, quick: bool) -> Table:
    """Compare `torchtitan data prepare` with the tokenizers library alone, on all cores."""
    texts = list(_texts())[: 40 if quick else None]
    _train_tokenizer(texts, folder)
    copies = 1 if quick else 2
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * copies))
    megabytes = sum(len(text.encode()) for text in texts) * copies / 1e6
    measured: dict[str, Samples] = {"tokenizers, encode_batch": Samples(), "prepare": Samples()}
    for number in range(rounds):
        for name, samples in measured.items():
            arguments = [name, str(folder), str(folder / f"out-{number}")]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.data", "--measure", *arguments],
                check=True,
                stdout=subprocess.PIPE,
            )
            seconds = json.loads(done.stdout.splitlines()[-1])
            samples.wall.append(seconds["wall"])
            samples.cpu.append(seconds["cpu"])
    theirs, ours = measured.values()
    ratios = {
        clock: Spread.of_ratios(getattr(theirs, clock), getattr(ours, clock))
        for clock in ("wall", "cpu")
    }
    table = Table(
        f"Preparing {megabytes:.0f} MB of JSON lines, {os.cpu_count()} processes, {rounds} rounds",
        ["what", "MB/s", "MB a CPU second", "ratio", "ratio by CPU time", "target"],
        note=f"BPE of {VOCAB_SIZE:,} tokens. The library has all texts in memory and drops the "
        "ids; prepare reads the file, starts its processes, and writes and hashes the shards.",
    )
    for name, samples in measured.items():
        wall, cpu = samples.rates(megabytes, "wall"), samples.rates(megabytes, "cpu")
        rest = ["", "", ""]
        if samples is ours:
            rest = [str(ratios["wall"]), str(ratios["cpu"])]
            rest.append(verdict(ratios["wall"].median, at_least=0.9))
        table.rows.append([name, str(wall), str(cpu), *rest])
    return table


def _measure(name: str, folder: Path, out: Path) -> None:
    """Run one side of `prepare`, in its own process."""
    from tokenizers import Tokenizer

    from torchtitan.data import prepare as preparation

    samples = Samples()
    if name == "prepare":
        lines, workers = str(folder / "lines.jsonl"), os.cpu_count() or 1
        task = preparation.Prepare(out, "jsonl", lines, tokenizer_path=str(folder), workers=workers)
        samples.measure(lambda: preparation.prepare(task))
    else:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        with (folder / "lines.jsonl").open() as file:
            texts = [json.loads(line)["text"] for line in file]

        def encode() -> None:
            for start in range(0, len(texts), 1000):
                tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)

        samples.measure(encode)
    print(json.dumps({"wall": samples.wall[0], "cpu": samples.cpu[0]}))


def _texts() -> Iterator[str]:
    source = open_dataset("stdlib", None)
    return (source[i] for i in range(len(source)))


def _train_tokenizer(texts: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::3], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')


def stream(folder: Path, rounds: int, quick: bool) -> Table:
    """Read JSON lines, from the first to the last, against `datasets` alone."""
    import datasets

    datasets.disable_progress_bars()
    path, documents = folder / "stream.jsonl", 1_000 if quick else 40_000
    words = np.array(["the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as"])
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(rng.choice(words, rng.integers(1, 1000)))
            file.write(
                json.dumps({"text": text, "url": f"https://x/{number}", "id": number}) + "\n"
            )
    megabytes = path.stat().st_size / 1e6

    def of_datasets() -> None:
        rows = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        assert sum(1 for row in rows if row["text"]) == documents

    def in_place() -> None:
        source = JsonLines([str(path)], "text")
        assert sum(1 for index in range(len(source)) if source[index]) == documents

    def streamed() -> None:
        assert sum(1 for text in JsonLineStream([str(path)], "text") if text) == documents

    sides = {"datasets": of_datasets, "in place (local files)": in_place, "streamed": streamed}
    measured = {name: Samples() for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            measured[name].measure(function)
    table = Table(
        f"JSON lines, {documents:,} documents, {rounds} rounds",
        ["what", "MB/s", "MB a CPU second", "ratio to datasets", "target"],
        note="In place includes finding the lines, which is done once for a file.",
    )
    base = measured["datasets"]
    for name, samples in measured.items():
        ratio = Spread.of_ratios(base.wall, samples.wall)
        wall, cpu = samples.rates(megabytes, "wall"), samples.rates(megabytes, "cpu")
        rest = ["", ""] if samples is base else [str(ratio), verdict(ratio.median, at_least=1)]
        table.rows.append([name, str(wall), str(cpu), *rest])
    return table


def wait(folder: Path, rounds: int, quick: bool) -> Table:
    """Measure the share of a step that the trainer waits for data, while texts are tokenized."""
    _train_tokenizer(list(_texts())[:40], folder)
    flavor = "debugmodel" if quick else "150M"
    command = ["-m", "torchtitan", "train", "--model.name", "llama3", "--model.flavor", flavor]
    command += ["--training.steps", "3" if quick else "6", "--training.local_batch_size", "1"]
    command += ["--training.seq_len", "256", "--metrics.log_freq", "1"]
    command += ["--job.dump_folder", str(folder / "run"), "--metrics.progress", "plain"]
    if not quick:
        command += ["--model.tokenizer_path", str(folder)]
    subprocess.run([sys.executable, *command], check=True, stderr=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]
    waited = sum(line["data_wait_seconds"] for line in lines[1:])
    share = waited / (lines[-1]["elapsed_seconds"] - lines[0]["elapsed_seconds"])
    first = lines[0]["data_wait_seconds"]
    row = [f"llama3 {flavor}, 256 tokens a step", f"{share:.3%}", f"{first:.3f}"]
    row.append(verdict(100 * share, at_most=1))
    header = ["run", "data wait of steps 2 on", "seconds before step 1", "target, %"]
    return Table("Waiting for data, on the CPU", header, [row])


BENCHMARKS = {
    "read": read,
    "resume": resume,
    "prepare": prepare,
    "stream": stream,
    "wait": wait,
}


def run(quick: bool = False, rounds: int = 5, only: list[str] | None = None) -> list[Table]:
    tables = []
    for name in only or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            tables.append(BENCHMARKS[name](Path(folder), 1 if quick else rounds, quick))
    return tables


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=BENCHMARKS, nargs="+")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        name, folder, out = args.measure
        _measure(name, Path(folder), Path(out))
        return 0
    for table in run(args.quick, args.rounds, args.only):
        print(table.markdown(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
