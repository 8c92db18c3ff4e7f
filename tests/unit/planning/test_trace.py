"""Layouts of thousands of ranks build, shard and run a step, in one process."""

from __future__ import annotations

import math

import pytest
import torch.distributed as dist

import torchtitan.models  # noqa: F401
from torchtitan.config import load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.records import StageTrace
from torchtitan.planning.trace import trace_step
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.runtime.fake_world import fake_world

PREFIXES = {
    "pp": "pipeline_parallel_degree",
    "rep": "data_parallel_replicate_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
}


def trace(world_size: int, rank: int, flavor: str, *options: str, **degrees: int) -> StageTrace:
    argv = [f"--model.flavor={flavor}", "--activation_checkpoint.mode=none", *options]
    argv += [f"--parallelism.{PREFIXES[name]}={size}" for name, size in degrees.items()]
    config = load_config(argv)
    config.training.local_batch_size = max(1, degrees.get("pp", 1))
    with fake_world(world_size, rank):
        return trace_step(config)


def sent_by_group(stage: StageTrace) -> dict[tuple[str, str], tuple[float, float]]:
    """Return `(group, kind)` -> calls, and bytes sent, of a step with one micro-batch."""
    sent = {}
    for part in (stage.start, stage.forward, stage.backward, stage.finish, stage.optimizer):
        for collective, times in part.collectives.items():
            key = collective.group, collective.kind
            calls, total = sent.get(key, (0, 0.0))
            sent[key] = calls + times, total + times * collective.sent
    return sent


def nparams(flavor: str) -> int:
    args = get_train_spec("llama3", flavor).model_args
    return args.get_nparams_and_flops(1)[0]


def test_fsdp_moves_the_parameters_three_times_a_step() -> None:
    options = ["--parallelism.fsdp_reshard_after_forward=always", "--training.seq_len=64"]
    options += ["--training.mixed_precision_param=float32"]
    sent = sent_by_group(trace(8, 0, "debugmodel", *options))
    args = get_train_spec("llama3", "debugmodel").model_args
    once, embedding = (n * 4 * 7 / 8 for n in (nparams("debugmodel"), args.vocab_size * args.dim))
    # The root's group is never resharded: of the debug model it has no parameter. The backward pass
    # of the embedding needs no parameters.
    assert sent["fsdp", "all_gather"][1] == pytest.approx(2 * once - embedding, rel=1e-3)
    assert sent["fsdp", "reduce_scatter"][1] == pytest.approx(once, rel=1e-3)


def test_tensor_parallel_moves_the_hidden_states_eight_times_a_layer() -> None:
    """Four collectives forward and four backward: into and out of attention and feed-forward."""
    options = ["--training.seq_len=64", "--training.mixed_precision_param=float32"]
    sent = sent_by_group(trace(2, 0, "debugmodel", *options, tp=2))
    layers, hidden = 4, 64 * 256 * 4 / 2  # bytes of [seq, dim], of which a rank sends half
    for kind in ("all_gather", "reduce_scatter"):
        calls, total = sent["tp", kind]
        # Besides the layers, the embedding scatters and the output layer gathers.
        assert 4 * layers + 1 <= calls <= 4 * layers + 2
        assert total == pytest.approx(calls * hidden)


def test_every_group_has_a_name_where_experts_have_groups_of_their_own() -> None:
    """Replicas of experts, and of all else, are the same ranks in two groups."""
    options = ["--model.name=qwen3", "--training.seq_len=64"]
    options += ["--parallelism.expert_parallel_degree=2"]
    of_replicas = sent_by_group(trace(8, 0, "debugmodel_moe", *options, rep=2))
    names = {"fsdp", "dp_replicate", "expert_dp", "expert_dp_replicate", "ep"}
    assert {group for group, _ in of_replicas} == names
    dense, experts = (
        of_replicas[name, "all_reduce"][1] for name in ("dp_replicate", "expert_dp_replicate")
    )
    # Gradients in float32 of a rank's part, in the two ways that a ring sends them.
    parameters = get_train_spec("qwen3", "debugmodel_moe").model_args.get_nparams_and_flops(1)[0]
    assert dense + experts == pytest.approx(4 * parameters / 4, rel=0.01)
    with fake_world(16, 0):
        dims = ParallelDims(dp_replicate=2, pp=2, ep=2, world_size=16)
        ranks = {name: dist.get_process_group_ranks(g) for name, g in dims.groups().items()}
    assert ranks["dp_replicate"] == ranks["expert_dp_replicate"] == [0, 4]
    assert ranks["pp"] == ranks["expert_pp"] == [0, 8]


def test_micro_batches_after_the_first_add_to_the_gradients() -> None:
    """Shards are gathered and scattered for each, and replicas add up once a step."""
    once, thrice = (
        trace(
            4, 0, "debugmodel", "--training.seq_len=64", f"--training.global_batch_size={n}", rep=2
        )
        for n in (4, 12)
    )
    for part in ("forward", "backward"):
        of_shards = {c: n for c, n in getattr(once, part).collectives.items() if c.group == "fsdp"}
        assert of_shards and getattr(thrice, part).collectives == of_shards
    of_replicas = {c: n for c, n in once.backward.collectives.items() if c.group == "dp_replicate"}
    assert of_replicas and thrice.finish.collectives == of_replicas
    moved = [
        sum(operation.moved * calls for operation, calls in stage.backward.operations.items())
        for stage in (once, thrice)
    ]
    # The sum and the gradient are read and the sum is written, in float32.
    assert moved[1] - moved[0] == pytest.approx(3 * 4 * nparams("debugmodel") / 2, rel=0.05)


@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 1), ("full", 3)])
def test_checkpointing_per_op_sends_no_rows_to_experts_again(mode: str, again: int) -> None:
    options = [
        "--model.name=qwen3",
        "--training.seq_len=64",
        f"--activation_checkpoint.mode={mode}",
    ]
    options += ["--parallelism.expert_parallel_degree=2"]
    options += ["--activation_checkpoint.selective_ac_option=op"]
    sent = sent_by_group(trace(8, 0, "debugmodel_moe", *options, rep=2))
    layers = get_train_spec("qwen3", "debugmodel_moe").model_args.n_layers
    # How many rows there are, and these there and back, forward and backward.
    assert sent["ep", "all_to_all"][0] == layers * (5 + again)


def test_parallelisms_that_share_their_ranks_are_told_apart() -> None:
    """Only FSDP overlaps with computation. Its group here has the ranks of `ep`, and of `cp`."""
    options = ["--model.name=qwen3", "--training.seq_len=64"]
    options += ["--parallelism.expert_parallel_degree=8"]
    of_experts = sent_by_group(trace(8, 0, "debugmodel_moe", *options))
    assert {("ep", "all_to_all"), ("fsdp", "all_gather")} <= of_experts.keys()
    assert ("fsdp", "all_to_all") not in of_experts
    sent = sent_by_group(trace(8, 0, "debugmodel", "--training.seq_len=64", cp=8))
    for kind in ("all_gather", "reduce_scatter"):
        assert {("fsdp", kind), ("cp", kind)} <= sent.keys()


def test_experts_in_float32_are_twice_the_bytes_and_as_many_flops() -> None:
    def products(dtype: str) -> tuple[int, ...]:
        options = ["--model.name=qwen3", "--training.seq_len=64"]
        options += [f"--training.mixed_precision_param={dtype}"]
        stage = trace(1, 0, "debugmodel_moe", *options)
        counted = {**stage.forward.operations, **stage.backward.operations}
        experts = {o: n for o, n in counted.items() if o.name == "aten::_grouped_mm"}
        assert experts
        return tuple(sum(n * getattr(o, f) for o, n in experts.items()) for f in ("flops", "moved"))

    (flops, moved), (flops_of_bfloat16, moved_of_bfloat16) = map(products, ("float32", "bfloat16"))
    assert flops == flops_of_bfloat16
    assert moved == pytest.approx(2 * moved_of_bfloat16, rel=0.01)


def test_a_ring_sends_keys_and_values_to_one_rank_at_a_time() -> None:
    options = ["--training.seq_len=64", "--training.mixed_precision_param=float32"]
    options += ["--parallelism.context_parallel_method=ring"]
    sent = sent_by_group(trace(4, 0, "debugmodel", *options, cp=4))
    args = get_train_spec("llama3", "debugmodel").model_args
    width = args.dim // args.n_heads * (args.n_kv_heads or args.n_heads)
    keys_and_values = 2 * 64 // 4 * width * 4  # bytes
    # Forward 3 times; backward 3 times, their gradients 4 times.
    assert sent["cp", "send"] == (10 * args.n_layers, 10 * args.n_layers * keys_and_values)
    assert ("cp", "all_to_all") not in sent


def test_a_rank_of_half_as_many_holds_twice_the_state() -> None:
    """Activations and gathered parameters are the same, so the difference is the state.

    Without gradients: memory is fullest where the backward pass begins, with the logits. (Of few
    tokens it is fullest at the embedding under torch 2.12, which keeps the last layer's whole
    gradients while it reduces the embedding's.)
    """
    config = load_config(
        [
            "--model.flavor=8B",
            "--activation_checkpoint.mode=none",
            "--training.seq_len=1024",
            "--training.local_batch_size=1",
            "--training.mixed_precision_param=float32",
        ]
    )
    few, many = (plan_run(config, world, DEVICES["h100"]).peak for world in (32, 64))
    state = 12 * nparams("8B")  # parameter and two moments, in float32
    assert few - many == pytest.approx(state / 32 - state / 64, rel=0.05)


LAYOUTS = {
    "70B_512_pp8_rep2_fsdp4_tp8": ("70B", 512, {"pp": 8, "rep": 2, "tp": 8}),
    "405B_4096_pp16_rep2_fsdp16_tp8": ("405B", 4096, {"pp": 16, "rep": 2, "tp": 8}),
}
RUNS = [(name, where) for name in LAYOUTS for where in ("first", "middle", "last")]
QUICK = [RUNS[2]]


@pytest.mark.parametrize(
    ("name", "where"),
    [pytest.param(*run, marks=[] if run in QUICK else [pytest.mark.long]) for run in RUNS],
)
def test_a_four_dimensional_layout_of_a_large_model_runs_a_step(name: str, where: str) -> None:
    flavor, world_size, degrees = LAYOUTS[name]
    rank = {"first": 0, "middle": world_size // 2 + 1, "last": world_size - 1}[where]
    options = ["--training.seq_len=8192", "--activation_checkpoint.mode=full"]
    result = trace(world_size, rank, flavor, *options, **degrees)
    # A rank of the stage has about its share of all parameters.
    share = nparams(flavor) / (world_size / degrees["rep"])
    held = result.gradients / 4  # in float32
    assert 0.5 * share < held < 1.5 * share
    sent = sent_by_group(result)
    assert {"fsdp", "tp", "dp_replicate"} <= {group for group, _ in sent}
    assert {collective.group for collective in result.start.collectives} == {"fsdp"}
    assert math.isclose(sent["dp_replicate", "all_reduce"][1], 2 * (1 / 2) * 4 * held, rel_tol=0.01)
