"""Which part of the reference a rank's tensor is held against, and how a difference is told."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from torchtitan.authoring.verify.check import CheckFailedError
from torchtitan.authoring.verify.compare import (
    Difference,
    RankPart,
    compare_outputs,
    compare_tensors,
)
from torchtitan.authoring.verify.reference import BATCH, Recording
from torchtitan.authoring.verify.verdict import (
    Comparison,
    compare_runs,
    judge,
    largest_relative,
    limits,
)
from torchtitan.config import load_config
from torchtitan.runtime.fake_world import fake_world

SEQ, HEADS, DIM = 16, 4, 6


def rank_part(dp: int = 1, dp_rank: int = 0, tp: int = 1, tp_rank: int = 0) -> RankPart:
    mesh = {"tp": SimpleNamespace(get_local_rank=lambda: tp_rank)}
    dims = SimpleNamespace(dp=dp, tp=tp, tp_enabled=tp > 1, world_mesh=mesh)
    config = SimpleNamespace(training=SimpleNamespace(seq_len=SEQ))
    return RankPart(
        SimpleNamespace(parallel_dims=dims, job_config=config, dp_rank=dp_rank, cp_mesh=None)
    )


def difference(part: RankPart, local: torch.Tensor, whole: torch.Tensor) -> Difference | None:
    found, compared, _ = compare_outputs({"m": [local]}, {"m": [whole]}, part, 1e-4)
    assert compared == 1
    return found[0] if found else None


def test_plain_tensors_are_matched_by_batch_sequence_heads_and_features() -> None:
    part = rank_part(dp=2, dp_rank=1, tp=2, tp_rank=1)
    hidden, heads = torch.randn(BATCH, SEQ, DIM), torch.randn(BATCH, HEADS, SEQ, DIM)
    assert difference(part, hidden[4:], hidden) is None
    assert difference(part, hidden[4:, 8:], hidden) is None
    assert difference(part, hidden[4:, :, 3:], hidden) is None
    assert difference(part, heads[4:, 2:], heads) is None


def test_a_difference_names_the_part_of_the_whole_tensor() -> None:
    whole = torch.randn(BATCH, SEQ, DIM)
    local = whole[4:, 8:].clone()
    local[1, 2:4] += 1
    found = difference(rank_part(dp=2, dp_rank=1, tp=2, tp_rank=1), local, whole)
    assert found is not None
    assert found.where == "sequences 5, tokens 10-11"
    assert found.relative > 0.1


def test_micro_batches_are_joined_and_what_has_another_shape_is_left_out() -> None:
    part, whole = rank_part(), torch.randn(BATCH, SEQ, DIM)
    rows = torch.randn(BATCH * SEQ, DIM)
    found, compared, left_out = compare_outputs(
        {"a": list(whole.split(2)), "b": [rows]}, {"a": [whole], "b": [rows]}, part, 1e-4
    )
    assert (found, compared, left_out) == ([], 1, 1)


def test_tensors_that_should_be_zero_are_held_against_the_floor() -> None:
    reference = {"bias": torch.full((4,), 1e-9)}
    noise = {"bias": torch.full((4,), -1e-9)}
    assert compare_tensors(noise, reference, 1e-3)[0]
    assert not compare_tensors(noise, reference, 1e-3, floor=1e-3)[0]
    assert compare_tensors({"bias": torch.full((4,), float("nan"))}, reference, 1e-3, 1e-3)[0]


def test_the_floor_is_a_root_mean_square() -> None:
    found, largest = compare_tensors(
        {"bias": torch.full((100,), 2e-6)}, {"bias": torch.zeros(100)}, 1e-3, floor=1e-3
    )
    assert largest == pytest.approx(2e-3) and len(found) == 1


def test_a_shard_is_held_against_its_part_and_the_norm_of_the_whole() -> None:
    whole = torch.tensor([30.0, 40.0, 1.0, 2.0])
    with fake_world(2, rank=1):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
        shard = DTensor.from_local(torch.tensor([1.0, 7.0]), mesh, [Shard(0)])
        (found,), largest = compare_tensors({"w": shard}, {"w": whole}, 1e-3)
    assert largest == found.relative == pytest.approx(5 / float(whole.norm()))
    assert found.where == "the shard fsdp 1 of 2"


def test_what_has_no_relative_error() -> None:
    counts, others = torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert compare_tensors({"n": counts}, {"n": counts}, 1e-3)[1] == 0
    assert compare_tensors({"n": counts}, {"n": others}, 1e-3)[1] == math.inf
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert compare_tensors({"w": zeros}, {"w": zeros}, 1e-3)[1] == 0
    assert compare_tensors({"w": ones}, {"w": zeros}, 1e-3)[1] == math.inf
    both = {"a": ones * math.nan, "b": ones}
    for order in ("ab", "ba"):
        assert math.isnan(compare_tensors(both, dict.fromkeys(order, ones), 1e-3)[1])


def test_a_tensor_of_zeros_and_one_of_another_shape_are_told() -> None:
    reference = {"a": torch.ones(4), "b": torch.ones(4)}
    found, largest = compare_tensors({"a": torch.zeros(4), "b": torch.ones(2)}, reference, 1e-3)
    assert [str(d) for d in found] == ["it is 0", "its shape is [2], not [4]"]
    assert largest == float("inf")


NAMES = {"layers.0.w.weight", "layers.1.w.weight"}
ORDER = ["layers.0.w", "layers.0", "layers.1.w", "layers.1", ""]
REFERENCE = Recording(outputs={name: [] for name in ORDER}, weights=dict.fromkeys(NAMES))


def comparison(**fields: object) -> Comparison:
    errors = dict.fromkeys(limits().that_decide, 0.0) | fields.pop("errors", {})
    return Comparison(**{"names": NAMES, "errors": errors} | fields)


def judged(*found: Comparison) -> CheckFailedError:
    config = load_config(["--activation_checkpoint.mode=full"])
    with pytest.raises(CheckFailedError) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.get_world_size", lambda: 2)
        judge(list(found), REFERENCE, config)
    return error.value


def test_a_run_is_compared_in_all_that_it_records() -> None:
    """A parameter without a gradient has one of 0, wherever the reference has another."""
    mesh = {"tp": SimpleNamespace(get_local_rank=lambda: 0)}
    trainer = SimpleNamespace(
        parallel_dims=SimpleNamespace(dp=1, tp=1, tp_enabled=False, world_mesh=mesh),
        job_config=SimpleNamespace(training=SimpleNamespace(seq_len=SEQ)),
        dp_rank=0,
        cp_mesh=None,
        model_parts=[torch.nn.Linear(2, 2)],
    )
    values = {name: torch.ones(2) for name in ("weight", "bias")}
    reference = Recording([2.0, 1.0], [4.0, 2.0], values, gradients=values, weights=values)
    same = Recording(**vars(reference))
    assert compare_runs(trainer, same, reference).errors == dict.fromkeys(limits().that_decide, 0.0)
    other = Recording(
        [2.0, 0.5],
        [3.0, 2.0],
        values,
        gradients={"weight": values["weight"]},
        weights=values | {"bias": torch.full((2,), 1.1)},
    )
    found = compare_runs(trainer, other, reference)
    assert found.errors == {
        "loss": 0.5,
        "gradient norm": 0.25,
        "gradient": 1.0,
        "weight": pytest.approx(0.1),
    }
    assert found.first_loss_error == 0.0
    assert [d.name for d in (*found.gradients, *found.weights)] == ["bias", "bias"]


@pytest.mark.parametrize("of_rank", [0, 1])
def test_a_number_that_is_none_is_wrong_on_any_rank(of_rank: int) -> None:
    found = [comparison(), comparison()]
    found[of_rank].errors["loss"] = math.nan
    assert "loss by nan" in judged(*found).problem


def test_a_loss_of_0_is_held_against_the_largest() -> None:
    assert largest_relative([2.0, 0.0], [2.0, 0.0]) == 0
    assert largest_relative([2.0, 0.5], [2.0, 0.0]) == 0.25
    assert largest_relative([0.0, 0.5], [0.0, 0.0]) == 0.5


def test_other_initial_values_are_told_first() -> None:
    found = comparison(
        errors={"loss": 1.0},
        initial=[Difference("layers.0.w.weight", 0.5)],
        outputs=[Difference("layers.0.w", 0.5)],
    )
    assert "initial value of layers.0.w.weight differs" in judged(found).problem


def test_the_first_output_and_the_last_gradient_are_named() -> None:
    outputs = [Difference("layers.1.w", 0.5, "tokens 3"), Difference("layers.0", 0.1)]
    first = comparison(errors={"loss": 0.1}, outputs=outputs)
    assert "output differs is layers.0: by 0.1 of its norm (rank 0)" in judged(first).problem
    gradients = [Difference("layers.0.w.weight", 0.5), Difference("layers.1.w.weight", 0.2)]
    second = comparison(gradients=gradients, errors={"gradient": 0.5})
    assert (
        "gradient differs is layers.1.w.weight: by 0.2 of its norm (rank 1)"
        in judged(comparison(), second).problem
    )


def test_names_of_all_ranks_together_must_be_those_of_one_process() -> None:
    error = judged(comparison(names={"layers.0.w.weight", "layers.1.inner.w.weight"}))
    assert "no rank has layers.1.w.weight; there is layers.1.inner.w.weight" in error.problem


def test_a_buffer_that_differs_is_no_matter_of_the_optimizer() -> None:
    weights = [Difference("layers.1.w.weight", 0.2)]
    found = comparison(weights=weights, errors={"weight": 0.2})
    assert "the weight layers.1.w.weight differs at the end" in judged(found).problem
    assert "optimizer" in judged(found).hint
    found.buffers = {"layers.1.w.weight"}
    assert "the buffer layers.1.w.weight differs at the end" in judged(found).problem
    assert "State that is not trained" in judged(found).hint
