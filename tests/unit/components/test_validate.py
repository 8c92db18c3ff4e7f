from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from torchtitan.components.loss import IGNORE_INDEX, cross_entropy
from torchtitan.components.tokenizer import BytesTokenizer
from torchtitan.components.validate import (
    TextValidator,
    build_validator,
    check_validator,
    evaluating,
)
from torchtitan.components.validator import sum_over_data
from torchtitan.config import JobConfig
from torchtitan.config.data import DataSource
from torchtitan.data import best_fit, build_validation_dataloader
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError, DataError

STEPS, BATCH, SEQ_LEN = 5, 2, 16


@pytest.fixture(autouse=True)
def world_of_one():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    for number in range(23):
        (tmp_path / f"{number:02d}.txt").write_text(f"document {number} " * (number % 4 + 1))
    config = JobConfig()
    config.validation.dataset, config.validation.dataset_path = "text", str(tmp_path)
    config.validation.steps, config.validation.local_batch_size = STEPS, BATCH
    config.validation.seq_len = SEQ_LEN
    return config


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Embedding(258, 258)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits(tokens)


def validator(config: JobConfig) -> TextValidator:
    dims = ParallelDims(world_size=1)
    return build_validator(config, BytesTokenizer(), cross_entropy, dims, 0, 1)


def evaluate_with(model: nn.Module):
    return lambda batch: cross_entropy(model(batch["tokens"]), batch["labels"])


def test_it_is_the_mean_loss_per_token_of_the_validation_batches(config: JobConfig) -> None:
    config.training.document_mask = True  # so that batches have different numbers of valid tokens
    model = Bigram()
    loader = build_validation_dataloader(config, BytesTokenizer(), 0, 1)
    batches = [next(loader) for _ in range(STEPS)]
    assert len({int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches}) > 1
    tokens, labels = (torch.cat([batch[key] for batch in batches]) for key in ("tokens", "labels"))
    expected = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).item()
    assert validator(config).validate([model], evaluate_with(model)) == pytest.approx(expected)


def test_a_loss_counts_its_labels_as_in_training(config: JobConfig) -> None:
    class OfLetters:
        def count_labels(self, labels: torch.Tensor) -> torch.Tensor:
            return (labels >= ord("a")).sum()

        def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return cross_entropy(pred, labels.where(labels >= ord("a"), IGNORE_INDEX))

    model, loss = Bigram(), OfLetters()
    loader = build_validation_dataloader(config, BytesTokenizer(), 0, 1)
    batches = [next(loader) for _ in range(STEPS)]
    tokens, labels = (torch.cat([batch[key] for batch in batches]) for key in ("tokens", "labels"))
    expected = loss(model(tokens), labels) / loss.count_labels(labels)
    own = build_validator(config, BytesTokenizer(), loss, ParallelDims(world_size=1), 0, 1)
    found = own.validate([model], lambda batch: loss(model(batch["tokens"]), batch["labels"]))
    assert found == pytest.approx(expected.item())


def test_data_without_labels_are_named(config: JobConfig, caplog: pytest.LogCaptureFixture) -> None:
    class OfNothing:
        def count_labels(self, labels: torch.Tensor) -> torch.Tensor:
            return torch.zeros((), dtype=torch.int64)

        def __call__(self, pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return pred.new_zeros(())

    for sources, whose in (
        [[], ""],
        [[DataSource("", "text", config.validation.dataset_path)], " of text"],
    ):
        config.validation.sources = sources
        own = build_validator(
            config, BytesTokenizer(), OfNothing(), ParallelDims(world_size=1), 0, 1
        )
        assert math.isnan(own.validate([], lambda batch: torch.tensor(0.0)))
        assert f"validation: no label counts{whose}, so the loss is NaN" in caplog.messages


def test_tokens_of_many_batches_are_counted_exactly() -> None:
    odd = 2**24 + 1  # not a number of float32
    counting: Any = SimpleNamespace(_count=lambda labels: torch.tensor(odd))
    batches = iter([{"labels": torch.zeros(1)}] * 2)
    loss, tokens = TextValidator._summed(counting, batches, lambda batch: torch.tensor(1.0))
    assert (loss.item(), tokens) == (2, 2 * odd)


def test_each_source_has_a_loss_of_its_own(config: JobConfig, tmp_path: Path) -> None:
    other = tmp_path.with_name("other.jsonl")
    other.write_text("\n".join(json.dumps({"code": f"{i}" * 30}) for i in range(9)))
    alone = []
    for name, path, key in [("text", tmp_path, "text"), ("jsonl", other, "code")]:
        config.validation.dataset, config.validation.dataset_path = name, str(path)
        config.validation.text_key = key
        one, model = validator(config), Bigram()
        alone.append(one.validate([model], evaluate_with(model)))
        assert one.metrics() == {}
    config.validation.sources = [
        DataSource("", "text", str(tmp_path)),
        DataSource("digits", "jsonl", str(other), text_key="code", weight=3.0),
    ]
    both = validator(config)
    mean = both.validate([model], evaluate_with(model))
    assert both.metrics() == {"loss/text": alone[0], "loss/digits": alone[1]}
    assert abs(alone[0] - alone[1]) > 0.01
    assert mean == pytest.approx((alone[0] + 3 * alone[1]) / 4)

    config.validation.sources[1].weight = 0.0  # only watched: its loss may be NaN, without labels
    watched, evaluate = validator(config), evaluate_with(model)

    def evaluate_digits_to_nan(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        digits = (batch["tokens"] < 58).all()
        return evaluate(batch) * (float("nan") if digits else 1.0)

    assert watched.validate([model], evaluate_digits_to_nan) == alone[0]
    assert math.isnan(watched.metrics()["loss/digits"])
    both.close()
    watched.close()

    other.write_text("{")
    with pytest.raises(DataError, match=r"^validation\.sources: 'digits': .*other\.jsonl"):
        validator(config)


@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_it_evaluates_the_same_sequences_each_time(config: JobConfig, packing: str) -> None:
    config.data.packing = packing
    model, seen = Bigram(), []

    def evaluate(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(batch["tokens"])
        return evaluate_with(model)(batch)

    one = validator(config)
    assert one.validate([model], evaluate) == one.validate([model], evaluate)
    assert len(seen) == 2 * STEPS
    assert one._loaders[0]._prefetcher is None  # nothing is read ahead meanwhile
    assert all(map(torch.equal, seen[:STEPS], seen[STEPS:]))
    assert not all(map(torch.equal, seen[:STEPS], seen[1:]))


@pytest.mark.parametrize("most", [2**28, 10])
def test_best_fit_packs_for_the_first_validation_alone(
    config: JobConfig, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """As each of its sequences costs a pool of documents; but not where memory is short."""
    monkeypatch.setattr("torchtitan.components.validate._MOST_KEPT", most)
    packed = []
    pack = best_fit.best_fit
    monkeypatch.setattr(best_fit, "best_fit", lambda *args: packed.append(1) or pack(*args))
    config.data.packing = "best_fit"
    model, one = Bigram(), validator(config)
    first = one.validate([model], evaluate_with(model))
    once = len(packed)
    assert one.validate([model], evaluate_with(model)) == first
    assert once > 0 and (len(packed) == once) == (most > 10)


def test_the_sequences_do_not_depend_on_the_seed(config: JobConfig) -> None:
    rows = []
    for seed in (42, 7):
        config.debug.seed = seed
        loader = build_validation_dataloader(config, BytesTokenizer(), 0, 1)
        rows.append(torch.cat([next(loader)["tokens"] for _ in range(STEPS)]))
        loader.close()
    assert torch.equal(*rows)


def test_the_model_evaluates_meanwhile_and_trains_afterwards() -> None:
    part, resharded = nn.Sequential(nn.Dropout(0.5)), []
    sharded: Any = SimpleNamespace(reshard=lambda: resharded.append(part.training))
    with evaluating([part], [sharded]):
        assert not any(module.training for module in part.modules()) and resharded == []
    assert all(module.training for module in part.modules()) and resharded == [True]


def test_a_validator_that_lacks_something_is_told_at_once(config: JobConfig) -> None:
    config.model.name = "mine"
    with pytest.raises(ConfigError, match="mine returns object, which has no validate, cl"):
        check_validator(object(), None, config)


def test_a_model_with_a_loader_of_its_own_may_want_another_validation(
    config: JobConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config.model.name = "mine"
    check_validator(
        validator(config), build_validation_dataloader(config, BytesTokenizer(), 0, 1), config
    )
    assert not caplog.records
    check_validator(validator(config), object(), config)
    assert "mine is trained on the batches of its own build_dataloader_fn" in caplog.text


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_the_ranks_share_the_same_sequences(config: JobConfig, ranks: int) -> None:
    tokenizer = BytesTokenizer()
    one = build_validation_dataloader(config, tokenizer, 0, 1)
    expected = [next(one) for _ in range(STEPS)]
    shares, passes = [], set()
    for rank in range(ranks):
        loader = build_validation_dataloader(config, tokenizer, rank, ranks)
        passes.add(loader.gradient_accumulation_steps)
        shares += [next(loader) for _ in range(loader.gradient_accumulation_steps)]
        loader.close()
    assert passes == {-(-STEPS // ranks)}  # all ranks run the model equally often
    for key in ("tokens", "labels"):
        rows = torch.cat([batch[key] for batch in shares])
        assert torch.equal(rows[: STEPS * BATCH], torch.cat([batch[key] for batch in expected]))
    beyond = torch.cat([batch["labels"] for batch in shares])[STEPS * BATCH :]
    assert (beyond == IGNORE_INDEX).all()


def test_a_missing_dataset_is_named(config: JobConfig) -> None:
    config.validation.dataset_path += "/nowhere"
    with pytest.raises(DataError, match=r"validation\.dataset = 'text'.*nowhere"):
        validator(config)


def test_the_field_of_the_text_is_that_of_training_unless_it_is_named(
    config: JobConfig, tmp_path: Path
) -> None:
    (tmp_path / "lines.jsonl").write_text('{"content": "one", "other": "two"}\n')
    config.validation.dataset = "jsonl"
    config.validation.dataset_path = f"{tmp_path}/lines.jsonl"
    with pytest.raises(DataError, match="text_key = 'text': no such field"):
        validator(config)
    config.training.text_key = "content"
    first = build_validation_dataloader(config, BytesTokenizer(), 0, 1)
    assert bytes(next(first)["tokens"][0, :3].tolist()) == b"one"
    config.validation.text_key = "other"
    second = build_validation_dataloader(config, BytesTokenizer(), 0, 1)
    assert bytes(next(second)["tokens"][0, :3].tolist()) == b"two"
    first.close()
    second.close()


@pytest.mark.parametrize("local_batch_size", [2, 3])
def test_what_is_unset_is_that_of_training_but_the_sequences_are_not(
    config: JobConfig, local_batch_size: int
) -> None:
    """Else runs whose layouts have other batches would be measured on other sequences."""
    config.validation.seq_len = config.validation.local_batch_size = None
    config.training.seq_len, config.training.local_batch_size = SEQ_LEN, local_batch_size
    batches: list[torch.Tensor] = []

    def evaluate(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batches.append(batch["labels"])
        return torch.zeros(())

    validator(config).validate([], evaluate)
    assert {tuple(labels.shape) for labels in batches} == {(local_batch_size, SEQ_LEN)}
    rows = torch.cat(batches)
    assert (rows >= 0).any(1).sum() == 8 * STEPS
    config.validation.local_batch_size = 8
    batches.clear()
    validator(config).validate([], evaluate)
    assert torch.equal(torch.cat(batches), rows[: 8 * STEPS])


def test_losses_and_labels_of_ranks_that_share_data_count_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ranks share the labels of sequences of which they have parts, but not the losses."""
    monkeypatch.setattr(dist, "all_reduce", lambda sums, *_, **__: sums.mul_(16))
    dims: Any = SimpleNamespace(loss_copies=2, non_data_parallel_size=8)
    own = torch.tensor([[3.0, 5.0], [1.0, 2.0]], dtype=torch.float64)
    assert sum_over_data(own, dims).tolist() == [[24.0, 10.0], [8.0, 4.0]]
    assert own[0].tolist() == [3.0, 5.0]
