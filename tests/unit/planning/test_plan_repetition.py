"""Which layers repeat, and that a trace of a few gives that of all."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import torchtitan.models  # noqa: F401
from torchtitan.config import load_config
from torchtitan.planning.collectives import Collective
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.repetition import Repetition, keep_layers
from torchtitan.planning.roofline import Roofline
from torchtitan.protocols.model_converter import MODEL_CONVERTERS
from torchtitan.protocols.train_spec import get_train_spec


def model(name: str, flavor: str) -> torch.nn.Module:
    spec = get_train_spec(name, flavor)
    with torch.device("meta"):
        return spec.model_cls(spec.model_args)


def test_equal_layers_repeat_one_by_one() -> None:
    assert Repetition.of(model("llama3", "8B"), 8192) == Repetition(0, 1, 32)


def test_dense_layers_before_experts_are_apart() -> None:
    repetition = Repetition.of(model("deepseek_v3", "16B"), 8192)
    assert repetition.first == 1 and repetition.period == 1


def test_windows_that_alternate_have_their_period() -> None:
    repetition = Repetition.of(model("gemma3", "27B"), 8192)
    assert repetition.period == 6
    assert repetition.first + repetition.period * repetition.repeats == 62


def test_a_period_is_a_multiple_of_what_is_asked() -> None:
    assert Repetition.of(model("llama3", "8B"), 8192, multiple=3) == Repetition(2, 3, 10)


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
    assert not Repetition.of(numbered, 16).worth_extrapolating
    assert list(numbered.layers) == [str(i) for i in range(12)]


def test_layers_are_kept_from_the_front() -> None:
    small = model("llama3", "debugmodel")
    keep_layers(small, 2)
    assert list(small.layers) == ["0", "1"]


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
    config = load_config(
        ["--model.flavor=8B", "--training.seq_len=1024", "--training.local_batch_size=2", *options]
    )
    short = plan_run(config, 8, DEVICES["h100"])
    monkeypatch.setattr(Repetition, "worth_extrapolating", False)
    whole = plan_run(config, 8, DEVICES["h100"])
    assert short.step_seconds == pytest.approx(whole.step_seconds, rel=1e-3)
    for a, b in zip(short.ranks, whole.ranks, strict=True):
        assert a.peak == pytest.approx(b.peak, rel=0.01)
        assert sent(a.traffic) == pytest.approx(sent(b.traffic), rel=1e-3)


def sent(traffic: list) -> dict[tuple[str, str], float]:
    return {(t.group, t.kind): t.sent for t in traffic if t.sent > 1e6}


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
