"""Runs of every layout start from a Hugging Face folder, and save the same one that one rank does.

The learning rate is so small that no weight changes: what a run saves is what it started from.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import fused_qkv
import pytest
import tiny_llama
import torch
import torch.distributed as dist
from harness import checkpoints_in, on_ranks, short_and_long, train
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from torchtitan.components.checkpoint import huggingface_save, safetensors_files
from torchtitan.components.checkpoint.huggingface import ExportAssets
from torchtitan.config import JobConfig
from torchtitan.distributed.init import initialize_weights
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.llama3 import Llama3Model, Llama3ModelArgs, parallelize_llama
from torchtitan.protocols.train_spec import register_train_spec

EXPORT = (
    "--optimizer.lr=1e-30",
    "--optimizer.weight_decay=0",
    "--training.steps=2",
    "--checkpoint.enable",
    "--checkpoint.last_save_in_hf",
)
LLAMA = (*tiny_llama.OPTIONS, *EXPORT)
QWEN = (
    "--model.name=qwen3",
    "--model.flavor=debugmodel_moe",
    "--training.seq_len=32",
    "--training.global_batch_size=8",
    "--training.mixed_precision_param=float32",
    "--activation_checkpoint.mode=none",
    "--metrics.log_freq=1",
    *EXPORT,
)
DEEPSEEK = ("--model.name=deepseek_v3", "--model.flavor=debugmodel", *QWEN[2:])
MODELS = {"llama3": LLAMA, "qwen3": QWEN, "deepseek_v3": DEEPSEEK}
TP2 = "--parallelism.tensor_parallel_degree=2"
PP2 = "--parallelism.pipeline_parallel_degree=2"
EP2 = "--parallelism.expert_parallel_degree=2"
# model, ranks, options
LAYOUTS = {
    "fsdp2_tp2": ("llama3", 4, TP2, "--training.local_batch_size=4"),
    "ep2": ("qwen3", 2, EP2, "--training.local_batch_size=4"),
}
LONG_LAYOUTS = {
    "pp2_fsdp2": ("llama3", 4, PP2, "--training.local_batch_size=4"),
    "ep2_tp2_etp2": (
        "deepseek_v3",
        4,
        EP2,
        TP2,
        "--parallelism.expert_tensor_parallel_degree=2",
        "--training.local_batch_size=4",
    ),
    "hsdp2_ep2": (
        "qwen3",
        4,
        EP2,
        "--parallelism.data_parallel_replicate_degree=2",
        "--training.local_batch_size=2",
    ),
    "ep2_pp2": ("deepseek_v3", 4, EP2, PP2, "--training.local_batch_size=4"),
    "ddp2": ("llama3", 2, "--parallelism.data_parallel_replicate_degree=2"),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory):
    """Of a model: a folder of one rank's first weights, and a run of one rank from there."""
    made: dict[str, tuple[Path, Path, list[dict]]] = {}

    def make(model: str) -> tuple[Path, Path, list[dict]]:
        if model not in made:
            folder = tmp_path_factory.mktemp(model)
            batch = "--training.local_batch_size=8"
            train(folder / "first", *MODELS[model], batch, "--debug.seed=5")
            source = folder / "first" / "checkpoint" / "step-2-hf"
            lines = train(folder / "one", *MODELS[model], batch, *from_hf(source))
            made[model] = source, folder / "one" / "checkpoint" / "step-2-hf", lines
        return made[model]

    return make


def from_hf(source: Path) -> tuple[str, ...]:
    return ("--checkpoint.initial_load_in_hf", f"--checkpoint.initial_load_path={source}")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", short_and_long(LAYOUTS, LONG_LAYOUTS))
def test_a_layout_loads_and_saves_what_one_process_does(layout, one_process, tmp_path):
    model, ranks, *options = layout
    source, saved, expected = one_process(model)
    lines = train(tmp_path, *MODELS[model], *options, *from_hf(source), ranks=ranks)
    assert len(lines) == len(expected) == 2
    for line, reference in zip(lines, expected, strict=True):
        for key in ("loss", "grad_norm"):
            assert math.isclose(line[key], reference[key], rel_tol=1e-4), (key, line, reference)

    checkpoints = tmp_path / "checkpoint"
    assert checkpoints_in(checkpoints) == ["step-2", "step-2-hf"]
    of_layout, of_one = contents(checkpoints / "step-2-hf"), contents(saved)
    assert of_layout.keys() == of_one.keys() >= {"config.json", "tokenizer.json"}
    different = [name for name in of_one if of_layout[name] != of_one[name]]
    if model == "deepseek_v3":  # whose bias moves by the load, whatever the learning rate
        different = [name for name in different if not name.endswith(".safetensors")]
    assert not different
    if model == "llama3":
        assert of_one == contents(source)


def test_a_run_from_the_tokenizers_folder_is_an_export_in_bfloat16(one_process, tmp_path):
    # A second of imports, which the ranks of other tests do without.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, _, _ = one_process("llama3")
    lines = train(
        tmp_path,
        *LLAMA,
        f"--model.tokenizer_path={source}",
        "--checkpoint.initial_load_in_hf",
        "--checkpoint.last_save_model_only",
        "--checkpoint.export_dtype=bfloat16",
    )
    assert len(lines) == 2
    assert checkpoints_in(tmp_path / "checkpoint") == ["step-2-hf"]
    folder = tmp_path / "checkpoint" / "step-2-hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(folder)("Once", return_tensors="pt").input_ids
    assert ids.tolist() == [list(b"Once")]
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, expected(ids).logits)


BIG = Llama3ModelArgs(dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=4096, vocab_size=16384)


def save_and_load_big(folder: Path) -> None:
    safetensors_files.PIECE_BYTES = huggingface_save.PIECE_BYTES = 2 * 2**20
    dims = ParallelDims(dp_shard=2, tp=2, world_size=4)
    config = JobConfig()
    config.training.mixed_precision_param = "float32"
    with torch.device("meta"):
        model = Llama3Model(BIG)
    model = parallelize_llama(model, dims.world_mesh, dims, config)
    initialize_weights(model, 0, torch.device("cpu"))
    whole = 4 * BIG.get_nparams_and_flops(1)[0]
    own = sum(4 * p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))
    assert own < 0.3 * whole

    assets = ExportAssets("bytes", 128)
    before = peak_memory(reset=True)
    huggingface_save.MAX_FILE_BYTES = 10**8
    huggingface_save.save_huggingface(
        [model], folder / "out", torch.float32, assets, dist.group.WORLD
    )
    saving = peak_memory() - before
    checksums = [p.to_local().double().sum() for p in model.parameters()]
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    before = peak_memory(reset=True)
    model.load_checkpoint(folder / "out")
    loading = peak_memory() - before
    assert checksums == [p.to_local().double().sum() for p in model.parameters()]
    if dist.get_rank() == 0:
        (folder / "memory.txt").write_text(f"{whole=} {own=} {saving=} {loading=}")
    assert saving < 0.25 * whole, (saving, whole)
    assert loading < 0.25 * whole, (loading, whole)


def peak_memory(reset: bool = False) -> int:
    """The process's largest resident set since the last reset, bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's accounting")
def test_no_rank_holds_a_full_copy(tmp_path):
    on_ranks(4, save_and_load_big, tmp_path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5


def save_and_load_fused(folder: Path) -> None:
    register_train_spec("fused", fused_qkv.get_train_spec)
    dims, config = ParallelDims(dp_shard=2, world_size=2), JobConfig()
    config.training.mixed_precision_param = "float32"
    with torch.device("meta"):
        model = fused_qkv.FusedModel(fused_qkv.ARGS)
    model = parallelize_llama(model, dims.world_mesh, dims, config)
    initialize_weights(model, 0, torch.device("cpu"))
    huggingface_save.save_huggingface(
        [model], folder / "out", torch.float32, ExportAssets("bytes", 128), dist.group.WORLD
    )
    expected = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    of_files = fused_qkv.FusedAdapter(fused_qkv.ARGS).to_hf(expected)
    [file] = (folder / "out").glob("*.safetensors")
    saved = load_file(file)
    assert saved.keys() == of_files.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in of_files.items())
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_checkpoint(folder / "out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name


@pytest.mark.long
def test_an_adapter_that_cannot_compute_on_shards(tmp_path):
    """Of three heads, two ranks do not hold whole ones: PyTorch refuses to unflatten them."""
    on_ranks(2, save_and_load_fused, tmp_path)
