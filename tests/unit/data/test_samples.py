"""The loader of samples; tests/unit/models/flux/test_flux_data.py has one of a model."""

from __future__ import annotations

import logging

import pytest
import torch

from torchtitan.components.data_loader import check_dataloader, has_own_loader
from torchtitan.config import JobConfig, load_config
from torchtitan.data.samples import SampleLoader
from torchtitan.errors import DataError
from torchtitan.models import MODEL_REGISTRY


def job(*options: str) -> JobConfig:
    return load_config(
        ["--training.local_batch_size=2", "--training.global_batch_size=4", *options]
    )


def make(row: int, random: torch.Generator) -> dict[str, torch.Tensor]:
    drawn = torch.rand(1, generator=random)
    return {"tokens": torch.tensor([float(row)]), "labels": drawn}


def batches(loader: SampleLoader, number: int) -> list[list[float]]:
    found = [
        torch.cat(list(next(loader).values()), dim=1).flatten().tolist() for _ in range(number)
    ]
    loader.close()
    return found


def test_samples_depend_on_seed_step_and_row_alone():
    rows = list(range(7))
    one = batches(SampleLoader(rows, make, job(), 0, 1), 6)
    two = [batches(SampleLoader(rows, make, job(), rank, 2), 3) for rank in range(2)]
    assert one[0::2] == two[0] and one[1::2] == two[1]
    assert one != batches(SampleLoader(rows, make, job("--debug.seed=1"), 0, 1), 6)
    drawn = [number for batch in one for number in batch[1::2]]
    assert len(set(drawn)) == len(drawn)  # noise is new in the second epoch
    order = [number for batch in one for number in batch[0::2]]
    assert sorted(order[:7]) == rows and order[:5] != order[7:]


def test_it_resumes_after_whole_steps_on_other_ranks_with_the_order_of_its_run(caplog):
    rows = list(range(7))
    loader = SampleLoader(rows, make, job(), 0, 1)
    check_dataloader(loader, job("--checkpoint.enable"))
    batches(loader, 4)
    state = loader.state_dict()
    expected = batches(loader, 2)
    again = [SampleLoader(rows, make, job("--debug.seed=1"), rank, 2) for rank in range(2)]
    for rank, share in enumerate(again):
        next(share)  # from here on, it reads ahead
        share.load_state_dict(state | {"rows": state["rows"][2 * rank : 2 * rank + 2]})
    assert [batches(share, 1)[0] for share in again] == expected
    alone = SampleLoader(rows, make, job("--debug.seed=1"), 0, 1)  # in two passes a step
    alone.load_state_dict(state)
    assert batches(alone, 2) == expected
    with caplog.at_level(logging.WARNING, "torchtitan"):
        SampleLoader([*rows, 7], make, job(), 0, 1).load_state_dict(state)
    assert "8 rows, but 7 when the checkpoint was saved" in caplog.text


def test_the_batches_of_a_run_may_grow():
    """Each step takes the next samples, also after a resume on other ranks within the ramp."""
    ramp = ["--training.local_batch_size=1", "--training.batch_size_ramp=2:3"]
    size, rows = "--training.global_batch_size=6", list(range(50))
    whole = batches(SampleLoader(rows, make, job(*ramp, size), 0, 1), 3 * 2 + 2 * 6)
    fixed = batches(SampleLoader(rows, make, job(size), 0, 1), 3 * 3)
    assert sorted(number for batch in fixed for number in batch) == sorted(
        number for batch in whole for number in batch
    )
    loaders = [SampleLoader(rows, make, job(*ramp, size), rank, 2) for rank in range(2)]
    found = [batches(loader, 2) for loader in loaders]
    assert [found[0][0], found[1][0], found[0][1], found[1][1]] == whole[:4]
    state = {"rows": torch.cat([loader.state_dict()["rows"] for loader in loaders])}
    assert state["rows"].tolist() == [[0, 1], [1, 1], [2, 0], [3, 1], [4, 1], [5, 0]]
    alone = SampleLoader(rows, make, job(*ramp, size), 0, 1)
    alone.load_state_dict(state)
    assert alone.metrics() == {"data_epoch": 4 / 50}
    assert batches(alone, 14) == whole[4:]


def test_a_row_that_cannot_be_made_is_named_and_no_rows_are_refused():
    def fail(row: int, random: torch.Generator) -> dict[str, torch.Tensor]:
        raise DataError("it is upside down")

    loader = SampleLoader([0], fail, job(), 0, 1, name="training.dataset = 'parquet'")
    with pytest.raises(DataError, match=r"^training.dataset = 'parquet': row 0 .*: it is upside"):
        next(loader)
    with pytest.raises(DataError, match="it has no rows"):
        SampleLoader([], make, job(), 0, 1)


def test_a_loader_in_a_models_folder_is_its_own():
    own = {
        name: has_own_loader(MODEL_REGISTRY[name]("debugmodel").build_dataloader_fn)
        for name in ("flux", "llama3")
    }
    assert own == {"flux": True, "llama3": False}
