"""Weights that FSDP gathers in float8: the same numbers in half of the bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from equality import SAVE, newest_weights
from harness import command, on_ranks, read_lines, run_ranks, train
from tiny_llama import OPTIONS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from torchtitan.components.quantization.float8_gather import use_float8_gathers
from torchtitan.components.quantization.linear import QuantizedLinear
from torchtitan.config import load_config
from torchtitan.distributed.collective_observer import CollectiveObserver
from torchtitan.errors import ConfigError
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.train import Trainer

FLOAT8 = ["--model.converters", "quantize.linear.float8"]
GATHER = "--quantize.linear.float8.enable_fsdp_float8_all_gather"
BASE = [*OPTIONS, *FLOAT8, "--optimizer.lr=1e-3", "--training.mixed_precision_param=bfloat16"]


def degree(kind: str, ranks: int) -> str:
    return f"--parallelism.{kind}_degree={ranks}"


REPLICATE2, SHARD1, SHARD2 = (
    degree("data_parallel_replicate", 2),
    degree("data_parallel_shard", 1),
    degree("data_parallel_shard", 2),
)
TP2, PP2 = degree("tensor_parallel", 2), degree("pipeline_parallel", 2)
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")
CASES = {
    "float32": (2, "--training.mixed_precision_param=float32"),
    "uneven": (3, "--training.global_batch_size=12"),
    "accumulation": (2, "--training.local_batch_size=2"),
    "never": (2, "--parallelism.fsdp_reshard_after_forward=never"),
    "hsdp": (4, "--training.local_batch_size=2", REPLICATE2, SHARD2),
    "ddp": (2, REPLICATE2, SHARD1),
    "tp": (4, TP2),
    "tp, compile": (4, TP2, *COMPILE),
    "pp": (4, PP2),
    "pp, interleaved": (4, PP2, "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"),
    "full": (2, "--activation_checkpoint.mode=full"),
    "selective": (2, "--activation_checkpoint.mode=selective"),
    "compile": (2, *COMPILE),
    "compile, full": (2, *COMPILE, "--activation_checkpoint.mode=full"),
    "inductor": (2, "--compile.enable"),
    "muon": (2, "--optimizer.name=Muon"),
}
SHORT = ("uneven", "tp", "pp")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in CASES]
)
def test_nothing_changes_in_any_number(name: str, tmp_path: Path) -> None:
    ranks, *options = CASES[name]
    folders = tmp_path / "gather", tmp_path / "plain"
    lines, expected = (
        train(folder, *BASE, *SAVE, *options, *also, ranks=ranks, timeout=300)
        for folder, also in zip(folders, ([GATHER], []), strict=True)
    )
    numbers = [[line[key] for key in ("step", "loss", "grad_norm")] for line in expected]
    assert numbers == [[line[key] for key in ("step", "loss", "grad_norm")] for line in lines]
    weights, reference = map(newest_weights, folders)
    assert weights.keys() == reference.keys()
    for key, weight in reference.items():
        assert weights[key].dtype == weight.dtype and torch.equal(weights[key], weight), key


@pytest.mark.long
def test_a_run_resumes_with_or_without_it(tmp_path: Path) -> None:
    options = [*BASE, "--checkpoint.enable", "--checkpoint.interval=2"]
    for folder, uses in (("mixed", ("true", "false", "true")), ("plain", ("false",) * 3)):
        for steps, use in zip((2, 4, 6), uses, strict=True):
            own = f"{GATHER}={use}", f"--training.steps={steps}"
            train(tmp_path / folder, *options, *own, ranks=2)
    mixed, plain = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("mixed", "plain"))
    assert [line["loss"] for line in mixed] == [line["loss"] for line in plain]


def collectives_of_a_step(option: str, folder: str) -> tuple[list[tuple[str, int]], int, int]:
    """Names and bytes of the collectives of a step; float8 weights and others in a block."""
    trainer = Trainer(load_config([*BASE, option, f"--job.dump_folder={folder}"]))
    seen: list[tuple[str, int]] = []

    def observe(name: str, inputs: list[torch.Tensor], call: Callable[[], Any]) -> Any:
        seen.append((name, sum(t.nbytes for t in inputs)))
        return call()

    stop = StopRequest()
    for step in (1, 2):  # of the first, FSDP learns the order
        trainer.state.step = step
        seen.clear()
        with CollectiveObserver(observe):
            trainer.train_step(stop)
    block: Any = trainer.model_parts[0].layers["0"]
    sizes = [p.to_local().numel() for p in block.parameters()]
    matrices = sum(p.to_local().numel() for p in block.parameters() if p.ndim == 2)
    stop.close()
    trainer.close()
    return seen, matrices, sum(sizes) - matrices


def test_half_of_the_bytes_travel_and_one_exchange_finds_all_scales(tmp_path: Path) -> None:
    runs = [
        run_ranks(collectives_of_a_step, 2, f"{GATHER}={on}", str(tmp_path / on))[0]
        for on in ("true", "false")
    ]
    gathers, reductions = [], []
    for seen, _, _ in runs:
        gathers.append([size for name, size in seen if name.startswith("_allgather_base")])
        reductions.append([size for name, size in seen if name.startswith("allreduce")])
    _, matrices, others = runs[0]
    layers, passes = 4, 2
    of_block = [matrices + 2 * others, 2 * matrices + 2 * others]
    assert [gathers[i].count(of_block[i]) for i in (0, 1)] == [layers * passes] * 2, gathers
    assert sum(gathers[1]) - sum(gathers[0]) == layers * passes * matrices
    scales = [size for size in reductions[0] if size not in reductions[1]]
    assert scales == [4 * 7 * layers] * passes, reductions


class Skipping(nn.Module):
    """Three layers, of which a pass can leave some out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        linears = [nn.Linear(32, 32, bias=False) for _ in range(3)]
        self.layers = nn.ModuleList(
            QuantizedLinear(linear, "tensor", True, True, float8_gather=True) for linear in linears
        )

    def forward(self, x: torch.Tensor, used: tuple[int, ...]) -> torch.Tensor:
        for i in used:
            x = self.layers[i](x)
        return x


def sharded(model: Skipping) -> Skipping:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    use_float8_gathers(model)
    return model


def skip_and_change(folder: Path) -> None:
    model, plain = sharded(Skipping()), Skipping()
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    # A pass leaves out the layer that the next one begins with, and so finds its scale in vain.
    for factor, used in enumerate([(1, 2), (0, 1, 2), (2, 0), (1,), (0, 0, 1)], start=1):
        with torch.no_grad():
            for weights in zip(model.parameters(), plain.parameters(), strict=True):
                for weight in weights:
                    weight *= factor * 3
        half = [layer.weight.detach().bfloat16() for layer in plain.layers]
        expected = x
        for i in used:
            expected = plain.layers[i]._product(expected, half[i])
        assert torch.equal(model(x, used), expected), used


def test_a_scale_is_never_older_than_its_pass(tmp_path: Path) -> None:
    on_ranks(2, skip_and_change, tmp_path)


def gather_before_the_first_pass(folder: Path) -> None:
    model, plain = sharded(Skipping().to("meta")), Skipping()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for param, weight in zip(model.parameters(), plain.parameters(), strict=True):
            first = weight.chunk(2)[dist.get_rank()]
            param.to_local().copy_(first)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    half = plain.layers[2].weight.detach().bfloat16()
    assert torch.equal(model(x, (2,)), plain.layers[2]._product(x, half))


def test_weights_can_be_gathered_before_the_first_pass(tmp_path: Path) -> None:
    """As the schedules of a pipeline do."""
    on_ranks(2, gather_before_the_first_pass, tmp_path)


def use_outside(folder: Path) -> None:
    model = sharded(Skipping())
    model.layers[0].forward = lambda x: F.linear(x, model.layers[0].weight)
    with pytest.raises(ConfigError, match=r"outside of its layer \(aten.*\), which only has it"):
        model(torch.randn(16, 32, dtype=torch.bfloat16), (0,))


def test_a_weight_that_the_model_uses_itself_is_refused(tmp_path: Path) -> None:
    on_ranks(2, use_outside, tmp_path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        output = nn.Linear(32, 64, bias=False)
        self.embedding = nn.Embedding(64, 32)
        self.output = QuantizedLinear(output, "tensor", True, True, float8_gather=True)
        self.output.weight = self.embedding.weight


def gather_a_tied_weight(folder: Path) -> None:
    model: Any = fully_shard(Tied(), mesh=init_device_mesh("cpu", (2,)))
    use_float8_gathers(model)
    model.unshard()
    assert type(model.output.weight) is nn.Parameter
    assert model.output.weight is model.embedding.weight


def test_a_weight_that_is_a_table_too_stays_in_high_precision(tmp_path: Path) -> None:
    on_ranks(2, gather_a_tied_weight, tmp_path)


def test_one_process_is_as_without(tmp_path: Path) -> None:
    done = command("train", *BASE, GATHER, "--training.steps=1", "--job.dump_folder", str(tmp_path))
    assert done.exit_code == 0, done.err
