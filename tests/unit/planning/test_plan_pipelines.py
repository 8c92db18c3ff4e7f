"""What a plan knows of pipelines: split backward passes, hidden states, gathers, accumulation."""

from __future__ import annotations

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.models import gemma3, llama3
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.plan import Plan
from torchtitan.planning.records import PassTrace, StageTrace
from torchtitan.planning.trace import trace_step
from torchtitan.runtime.fake_world import fake_world

SEQ, DIM = 64, 256  # of the debug model


def job(schedule: str, *options: str) -> JobConfig:
    return load_config(
        [
            "--model.flavor=debugmodel",
            f"--training.seq_len={SEQ}",
            "--training.local_batch_size=4",
            "--activation_checkpoint.mode=none",
            "--parallelism.pipeline_parallel_degree=2",
            f"--parallelism.pipeline_parallel_schedule={schedule}",
            *options,
        ]
    )


def stage(number: int, *options: str) -> StageTrace:
    """A stage under ZBVZeroBubble, which splits backward passes."""
    with fake_world(2, rank=0):
        return trace_step(job("ZBVZeroBubble", *options), stage=number)


def planned(schedule: str, *options: str, world_size: int = 2) -> Plan:
    return plan_run(job(schedule, *options), world_size, DEVICES["h100"])


def flops(part: PassTrace) -> float:
    return sum(calls * operation.flops for operation, calls in part.operations.items())


@pytest.mark.parametrize("number", [1, 3])
def test_each_part_of_a_backward_pass_has_its_work_and_keeps_gradients_for_the_next(
    number: int,
) -> None:
    found = stage(number)
    assert flops(found.inputs) + flops(found.weights) == flops(found.backward)
    assert flops(found.weights) == pytest.approx(flops(found.backward) / 2, rel=0.1)
    assert 1.2 * found.activations < found.kept_for_weights < 2 * found.activations


def test_the_first_stage_has_no_gradients_of_inputs() -> None:
    found = stage(0)
    assert not found.inputs.operations and found.weights == found.backward
    assert found.kept_for_weights == found.activations


@pytest.mark.parametrize(
    "options",
    [
        ("--activation_checkpoint.mode=full",),
        pytest.param(
            ("--compile.enable", "--loss.name=chunked_cross_entropy"),  # which allows only one pass
            marks=pytest.mark.long,
        ),
    ],
    ids=["checkpointed", "compiled"],
)
def test_the_backward_pass_of_a_checkpointed_or_compiled_stage_is_not_split(
    options: tuple[str, ...],
) -> None:
    found = stage(3, *options)
    assert not found.inputs.operations and not found.weights.operations
    plan = planned("ZBVZeroBubble", *options)
    actions = [action for spans in plan.timeline.spans.values() for action, _, _ in spans]
    assert {action.kind for action in actions} == {"F", "B", "R"}


@pytest.mark.parametrize(("shards", "size"), [(1, 4), (2, 2)])
def test_hidden_states_have_the_dtype_of_the_run(shards: int, size: int) -> None:
    """Autocast leaves the residual stream in float32; FSDP's policy makes it bfloat16."""
    plan = planned(
        "1F1B", f"--parallelism.data_parallel_shard_degree={shards}", world_size=2 * shards
    )
    bytes_of_states = SEQ * DIM * size
    sent = [traffic for traffic in plan.ranks[1].traffic if traffic.kind == "send"]
    assert [traffic.sent for traffic in sent] == [4 * bytes_of_states]
    # Inputs and their gradients on the second rank, gradients of outputs on the first.
    buffers = [rank.memory.pipeline_buffers for rank in plan.ranks]
    assert buffers == [4 * bytes_of_states, 8 * bytes_of_states]


def test_a_stage_may_have_no_layers() -> None:
    points = ("--parallelism.pipeline_parallel_split_points", "norm")
    first, last = planned("1F1B", *points).ranks
    assert last.memory.parameters < first.memory.parameters


def test_gpipe_is_fullest_before_there_are_gradients() -> None:
    """Its last stage is, when all micro-batches wait for the first backward pass."""
    long = "--training.seq_len=2048"
    assert planned("GPipe", long).ranks[1].memory.gradients == 0
    assert planned("1F1B", long).ranks[1].memory.gradients > 0


def test_parameters_that_the_backward_pass_gathers_count_once() -> None:
    wide = ("--training.seq_len=8", "--parallelism.data_parallel_shard_degree=2")
    peaks = [
        planned("1F1B", *wide, f"--parallelism.fsdp_reshard_after_forward={policy}", world_size=4)
        for policy in ("always", "never")
    ]
    assert peaks[0].peak == pytest.approx(peaks[1].peak, rel=0.01)


def test_gradients_of_the_run_before_are_held_in_shards() -> None:
    once, twice = (
        planned("1F1B", f"--training.global_batch_size={batch}", world_size=4).ranks[0].memory
        for batch in (8, 16)
    )
    assert once.gradients == 0
    assert twice.gradients == pytest.approx(once.parameters)


def test_stages_that_are_gathered_again_move_more() -> None:
    """PyTorch keeps three of a rank's stages gathered."""
    llama3.MODEL_CONFIGS["eight_layers"] = llama3.Llama3ModelArgs(
        dim=DIM, n_layers=8, n_heads=8, ffn_dim=512, vocab_size=512
    )

    def gathered(per_rank: int) -> float:
        plan = planned(
            "Interleaved1F1B",
            f"--parallelism.pipeline_parallel_stages_per_rank={per_rank}",
            "--training.local_batch_size=8",
            "--model.flavor=eight_layers",
            world_size=4,
        )
        return sum(t.sent for t in plan.ranks[0].traffic if t.kind == "all_gather")

    assert gathered(4) > 2 * gathered(2)


@pytest.mark.parametrize(("schedule", "partners"), [("1F1B", 1), ("DualPipeV", 0)])
def test_copies_of_a_weight_exchange_their_gradients(schedule: str, partners: int) -> None:
    """Of a V, the first and the last stage are on one rank."""
    of_model = ("--model.name=gemma3", "--training.mixed_precision_param=float32")
    (sent,) = [
        traffic
        for traffic in planned(schedule, *of_model).ranks[0].traffic
        if traffic.kind == "send"
    ]
    args = gemma3.MODEL_CONFIGS["debugmodel"]
    hidden = 4 * SEQ * args.dim * 4  # of all micro-batches
    boundaries = {"1F1B": 1, "DualPipeV": 2}[schedule]
    exchanged = partners * args.vocab_size * args.dim * 4
    assert sent.sent == boundaries * hidden + exchanged
