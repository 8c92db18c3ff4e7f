"""Every layout trains like one process: same seed, same losses, same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from equality import SAVE, assert_equal_runs
from harness import short_and_long, train

CONFIG = """
[job]
custom_import = "tiny_llama"
[model]
name = "tiny_llama"
flavor = "tiny"
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 5
[training]
dataset = "stdlib"
local_batch_size = {local_batch_size}
global_batch_size = 8
seq_len = 64
steps = 6
mixed_precision_param = "float32"
[metrics]
log_freq = 1
block_norm_freq = 3
[activation_checkpoint]
mode = "none"
"""


def train_layout(folder: Path, processes: int, local_batch_size: int, *options: str) -> Path:
    """Train into `folder`; returns its dump folder, with a checkpoint of the last step."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(local_batch_size=local_batch_size))
    options = ("--job.config_file", str(config), *SAVE, *options)
    train(folder / "run", *options, ranks=processes)
    return folder / "run"


def train_in(folder: Path, layout: tuple, *options: str) -> Path:
    """Like `train_layout`, in a layout: (processes, local batch size, its options...)."""
    processes, local_batch_size, *own = layout
    return train_layout(folder, processes, local_batch_size, *options, *own)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(tmp_path_factory.mktemp("layouts"), 1, 8)


@pytest.fixture(scope="module")
def one_process_of_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(tmp_path_factory.mktemp("layouts"), 1, 8, DOCUMENTS)


DOCUMENTS = "--training.document_mask"
TP2 = "--parallelism.tensor_parallel_degree=2"
REPLICATE2 = "--parallelism.data_parallel_replicate_degree=2"
WHOLE_SEQUENCE = "--parallelism.disable_sequence_parallel"
CP2 = "--parallelism.context_parallel_degree=2"
CP4 = "--parallelism.context_parallel_degree=4"
ULYSSES = "--parallelism.context_parallel_method=ulysses"
RING = "--parallelism.context_parallel_method=ring"
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")
CHUNKED = "--loss.name=chunked_cross_entropy"
FULL_AC = "--activation_checkpoint.mode=full"
OP_AC = "--activation_checkpoint.mode=selective"
LAYOUTS = {
    "accumulation": (1, 2),
    "ddp2_accumulation": (2, 2, REPLICATE2, "--parallelism.data_parallel_shard_degree=1"),
    "fsdp4": (4, 2),
    "hsdp2x2": (4, 2, REPLICATE2),
    "tp2": (2, 8, TP2),
    "fsdp2xtp2": (4, 4, TP2),
    "full_ac_fsdp2": (2, 4, "--activation_checkpoint.mode=full"),
    "cp2_ulysses_full_ac": (2, 8, CP2, ULYSSES, FULL_AC),
    "cp2_ring_op_ac": (2, 8, CP2, RING, OP_AC),
    "cp2xtp2": (4, 8, CP2, TP2),
    "tp2_full_ac_compile": (2, 8, TP2, FULL_AC, *COMPILE),
}
LONG_LAYOUTS = {
    "tp2_whole_sequence": (2, 8, TP2, WHOLE_SEQUENCE),
    "fsdp2": (2, 4),
    "fsdp2xtp2_chunked_loss": (4, 4, TP2, "--loss.name=chunked_cross_entropy"),
    "op_ac_fsdp2xtp2": (4, 4, TP2, "--activation_checkpoint.mode=selective"),
    "ddp2": (2, 4, REPLICATE2, "--parallelism.data_parallel_shard_degree=1"),
    "hsdp2x2_accumulation": (4, 1, REPLICATE2),
    "tp2_gathered_logits": (2, 8, TP2, "--parallelism.disable_loss_parallel"),
    "fsdp2_chunked_loss": (2, 4, "--loss.name=chunked_cross_entropy", "--loss.chunk_size=100"),
    "layer_ac": (
        1,
        8,
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=2",
    ),
    "cp2": (2, 8, CP2),
    "fsdp8": (8, 1),
    "hsdp2x4": (8, 1, REPLICATE2),
    "hsdp2xfsdp2xtp2": (8, 2, REPLICATE2, TP2),
    "tp4": (4, 8, "--parallelism.tensor_parallel_degree=4"),
    "fsdp2xtp4": (8, 4, "--parallelism.tensor_parallel_degree=4"),
    "never_reshard": (2, 4, "--parallelism.fsdp_reshard_after_forward=never"),
    "always_reshard": (2, 4, "--parallelism.fsdp_reshard_after_forward=always"),
    "cp4": (4, 8, CP4),
    "cp4_ulysses": (4, 8, CP4, ULYSSES),
    "cp4_ring": (4, 8, CP4, RING),
    "cp2_full_ac": (2, 8, CP2, FULL_AC),
    "cp2_chunked_loss_accumulation": (2, 2, CP2, CHUNKED),
    "cp2_compile": (2, 8, CP2, *COMPILE),
    "cp2_compile_whole_model": (2, 8, CP2, *COMPILE, "--compile.scope=model"),
    "cp2_op_ac_compile": (2, 8, CP2, OP_AC, *COMPILE),
    "cp2_ulysses_compile": (2, 8, CP2, ULYSSES, *COMPILE),
    "cp2_ring_full_ac_compile": (2, 8, CP2, RING, FULL_AC, *COMPILE),
    "cp2_ring_op_ac_compile": (2, 8, CP2, RING, OP_AC, *COMPILE),
    "ddp2xcp2": (4, 4, REPLICATE2, CP2),
    "fsdp2xcp2": (4, 4, CP2),
    "hsdp2xfsdp2xcp2": (8, 2, REPLICATE2, CP2),
    "fsdp2xcp2xtp2": (8, 4, CP2, TP2),
    "cp2xtp2_whole_sequence": (4, 8, CP2, TP2, WHOLE_SEQUENCE),
    "fsdp2xtp2_whole_sequence_chunked_loss": (4, 4, TP2, WHOLE_SEQUENCE, CHUNKED),
    "tp2_whole_sequence_op_ac_compile": (
        2,
        8,
        TP2,
        WHOLE_SEQUENCE,
        "--parallelism.disable_loss_parallel",
        OP_AC,
        *COMPILE,
    ),
}
DOCUMENT_LAYOUTS = {"cp2": (2, 8, CP2)}
LONG_DOCUMENT_LAYOUTS = {
    "cp4_op_ac": (4, 8, CP4, OP_AC),
    "cp4_ulysses": (4, 8, CP4, ULYSSES),
    "fsdp2xcp2_compile": (4, 4, CP2, *COMPILE),
}


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_layout_gives_the_losses_of_one_process(
    layout: tuple, one_process: Path, tmp_path: Path
) -> None:
    assert_equal_runs(train_in(tmp_path, layout), one_process)


@pytest.mark.parametrize("layout", short_and_long(DOCUMENT_LAYOUTS, LONG_DOCUMENT_LAYOUTS))
def test_layout_gives_the_losses_of_one_process_on_documents(
    layout: tuple, one_process_of_documents: Path, tmp_path: Path
) -> None:
    assert_equal_runs(train_in(tmp_path, layout, DOCUMENTS), one_process_of_documents)


FROZEN = ("--job.custom_import=own_parts_llama", "--model.name=own_frozen", "--training.steps=3")


def test_what_the_model_freezes_stays_frozen_under_tensor_parallelism(tmp_path: Path) -> None:
    """PyTorch's styles make new parameters, which require gradients."""
    expected = train_layout(tmp_path / "one", 1, 8, *FROZEN)
    assert_equal_runs(train_layout(tmp_path / "tp2", 2, 8, *FROZEN, TP2), expected)


@pytest.mark.long
def test_what_the_model_freezes_stays_frozen_in_stages(tmp_path: Path) -> None:
    expected = train_layout(tmp_path / "one", 1, 8, *FROZEN)
    pp2 = "--parallelism.pipeline_parallel_degree=2"
    assert_equal_runs(train_layout(tmp_path / "pp2xtp2", 4, 8, *FROZEN, TP2, pp2), expected)
