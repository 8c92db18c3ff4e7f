"""In float64, layouts train alike to 1e-11: in float32, rounding would hide small errors.

Such as a wrong scale of a loss that adds little, a term that one rank lacks, or a value of the step
before. See `exact_models` for the models and their uneven batches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from equality import SAVE, newest_weights
from harness import read_lines, short_and_long, train

EXACT = 1e-11
"""Of losses and norms, relative; of weights, as a share of the largest one of the tensor. Most are
within 1e-13; with the usual `optimizer.eps`, 1e-9, since Adam divides rounding errors of gradients
that are nearly 0 by these."""
OPTIONS = [
    *("--job.custom_import=exact_models", "--model.name=exact", "--training.seq_len=32"),
    *("--training.steps=4", "--training.global_batch_size=8", "--training.max_norm=0.5"),
    *("--training.mixed_precision_param=float32", "--activation_checkpoint.mode=none"),
    *("--optimizer.lr=1e-2", "--optimizer.eps=1e-5"),
    *("--lr_scheduler.warmup_steps=2", "--lr_scheduler.total_steps=10"),
    *("--metrics.log_freq=1", "--metrics.block_norm_freq=1", *SAVE),
]
RULES = """
[optimizer]
no_decay = ["norm"]
[[optimizer.rules]]
pattern = 'layers\\.1\\.'
lr_scale = 0.5
weight_decay = 0.3
[[optimizer.rules]]
pattern = 'layers\\.2\\.attention\\.wq'
lr_scale = 0.0
"""
TP2 = "--parallelism.tensor_parallel_degree=2"
WHOLE_SEQUENCE = "--parallelism.disable_sequence_parallel"
CP2 = "--parallelism.context_parallel_degree=2"
RING = "--parallelism.context_parallel_method=ring"
ULYSSES = "--parallelism.context_parallel_method=ulysses"
PP2 = "--parallelism.pipeline_parallel_degree=2"
INTERLEAVED = "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"
ZBV = "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"
EP2 = "--parallelism.expert_parallel_degree=2"
ETP2 = "--parallelism.expert_tensor_parallel_degree=2"
REPLICATE2 = "--parallelism.data_parallel_replicate_degree=2"
FULL_AC = "--activation_checkpoint.mode=full"
OP_AC = "--activation_checkpoint.mode=selective"
CHUNKED = ("--loss.name=chunked_cross_entropy", "--loss.chunk_size=37")
Z_LOSS = "--loss.z_loss_weight=0.05"
DOCUMENTS = "--training.document_mask"
MUON, ADAM, SGD = (f"--optimizer.name={name}" for name in ("Muon", "Adam", "SGD"))

# (flavor, options of both runs, processes, local batch size, options of the layout)
LAYOUTS = {
    "experts_and_later_tokens": (
        *("deepseek_v3", (Z_LOSS, *CHUNKED)),
        *(4, 4, (PP2, EP2, INTERLEAVED, FULL_AC)),
    ),
    "experts_of_tp": ("qwen3, experts", (Z_LOSS,), 2, 4, (TP2, EP2, OP_AC)),
    "windows_of_documents": ("gpt_oss", (DOCUMENTS,), 2, 2, (CP2, ULYSSES)),
    "tied_weights": ("llama3, tied", (MUON, Z_LOSS), 2, 8, (PP2, ZBV)),
    "accumulation": ("llama3", (ADAM,), 4, 1, (REPLICATE2,)),
}
LONG_LAYOUTS = {
    "later_tokens_of_tp": ("deepseek_v3", (Z_LOSS, *CHUNKED), 2, 2, (TP2, WHOLE_SEQUENCE)),
    "balanced_sequences": ("deepseek_v3", (), 4, 8, (CP2, TP2, EP2)),
    "parts_of_experts": ("qwen3, experts", (ADAM,), 4, 2, (TP2, EP2, ETP2)),
    "stacks": ("qwen3, experts", (MUON,), 4, 2, (REPLICATE2, EP2)),
    "experts_of_stages": ("qwen3, experts", (SGD,), 4, 4, (PP2, EP2, ZBV)),
    "ring": ("llama3", (Z_LOSS,), 4, 4, (CP2, RING, TP2)),
    "windows": ("gemma3", (DOCUMENTS, Z_LOSS), 4, 4, (CP2, PP2, INTERLEAVED)),
    "chunks": ("llama4", (DOCUMENTS,), 4, 8, (CP2, TP2, WHOLE_SEQUENCE, EP2)),
    "sinks": ("gpt_oss", (DOCUMENTS,), 4, 8, (PP2, TP2, ZBV)),
}


def run(folder: Path, flavor: str, local: int, *options: str, ranks: int = 1) -> Path:
    (config := folder.with_suffix(".toml")).write_text(RULES)
    size = f"--training.local_batch_size={local}"
    given = f"--job.config_file={config}", f"--model.flavor={flavor}", size, *options
    train(folder, *OPTIONS, *given, ranks=ranks)
    return folder


def assert_exact(folder: Path, expected: Path) -> None:
    lines, reference = (read_lines(path / "metrics.jsonl") for path in (folder, expected))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, numbers in zip(lines, reference, strict=True):
        for key, number in numbers.items():
            if any(word in key for word in ("loss", "norm", "expert")):
                assert line[key] == pytest.approx(number, rel=EXACT, abs=EXACT), (key, line)
    weights, numbers = newest_weights(folder), newest_weights(expected)
    assert weights.keys() == numbers.keys()
    for name, weight in numbers.items():
        assert weight.dtype == torch.float64, name
        difference = (weights[name] - weight).abs().max()
        assert difference <= EXACT * weight.abs().max(), (name, difference)


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_a_layout_trains_exactly_like_one_process(layout: tuple, tmp_path: Path) -> None:
    flavor, shared, ranks, local, options = layout
    expected = run(tmp_path / "one", flavor, 8, *shared)
    folder = run(tmp_path / "layout", flavor, local, *shared, *options, ranks=ranks)
    assert_exact(folder, expected)


def test_a_run_that_changes_its_layout_does_too(tmp_path: Path) -> None:
    expected = run(tmp_path / "one", "qwen3, experts", 8, MUON)
    half = run(tmp_path / "two", "qwen3, experts", 4, MUON, EP2, "--training.steps=2", ranks=2)
    assert_exact(run(half, "qwen3, experts", 8, MUON, PP2, INTERLEAVED, ranks=2), expected)
