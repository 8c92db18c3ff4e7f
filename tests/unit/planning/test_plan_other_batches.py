"""Plans of models whose batches are no texts, or whose stages hand on more than hidden states."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_own_batches as own
import torch

from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.launching.command import check_job
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.planning.command import main as plan_command
from torchtitan.planning.devices import DEVICES
from torchtitan.planning.estimate import plan_run
from torchtitan.planning.inputs import Inputs, micro_batch
from torchtitan.planning.search import search
from torchtitan.planning.trace import trace_step
from torchtitan.protocols.train_spec import MODEL_REGISTRY
from torchtitan.runtime.fake_world import fake_world

PP2 = "--parallelism.pipeline_parallel_degree=2"
TP2 = "--parallelism.tensor_parallel_degree=2"
CP2 = "--parallelism.context_parallel_degree=2"


def job(name: str, *options: str) -> JobConfig:
    return load_config(
        [
            *(f"--model.name={name}", "--model.flavor=debugmodel", "--training.seq_len=16"),
            *("--training.local_batch_size=2", "--activation_checkpoint.mode=none", *options),
        ]
    )


@pytest.mark.parametrize("options", [(), (PP2,), (PP2, TP2)], ids=["fsdp", "pp", "pp_tp"])
@pytest.mark.parametrize("name", ["tuple_diffusion", "tiny_codes"])
def test_any_batch_can_be_planned(name: str, options: tuple[str, ...]) -> None:
    plan = plan_run(job(name, *options), 4 if TP2 in options else 2, DEVICES["h100"])
    assert plan.peak > 0 and plan.step_seconds > 0


def test_a_plan_needs_no_data_of_a_model_that_has_some_of_its_own() -> None:
    root = Path(__file__).parents[3]
    file = root / "torchtitan/models/flux/train_configs/flux_dev.toml"
    inputs = Inputs.of(load_config(["--job.config_file", str(file)]))
    assert inputs.rows is not None
    assert {name: list(row.shape) for name, row in inputs.rows.items()} == {
        **{"tokens": [4096, 64], "labels": [4096, 64], "text": [512, 4096], "pooled": [768]},
        **{name: [] for name in ("times", "widths", "guidance")},
    }
    assert "dataset_path = './data/train': there is no such file" in inputs.describe({})


def test_a_plan_of_later_tokens_needs_no_data_and_no_tokenizer() -> None:
    """Not even a name of the hub is looked up."""
    root = Path(__file__).parents[3] / "torchtitan/models/deepseek_v3/train_configs"
    options = ["--job.config_file", str(root / "deepseek_v3_671b.toml"), "--model.args.mtp_depth=1"]
    inputs = Inputs.of(load_config(options))
    assert inputs.rows is not None
    shapes = {name: list(row.shape) for name, row in inputs.rows.items()}
    assert shapes == {"tokens": [4096], "labels": [4096, 2], "next_tokens": [4096, 1]}


def test_a_rank_has_a_part_of_the_inputs_that_are_sequences() -> None:
    config = job("flux", CP2)
    config.parallelism.data_parallel_shard_degree = 1
    with fake_world(2, rank=0):
        dims = ParallelDims.from_config(config.parallelism, 2)
        batch = micro_batch(config, dims, Inputs.of(config))
    shapes = {name: list(tensor.shape[1:]) for name, tensor in batch.items()}
    expected = {"tokens": [8, 64], "labels": [8, 64], "text": [4, 64], "pooled": [32]}
    assert shapes == expected | {"times": [], "widths": []}
    assert plan_run(config, 2, DEVICES["h100"]).step_seconds > 0


def test_what_a_stage_hands_on_is_sent() -> None:
    """In float32, as autocast leaves sums: 16 hidden states of 32, and of a tuple a condition."""
    sent = {}
    for name in ("tuple_diffusion", "tiny_codes"):
        config = job(name, PP2, TP2)
        with fake_world(4, rank=0):
            inputs = Inputs.of(config)
            first, second = (trace_step(config, stage=stage, inputs=inputs) for stage in (0, 1))
        assert first.hidden_out == second.hidden_in
        sent[name] = first.hidden_out
    assert sent == {"tuple_diffusion": 4 * (16 * 32 + 32), "tiny_codes": 4 * 16 * 32}


@pytest.mark.long
def test_a_search_asks_the_loader_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(job_config, tokenizer, *ranks):
        built.append(ranks)
        return own.Loader(own.masked_codes, job_config, tokenizer, *ranks)

    spec = replace(own.codes(), build_dataloader_fn=build)
    monkeypatch.setitem(MODEL_REGISTRY, "tiny_codes", lambda flavor: spec)
    config = job("tiny_codes", "--training.global_batch_size=2")
    assert search(config, 2, DEVICES["h100"]).best is not None
    assert built == [(0, 1)]


def broken(job_config, tokenizer, dp_rank, dp_world_size):
    raise FileNotFoundError("latents.bin")


def test_a_loader_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(own.diffusion(), build_dataloader_fn=broken)
    monkeypatch.setitem(MODEL_REGISTRY, "tuple_diffusion", lambda flavor: spec)
    wanted = r"model\.name.*shapes of a batch of the data loader.*FileNotFoundError: latents\.bin"
    with pytest.raises(ConfigError, match=wanted):
        plan_run(job("tuple_diffusion"), 2, DEVICES["h100"])


def test_token_ids_that_are_none_of_its_inputs_are_one_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a vocabulary, so ids are worth trying where the loader does not tell."""
    spec = replace(own.codes(), build_dataloader_fn=broken)
    monkeypatch.setitem(MODEL_REGISTRY, "tiny_codes", lambda flavor: spec)
    wanted = (
        r"the plan's input, tokens int64 \[2, 16\].*latents\.bin.*the model tiny_codes fails: "
        r".*\.py:\d+\)"
    )
    with pytest.raises(ConfigError, match=wanted):
        plan_run(job("tiny_codes"), 2, DEVICES["h100"])


class BooksOfOtherLengths(own.Codes):
    def forward(self, tokens):
        return super().forward(tokens) + self.layers["0"].wo.weight


def test_a_failing_model_is_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch logs a traceback of its own, too."""
    spec = replace(own.codes(), model_cls=BooksOfOtherLengths)
    monkeypatch.setitem(MODEL_REGISTRY, "tiny_codes", lambda flavor: spec)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    (tmp_path / "job.toml").write_text('model.name = "tiny_codes"')
    wanted = rf"tokens int64 \[.*the model tiny_codes fails: RuntimeError: .*{__name__}\.py:\d+\)"
    with pytest.raises(ConfigError, match=wanted):
        plan_command([str(tmp_path / "job.toml"), "--world-size", "1"])
    assert not caplog.records


def test_the_trainers_rules_of_batches_hold() -> None:
    with pytest.raises(ConfigError, match=r"labels of shape \[2, 16, 16\].*begin with \[2, 32\]"):
        plan_run(job("tuple_diffusion", "--training.seq_len=32"), 2, DEVICES["h100"])
    with pytest.raises(ConfigError, match="takes no positions"):
        plan_run(job("tiny_codes", CP2), 2, DEVICES["h100"])


class Weighted(Llama3Model):
    def forward(self, tokens, *, weight, positions=None, document_ids=None):
        assert len(weight) == len(tokens)
        return super().forward(tokens, positions, document_ids)


def test_a_rank_of_a_sequence_has_its_part_of_a_batch_of_the_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which it would attend to otherwise as if there were twice as many tokens."""

    def row(job_config, generator):
        tokens = torch.zeros(job_config.training.seq_len, dtype=torch.int64)
        return {"tokens": tokens, "labels": tokens, "weight": torch.tensor(1)}

    ours = MODEL_REGISTRY["llama3"]("debugmodel")
    loader = partial(own.Loader, row)
    spec = replace(ours, model_cls=Weighted, build_dataloader_fn=loader)
    monkeypatch.setitem(MODEL_REGISTRY, "weighted", lambda flavor: spec)
    whole, shared = (
        plan_run(job("weighted", *options), ranks, DEVICES["h100"]).peak
        for ranks, options in ((1, ()), (2, (CP2,)))
    )
    assert shared < whole


class PlacedCodes(own.Codes):
    """Of images, whose codes have a place in two dimensions."""

    seen: ClassVar[set[tuple[int, ...]]] = set()

    def forward(self, tokens, *, positions=None, document_ids=None):
        self.seen.add(tuple(positions.shape))
        return super().forward(tokens)


def placed_codes(monkeypatch: pytest.MonkeyPatch, *extra: str) -> None:
    """`tiny_codes`, whose loader gives these too, positions as rows and columns."""

    def rows(job_config, generator):
        row = own.masked_codes(job_config, generator)
        return row | {name: row["tokens"][:, :2] for name in extra}

    spec = replace(
        own.codes(), model_cls=PlacedCodes, build_dataloader_fn=partial(own.Loader, rows)
    )
    monkeypatch.setitem(MODEL_REGISTRY, "tiny_codes", lambda flavor: spec)


def test_positions_are_those_of_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    placed_codes(monkeypatch, "positions", "document_ids")
    PlacedCodes.seen.clear()
    plan_run(job("tiny_codes", "--training.document_mask"), 2, DEVICES["h100"])
    assert PlacedCodes.seen == {(2, 16, 2)}


def test_positions_that_the_trainer_refuses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    placed_codes(monkeypatch, "positions")
    with pytest.raises(ConfigError, match=r"of tiny_codes: a batch .* 'positions' without 'doc"):
        plan_run(job("tiny_codes"), 2, DEVICES["h100"])


def test_a_document_mask_that_forward_does_not_take_is_refused_before_a_job_is_sent() -> None:
    with pytest.raises(ConfigError, match=r"document_mask.*takes no document_ids"):
        check_job(job("tiny_codes", "--training.document_mask"), nodes=1, processes=2)


def test_a_model_without_args_has_them_for_its_checkpoints() -> None:
    spec = own.codes()
    assert spec.meta_model().args == spec.model_args
    assert all(parameter.is_meta for parameter in spec.meta_model().parameters())


def test_a_model_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = own.codes()
    bare = replace(spec, model_args=replace(spec.model_args, n_layers=0))
    monkeypatch.setitem(MODEL_REGISTRY, "tiny_codes", lambda flavor: bare)
    with pytest.raises(ConfigError, match=r"tiny_codes.*`layers` is empty"):
        plan_run(job("tiny_codes"), 2, DEVICES["h100"])
