"""Who gets which layers, and which settings of the pipeline are refused."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import get_schedule_class

from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import modules_around_layers
from torchtitan.distributed.pipeline_split import (
    SCHEDULE_KINDS,
    CsvSchedule,
    assign_modules,
    balanced_cuts,
    schedule_splits_backward,
    split_model,
    splits_backward,
    stages_of_rank,
    stages_per_rank,
)
from torchtitan.errors import ConfigError
from torchtitan.models.deepseek_v3 import MODEL_CONFIGS as DEEPSEEK
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.models.flux import MODEL_CONFIGS as FLUX
from torchtitan.models.flux import FluxModel
from torchtitan.models.flux.infra.pipeline import pipeline_flux
from torchtitan.models.llama3 import MODEL_CONFIGS, Llama3Model
from torchtitan.preflight.validate import validate

FIRST, LAST = ("tok_embeddings",), ("norm", "output")


def job(pp: int = 2, **parallelism: object) -> JobConfig:
    config = JobConfig()
    config.parallelism.pipeline_parallel_degree = pp
    for key, value in parallelism.items():
        setattr(config.parallelism, f"pipeline_parallel_{key}", value)
    return config


def split(config: JobConfig, stages: list[int], model: nn.Module | None = None) -> list[nn.Module]:
    if model is None:
        with torch.device("meta"):
            model = Llama3Model(MODEL_CONFIGS["debugmodel"])
    return split_model(model, config, stages, FIRST, LAST)


@given(
    costs=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    data=st.data(),
)
def test_cuts_are_the_best_there_are(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def largest(cuts: tuple[int, ...] | list[int]) -> float:
        return max(sum(costs[a:b]) for a, b in pairwise([0, *cuts, len(costs)]))

    cuts = balanced_cuts([float(cost) for cost in costs], stages)
    assert cuts == sorted(set(cuts))
    assert len(cuts) == stages - 1
    best = min(largest(c) for c in combinations(range(1, len(costs)), stages - 1))
    assert largest(cuts) == best


def test_of_equal_cuts_the_first_stages_get_fewer() -> None:
    """They hold the activations of the most micro-batches."""
    assert balanced_cuts([1.0] * 10, 4) == [2, 4, 7]


def test_the_parts_together_are_the_model_and_names_do_not_change() -> None:
    with torch.device("meta"):
        model = Llama3Model(MODEL_CONFIGS["debugmodel"])
    parts = split(job(pp=4), [0, 1, 2, 3], model)
    names = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert parts[0].tok_embeddings is not None
    assert parts[0].output is None
    assert parts[3].tok_embeddings is None
    assert parts[3].output is not None


def test_an_expensive_output_layer_leaves_the_last_stage_fewer_layers() -> None:
    light = [len(p.layers) for p in split(job(output_weight=0.0), [0, 1])]
    heavy = [len(p.layers) for p in split(job(output_weight=20.0), [0, 1])]
    assert light == [2, 2]
    assert heavy == [3, 1]


def test_experts_cost_what_a_token_uses_of_them() -> None:
    """So a dense layer, which has far fewer parameters, counts like one of experts."""
    with torch.device("meta"):
        model = DeepSeekV3Model(DEEPSEEK["671B"])
    parts = split(job(pp=8), list(range(8)), model)
    assert [len(part.layers) for part in parts] == [7, 8, 8, 8, 8, 8, 8, 6]
    # The memory of 20 embeddings is that of 2 layers: their parameters count like those of experts.
    stages = assign_modules(model, job(pp=8, embedding_weight=20.0), FIRST, LAST)
    assert [sum("layers." in name for name in stage) for stage in stages] == [6, *[8] * 6, 7]


def test_weights_cost_the_share_of_the_tokens_that_use_them() -> None:
    """Double blocks have 2.4 times the parameters of single blocks, but the same work."""
    with torch.device("meta"):
        model = FluxModel(FLUX["flux-dev"])
    stages = assign_modules(model, job(pp=4), *modules_around_layers(pipeline_flux))
    assert [sum("layers." in name for name in stage) for stage in stages] == [14, 14, 15, 14]


def test_experts_may_have_a_router_of_their_own() -> None:
    with torch.device("meta"):
        model = DeepSeekV3Model(DEEPSEEK["671B"])
    for layer in list(model.layers.values())[3:]:
        layer.moe.router = nn.Linear(4, 4)
    parts = split(job(pp=8), list(range(8)), model)
    assert [len(part.layers) for part in parts] == [7, 8, 8, 8, 8, 8, 8, 6]


def test_stages_are_cut_where_the_user_says() -> None:
    config = job(split_points=["layers.1"])
    assert [list(p.layers) for p in split(config, [0, 1])] == [["0"], ["1", "2", "3"]]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (["layer.1"], r"'layer.1' is not a split point. Did you mean 'layers.1'"),
        (["tok_embeddings"], "'tok_embeddings' is not a split point"),
        (["layers.1", "layers.2"], "2 points make 3 stages, but .* is 2"),
    ],
)
def test_bad_split_points_are_named(points: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split(job(split_points=points), [0])
    for second in ("layers.1", "layers.2"):
        with pytest.raises(ConfigError, match="in the order of the model"):
            split(job(pp=3, split_points=["layers.2", second]), [0])


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 stages, but the model has only 4 layers"):
        split(job(pp=5), [0])


def test_a_weight_of_layers_in_two_stages_is_refused() -> None:
    with torch.device("meta"):
        model = Llama3Model(MODEL_CONFIGS["debugmodel"])
    model.layers["3"].attention.wo.weight = model.layers["0"].attention.wo.weight
    message = r"layers\.0\.attention\.wo\.weight and layers\.3\..* are one weight, .* 0 and 1"
    with pytest.raises(ConfigError, match=message):
        split(job(), [0, 1], model)


def test_another_name_of_a_weight_must_be_in_a_stage_too() -> None:
    with torch.device("meta"):
        model = Llama3Model(MODEL_CONFIGS["debugmodel"])
        model.lookup = nn.Linear(256, 264, bias=False)
    model.lookup.weight = model.tok_embeddings.weight
    with pytest.raises(ConfigError, match=r"the parameter 'lookup\.weight', which is in no layer"):
        split(job(), [0, 1], model)


def test_a_parameter_in_no_stage_is_refused() -> None:
    with torch.device("meta"):
        model = Llama3Model(MODEL_CONFIGS["debugmodel"])
        model.norm_scale = nn.Parameter(torch.empty(4))  # not of `norm`
    with pytest.raises(ConfigError, match="the parameter 'norm_scale', which is in no layer"):
        split(job(), [0], model)


@pytest.mark.parametrize("schedule", SCHEDULE_KINDS)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_every_stage_is_on_one_rank(schedule: str, pp: int) -> None:
    config = job(pp, schedule=schedule)
    stages = [stages_of_rank(config, rank) for rank in range(pp)]
    assert sorted(s for own in stages for s in own) == list(range(pp * stages_per_rank(config)))


def test_the_stages_of_a_v_come_back_in_reverse() -> None:
    assert [stages_of_rank(job(schedule="DualPipeV"), rank) for rank in (0, 1)] == [[0, 3], [1, 2]]
    looped = job(schedule="Interleaved1F1B", stages_per_rank=3)
    assert [stages_of_rank(looped, rank) for rank in (0, 1)] == [[0, 2, 4], [1, 3, 5]]


def torch_accepts(schedule: str, pp: int, per_rank: int, microbatches: int) -> bool:
    """Whether PyTorch can build the schedule, from stages that exist in name only."""
    config = job(pp, schedule=schedule, stages_per_rank=per_rank)
    stages = []
    for number in stages_of_rank(config, 0):
        stage = MagicMock(stage_index=number, num_stages=pp * per_rank, group_size=pp, group_rank=0)
        stages.append(stage)
    single = SCHEDULE_KINDS[schedule] == "single"
    try:
        get_schedule_class(schedule)(
            stages[0] if single else stages, n_microbatches=microbatches, loss_fn=lambda x, y: x
        )
    except ValueError:
        return False
    return True


@settings(deadline=None, max_examples=60)
@given(
    schedule=st.sampled_from(sorted(SCHEDULE_KINDS)),
    pp=st.integers(2, 4),
    microbatches=st.integers(1, 20),
)
def test_what_the_rules_accept_pytorch_builds(schedule: str, pp: int, microbatches: int) -> None:
    config = job(pp, schedule=schedule)
    config.training.local_batch_size = microbatches
    config.activation_checkpoint.mode = "none"
    try:
        validate(config, world_size=pp)
    except ConfigError as error:
        assert "micro-batches of 1" in str(error)
        return
    assert torch_accepts(schedule, pp, stages_per_rank(config), microbatches)


@pytest.mark.parametrize(
    ("schedule", "microbatches"),
    [("1F1B", 1), ("DualPipeV", 3), ("Interleaved1F1B", 5), ("InterleavedZeroBubble", 5)],
)
def test_what_pytorch_refuses_is_a_config_error(schedule: str, microbatches: int) -> None:
    config = job(2, schedule=schedule)
    config.training.local_batch_size = microbatches
    config.activation_checkpoint.mode = "none"
    assert not torch_accepts(schedule, 2, stages_per_rank(config), microbatches)
    with pytest.raises(ConfigError, match=r"training.local_batch_size .* micro-batches of 1"):
        validate(config, world_size=2)


def test_a_batch_of_no_whole_number_of_micro_batches_is_refused() -> None:
    config = job(2, microbatch_size=3)
    with pytest.raises(ConfigError, match=r"multiple of .*microbatch_size \(3\). Nearest: 6 or 9"):
        validate(config, world_size=2)


@pytest.mark.parametrize(("schedule", "per_rank"), [("1F1B", 2), ("ZBVZeroBubble", 3)])
def test_a_schedule_says_how_many_stages_it_needs(schedule: str, per_rank: int) -> None:
    config = job(2, schedule=schedule, stages_per_rank=per_rank)
    with pytest.raises(ConfigError, match=f"stages_per_rank = {per_rank}: {schedule} needs"):
        validate(config, world_size=2)


def test_the_chunked_loss_does_not_survive_two_backward_passes() -> None:
    config = job(2, schedule="DualPipeV")
    config.activation_checkpoint.mode = "none"
    config.loss.name = "chunked_cross_entropy"
    with pytest.raises(ConfigError, match=r"loss.name.*needs them twice"):
        validate(config, world_size=2)
    config.compile.enable = True
    validate(config, world_size=2)
    config.compile.enable = False
    config.parallelism.pipeline_parallel_schedule = "1F1B"
    validate(config, world_size=2)


def test_parameters_stay_whole_between_two_backward_passes() -> None:
    """Else PyTorch leaves their gradients out: llama3 had 0.7 of its gradient norm."""
    config = job(2, schedule="ZBVZeroBubble")
    config.activation_checkpoint.mode = "none"
    validate(config, world_size=4)
    config.parallelism.fsdp_reshard_after_forward = "always"
    with pytest.raises(
        ConfigError, match=r"fsdp_reshard_after_forward.*would lose weight gradients"
    ):
        validate(config, world_size=4)
    config.parallelism.pipeline_parallel_schedule = "Interleaved1F1B"
    validate(config, world_size=4)


def test_zero_bubble_needs_blocks_that_are_compiled_one_by_one() -> None:
    """PyTorch's own error came after the ranks had joined, and named no option."""
    config = job(2, schedule="ZBVZeroBubble")
    config.compile.enable, config.compile.scope = True, "model"
    with pytest.raises(ConfigError, match=r"compile\.scope.*does not run ZBVZeroBubble"):
        validate(config, world_size=2)
    config.compile.scope = "block"
    validate(config, world_size=2)
    config.compile.scope = "model"
    config.parallelism.pipeline_parallel_schedule = "Interleaved1F1B"
    validate(config, world_size=2)


CSV = "0F0,0F1,,0B0,0B1,3F0,3F1\n\n1F0,1F1,2F0,2F1,1I0,1W0\n"


def test_a_csv_says_who_has_which_stages(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(CSV)
    config = job(schedule_csv=str(path))
    schedule = CsvSchedule.read(config)
    assert schedule == CsvSchedule([[0, 3], [1, 2]], microbatches=2, splits_backward=True)
    assert stages_per_rank(config) == 2 and stages_of_rank(config, 1) == [1, 2]


def test_backward_passes_are_split_where_the_schedule_and_the_blocks_allow_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(CSV)
    split, whole = job(schedule="DualPipeV"), job(schedule="1F1B")
    split_csv, whole_csv = job(schedule_csv=str(path)), job(schedule="DualPipeV")
    whole_csv.parallelism.pipeline_parallel_schedule_csv = str(tmp_path / "whole.csv")
    (tmp_path / "whole.csv").write_text("0F0,0B0\n1F0,1B0\n")
    alone = job(1, schedule="DualPipeV")
    configs = split, split_csv, whole, whole_csv, alone
    assert [schedule_splits_backward(each) for each in configs] == [True, True, False, False, False]
    split.activation_checkpoint.mode = "none"
    assert splits_backward(split)
    split.activation_checkpoint.mode = "full"
    assert not splits_backward(split)
    split.activation_checkpoint.mode, split.compile.enable = "none", True
    assert not splits_backward(split)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has 0 rows"),
        ("0F0\n", "has 1 rows"),
        ("0F0\n0B0\n", "each stage from 0 on in exactly one of them"),
        ("0F0\nhello\n", "each stage from 0 on"),
        ("0F0,1F0,\n2F0\n", "every rank must have the same number of stages"),
    ],
)
def test_a_bad_csv_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"schedule_csv.*{message}"):
        CsvSchedule.read(job(schedule_csv=str(path)))


def test_a_missing_csv_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        validate(job(schedule_csv="/nowhere.csv"), world_size=2)


def test_a_csv_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    path.write_bytes(b"\xff\xfe0\x00")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8' codec"):
        CsvSchedule.read(job(schedule_csv=str(path)))


class Patched(nn.Module):
    """Much before its layers: a parameter of its own, and modules that are used together."""

    def __init__(self, sizes: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.empty(sizes[0]))
        self.encoder, self.enc_norm = nn.Linear(sizes[1], 1), nn.Linear(sizes[2], 1)
        self.layers = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(4)})


BEFORE = ("pos", "encoder", "enc_norm")


@given(sizes=st.tuples(*[st.integers(1, 400)] * 3), pp=st.integers(1, 4))
def test_what_is_before_the_layers_stays_together(sizes: tuple[int, int, int], pp: int) -> None:
    with torch.device("meta"):
        model = Patched(sizes)
    assert assign_modules(model, job(pp), BEFORE, ())[0][:3] == list(BEFORE)


def test_a_stage_has_a_layer_also_if_nothing_is_before_them() -> None:
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": nn.Linear(8, 8), "1": nn.Identity()})
    assert assign_modules(model, job(), (), ()) == [["layers.0"], ["layers.1"]]


def test_a_split_point_may_be_before_the_layers() -> None:
    with torch.device("meta"):
        model = Patched()
    stages = assign_modules(model, job(split_points=["enc_norm"]), BEFORE, ())
    assert stages[0] == ["pos", "encoder"]


def test_a_parameter_may_be_named_as_modules_are() -> None:
    with torch.device("meta"):
        model = Patched()
    first, last = split_model(model, job(), [0, 1], BEFORE, ("norm", "output"))
    assert isinstance(first.pos, nn.Parameter)
    assert last.pos is None
    names = [name for part in (first, last) for name, _ in part.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
