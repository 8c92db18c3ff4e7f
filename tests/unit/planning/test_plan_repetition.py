"""Which layers repeat, and that a trace of a few gives that of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

import torchtitan.models  # noqa: F401
from torchtitan.config import JobConfig, load_config
from torchtitan.models.flux import MODEL_CONFIGS as FLUX
from torchtitan.planning import estimate, trace
from torchtitan.planning.collectives import Collective
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.extrapolate import extrapolate
from torchtitan.planning.inputs import TOKEN_IDS
from torchtitan.planning.memory import Memory
from torchtitan.planning.records import StageTrace
from torchtitan.planning.repetition import (
    Repetition,
    layer_signatures,
    leave_out_layers,
    repetitions,
)
from torchtitan.planning.roofline import Roofline
from torchtitan.protocols.model_converter import MODEL_CONVERTERS
from torchtitan.protocols.train_spec import get_train_spec


def model(name: str, flavor: str) -> torch.nn.Module:
    spec = get_train_spec(name, flavor)
    with torch.device("meta"):
        return spec.model_cls(spec.model_args)


def test_equal_layers_repeat_one_by_one() -> None:
    assert repetitions(model("llama3", "8B"), 8192) == [Repetition(0, 1, 32)]


def test_dense_layers_before_experts_are_apart() -> None:
    assert repetitions(model("deepseek_v3", "16B"), 8192) == [Repetition(1, 1, 26)]


def test_windows_that_alternate_have_their_period() -> None:
    assert repetitions(model("gemma3", "27B"), 8192) == [Repetition(2, 6, 10)]


def test_a_period_is_a_multiple_of_what_is_asked() -> None:
    assert repetitions(model("llama3", "8B"), 8192, multiple=3) == [Repetition(2, 3, 10)]


class Numbered(torch.nn.Module):
    """Calls its layers by number, so it cannot do with fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({str(i): torch.nn.Linear(4, 4) for i in range(12)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = tokens[..., None].expand(-1, -1, 4)
        for i in range(12):
            h = self.layers[str(i)](h)
        return h


def test_layers_that_cannot_be_left_out_do_not_repeat() -> None:
    numbered = Numbered()
    assert repetitions(numbered, 16) == []
    assert list(numbered.layers) == [str(i) for i in range(12)]


class Stacks(torch.nn.Module):
    """`first` layers, then 20 of another kind."""

    def __init__(self, first: int) -> None:
        super().__init__()
        kinds = [torch.nn.Tanh] * first + [torch.nn.GELU] * 20
        self.layers = torch.nn.ModuleDict({str(i): kind() for i, kind in enumerate(kinds)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            tokens = layer(tokens)
        return tokens


def test_each_of_two_stacks_repeats() -> None:
    stacks = Stacks(16)
    found = repetitions(stacks, 16)
    assert found == [Repetition(0, 1, 16), Repetition(16, 1, 20)]
    leave_out_layers(stacks, found, longer=found[1])
    assert list(map(int, stacks.layers)) == [0, 1, 2, 3, 16, 17, 18, 19, 20]


def test_a_short_stack_is_traced_as_a_whole() -> None:
    assert repetitions(Stacks(5), 16) == [Repetition(5, 1, 20)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--activation_checkpoint.mode=none"], id="fsdp"),
        pytest.param(
            ["--activation_checkpoint.mode=full", "--training.global_batch_size=16"],
            id="accumulation",
            marks=pytest.mark.long,
        ),
        pytest.param(
            [
                "--parallelism.pipeline_parallel_degree=2",
                "--parallelism.tensor_parallel_degree=2",
                "--activation_checkpoint.selective_ac_option=2",
            ],
            id="pipeline",
            marks=pytest.mark.long,
        ),
    ],
)
def test_extrapolated_and_whole_traces_agree(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--model.flavor=8B", "--model.args.n_layers=16", "--training.seq_len=1024", *options]
    assert_equal_to_whole(load_config([*options, "--training.local_batch_size=2"]), monkeypatch)


def assert_equal_to_whole(config: JobConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    short = plan_run(config, 8, DEVICES["h100"])
    for module in (estimate, trace):
        monkeypatch.setattr(module, "repetitions_of", lambda *args: [])
    whole = plan_run(config, 8, DEVICES["h100"])
    assert short.step_seconds == pytest.approx(whole.step_seconds, rel=1e-3)
    for a, b in zip(short.ranks, whole.ranks, strict=True):
        assert a.peak == pytest.approx(b.peak, rel=0.01)
        assert sent(a.traffic) == pytest.approx(sent(b.traffic), rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["--parallelism.pipeline_parallel_degree=2"]])
def test_extrapolated_and_whole_traces_of_two_stacks_agree(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = replace(FLUX["debugmodel"], n_double_layers=14, n_single_layers=16)
    monkeypatch.setitem(FLUX, "deep", deep)
    options = ["--model.name=flux", "--model.flavor=deep", "--training.seq_len=64", *options]
    options += ["--training.local_batch_size=2"]
    assert_equal_to_whole(load_config(options), monkeypatch)


def sent(traffic: list) -> dict[tuple[str, str], float]:
    return {(t.group, t.kind): t.sent for t in traffic if t.sent > 1e6}


def test_stacks_are_extrapolated_by_themselves() -> None:
    """Of 3 and 2 bytes a layer, freed by the backward pass of its layers."""

    def traced(*stacks: int) -> StageTrace:
        sizes = [3.0] * stacks[0] + [2.0] * stacks[1]
        held = [sum(sizes[:n]) for n in range(len(sizes), 0, -1)]
        moments = [Memory(activations=size) for size in held]
        return StageTrace(10 + sum(sizes), activations=held[0], moments=moments)

    found = [Repetition(0, 1, 19), Repetition(19, 1, 38)]
    whole = extrapolate([traced(4, 4), traced(5, 4), traced(4, 5)], found)
    assert whole.parameters == 10 + whole.activations == 10 + 3 * 19 + 2 * 38
    ends_of_stacks = [whole.moments[n].total for n in (0, 3, 4, 7)]
    assert ends_of_stacks == [3 * 19 + 2 * 38, 3 * 19 + 2, 3 * 19, 3]


def test_the_total_is_right_where_shares_are_not() -> None:
    """The fullest moments of the traces may be at different places in a layer."""
    few, more = Memory(activations=10), Memory(activations=5, temporary=7)
    traces = [StageTrace(between=few), StageTrace(between=more)]
    assert extrapolate(traces, [Repetition(0, 1, 10)]).between.total == 10 + 6 * 2


def test_frozen_layers_are_not_like_others() -> None:
    frozen = model("llama3", "8B")
    for number in range(8):
        frozen.layers[str(number)].requires_grad_(False)
    of_layers = layer_signatures(frozen, 8192, TOKEN_IDS)
    assert of_layers[0] == of_layers[7] != of_layers[8] == of_layers[31]


def test_counts_below_zero_add_up() -> None:
    """An optimizer's one call is on all parameters: the smaller trace's is taken back."""
    few, more = Collective("send", "g", 2, 100), Collective("send", "g", 2, 150)
    counts: Mapping[Collective, float] = {few: -3.0, more: 4.0}
    (traffic,) = Roofline(DEVICES["h100"], 8, False).traffic(counts, {"g": [0, 1]})
    assert traffic.sent == 300 and traffic.calls == 1


class FreezesTwoLayers:
    """A converter."""

    def __init__(self, *args: object) -> None: ...

    def convert(self, model: torch.nn.Module) -> None:
        for layer in list(model.layers.values())[:2]:
            layer.requires_grad_(False)

    def post_optimizer_hook(self, model_parts: object) -> None: ...


def test_layers_are_equal_if_they_are_after_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_CONVERTERS, "freezes", FreezesTwoLayers)
    options = ["--activation_checkpoint.mode=none", "--training.local_batch_size=1"]
    options += ["--training.seq_len=64", "--model.converters=freezes", "--model.flavor=8B"]
    (rank,) = plan_run(load_config(options), 8, DEVICES["h100"]).ranks
    layers = [sum(p.numel() for p in x.parameters()) for x in model("llama3", "8B").layers.values()]
    whole = get_train_spec("llama3", "8B").model_args.get_nparams_and_flops(1)[0]
    assert rank.memory.parameters == pytest.approx(4 * whole / 8, rel=1e-3)
    trained = whole - sum(layers[:2])
    assert rank.memory.optimizer_state == pytest.approx(8 * trained / 8, rel=1e-3)


def test_frozen_layers_of_a_pipeline_have_no_whole_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(MODEL_CONVERTERS, "freezes", FreezesTwoLayers)
    options = ["--model.converters=freezes", "--training.seq_len=64"]
    options += ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"]
    first, last = plan_run(load_config(options), 4, DEVICES["h100"]).ranks
    # Twice as many bytes each. Of the first rank, the embedding is trained.
    assert last.memory.whole_gradients == pytest.approx(2 * last.memory.whole_parameters, rel=0.01)
    assert first.memory.whole_gradients < first.memory.whole_parameters
