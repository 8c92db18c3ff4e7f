"""Measure the peak memory of a loss and its backward pass: chunked against plain cross entropy.

Each case runs in its own process, after a run on a few tokens, so that one-time allocations of
libraries do not count. Its peak is the most memory held (on CPU the resident set, by the kernel's
high-water mark; on CUDA the bytes in tensors) above the memory before the loss, which are the
inputs. So logits, their gradients and the gradients of both inputs count.

    python -m benchmarks.loss [--dim 2048] [--vocab-size 128256] [--tokens 4096]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.report import Table, verdict
from torchtitan.components.chunked_loss import chunked_linear_cross_entropy
from torchtitan.components.loss import cross_entropy

MEMORY_TARGET = 4
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """One measurement; `chunk_size = 0` is plain cross entropy."""

    chunk_size: int
    dim: int
    vocab_size: int
    tokens: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Outcome:
    peak_bytes: int
    seconds: float
    loss: torch.Tensor
    gradients: tuple[torch.Tensor, torch.Tensor]
    """Gradients of the hidden states `[tokens, dim]` and of the weight `[vocab, dim]`."""


def measure(case: Case) -> Outcome:
    """Run a case in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcome.pt"
        command = [sys.executable, "-m", "benchmarks.loss", "--worker", json.dumps(asdict(case))]
        subprocess.run([*command, str(path)], check=True, cwd=Path(__file__).parents[1])
        # Mapped, not read: both gradients of a large vocabulary would take gigabytes.
        return Outcome(**torch.load(path, mmap=True, weights_only=True))


def _worker(case: Case, path: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _run(Case(min(case.chunk_size, 2), 8, 16, 4, case.dtype), device)
    hidden, weight, labels = _inputs(case, device)

    before = _reset_peak(device)
    start = time.perf_counter()
    loss = _loss(case, hidden, weight, labels)
    loss.backward()
    peak = _peak(device) - before
    seconds = time.perf_counter() - start
    outcome = {
        "peak_bytes": peak,
        "seconds": seconds,
        "loss": loss.detach().cpu(),
        "gradients": (hidden.grad.cpu(), weight.grad.cpu()),
    }
    torch.save(outcome, path)


def _run(case: Case, device: torch.device) -> None:
    _loss(case, *_inputs(case, device)).backward()


def _inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make hidden states as after a norm, and weights for logits of a trained model's size."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    dtype = getattr(torch, case.dtype)
    hidden = torch.randn(case.tokens, case.dim, **options).to(dtype).requires_grad_()
    weight = torch.randn(case.vocab_size, case.dim, **options).mul_(2 * case.dim**-0.5).to(dtype)
    labels = torch.randint(case.vocab_size, (case.tokens,), **options)
    return hidden, weight.requires_grad_(), labels


def _loss(
    case: Case, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the mean over the tokens, as in training."""
    if case.chunk_size:
        total = chunked_linear_cross_entropy(hidden, weight, labels, case.chunk_size)
    else:
        # The logits are not named here, so autograd alone decides their lifetime.
        total = cross_entropy(hidden @ weight.T, labels)
    return total / len(labels)


def _reset_peak(device: torch.device) -> int:
    """Reset the peak, and return the bytes held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS, proc(5)
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the reference."""
    return ((value - reference).norm() / reference.norm()).item()


def compare(dim: int, vocab_size: int, tokens: int, chunk_sizes: list[int]) -> list[list[str]]:
    """Make the rows of the table: plain cross entropy, then each chunk size.

    Raises:
        RuntimeError: loss or gradients differ, so the cases did not compute the same thing.
    """
    plain = measure(Case(0, dim, vocab_size, tokens))
    rows = [[str(dim), "plain", _gib(plain), "1", f"{plain.seconds:.1f}", "", ""]]
    for chunk_size in chunk_sizes:
        chunked = measure(Case(chunk_size, dim, vocab_size, tokens))
        errors = [relative_error(chunked.loss, plain.loss)]
        errors += map(relative_error, chunked.gradients, plain.gradients)
        if max(errors) > TOLERANCE:
            raise RuntimeError(f"chunks of {chunk_size}: loss and gradients are off by {errors}")
        ratio = plain.peak_bytes / chunked.peak_bytes
        rows.append(
            [
                str(dim),
                f"chunks of {chunk_size}",
                _gib(chunked),
                f"**{ratio:.2f}** times less",
                f"{chunked.seconds:.1f}",
                f"{max(errors):.0e}",
                verdict(ratio, at_least=MEMORY_TARGET),
            ]
        )
    return rows


def _gib(outcome: Outcome) -> str:
    return f"{outcome.peak_bytes / 2**30:.2f} GiB"


def table(dims: list[int], vocab_size: int, tokens: int, chunk_sizes: list[int]) -> Table:
    return Table(
        f"Loss and backward pass, vocabulary {vocab_size:,}, {tokens:,} tokens, float32",
        ["dim", "cross entropy", "peak memory", "against plain", "seconds", "error", "target"],
        [row for dim in dims for row in compare(dim, vocab_size, tokens, chunk_sizes)],
        "Peak above the inputs: logits, what autograd keeps, and the gradients of hidden states "
        "and weight. Error: relative, the largest of the loss's and the two gradients'.",
    )


def run(quick: bool = False) -> list[Table]:
    """Run the cases of the suites."""
    if quick:
        return [table([32], 1024, 64, [16])]
    return [table([2048], 128_256, 4096, [2048, 1024, 512])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[2048, 1024, 512, 256])
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        case, path = args.worker
        _worker(Case(**json.loads(case)), path)
        return 0
    print(table([args.dim], args.vocab_size, args.tokens, args.chunk_sizes).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
