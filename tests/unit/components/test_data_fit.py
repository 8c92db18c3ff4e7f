"""Rows or data of a checkpoint that are not those of the loader: what a message knows of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.components.checkpoint import data_fit
from torchtitan.config import JobConfig
from torchtitan.config.data import DataSource
from torchtitan.data import build_dataloader
from torchtitan.errors import CheckpointError


def check(monkeypatch: pytest.MonkeyPatch, build: Any, saved: list[int], rows: list[int]) -> None:
    """On one data rank."""
    config = JobConfig()
    config.model.name = "mine"
    spec = SimpleNamespace(build_dataloader_fn=build)
    monkeypatch.setattr(data_fit, "train_spec_of", lambda job_config: spec)
    entry = SimpleNamespace(size=torch.Size(saved))
    checkpoint: Any = SimpleNamespace(
        folder="step-2",
        config={},
        metadata=SimpleNamespace(state_dict_metadata={"dataloader.rows": entry}),
        manifest=SimpleNamespace(model={}, data={}, step=2),
    )
    data_fit.SavedPosition(checkpoint, config, torch.zeros(rows), 1, {})


def position_of(was: dict[str, Any], now: dict[str, Any], names: list[str]) -> Any:
    """Resume from a checkpoint with the data `was` in a run with the sources `names`."""
    config = JobConfig()
    config.training.dataset = "text"
    config.data.sources = [DataSource(dataset=name) for name in names]
    of_run = [{"dataset": source["name"]} for source in was["sources"] if source["name"]]
    checkpoint: Any = SimpleNamespace(
        folder="step-2",
        config={"training": {"dataset": "text"}, "data": {"sources": of_run}},
        metadata=SimpleNamespace(state_dict_metadata={}),
        manifest=SimpleNamespace(model={}, data=was, step=2),
    )
    return data_fit.SavedPosition(checkpoint, config, torch.zeros(1, 1), 1, now)


@pytest.mark.parametrize("rows", [[1, 1], [2, 3]])
def test_of_an_own_loader_the_rows_are_told_and_no_batch_size(monkeypatch, rows):
    with pytest.raises(CheckpointError) as error:
        check(monkeypatch, lambda *args: None, [2, 1], rows)
    message = str(error.value)
    assert message.startswith("step-2 has loader states with rows of shape [2, 1] over all")
    assert f"the loaders of build_dataloader_fn of mine now have {rows}" in message
    assert "a global batch of 2" not in message and "data.sources" not in message
    assert 'checkpoint.exclude_from_loading = ["dataloader"]' in message


def test_of_the_librarys_loader_the_keys_are_named(monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"training\.global_batch_size is 1 now\. Set it to 2"
    ):
        check(monkeypatch, build_dataloader, [2, 1], [1, 1])
    with pytest.raises(CheckpointError, match=r"another data\.packing"):
        check(monkeypatch, build_dataloader, [2, 1], [2, 3])


def test_rows_that_are_as_many_fit(monkeypatch):
    check(monkeypatch, lambda *args: None, [2, 1], [2, 1])


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"documents": 4, "sample": 1}, None),
        ({"documents": 5, "sample": 2}, "training.dataset had 4 documents, now 5"),
        ({"documents": 4, "sample": 2}, "training.dataset has as many documents as before, but"),
        ({"documents": 4}, None),
    ],
)
def test_other_documents_are_told_also_if_they_are_as_many(caplog, now, said):
    was = {"sources": [{"name": "", "documents": 4, "sample": 1}]}
    current = {"sources": [{"name": "", **now}]}
    position_of(was, current, [])
    assert (said in caplog.text) if said else not caplog.records


def test_sources_that_come_and_go_are_told(caplog):
    known = {name: {"name": name, "documents": n} for n, name in enumerate("abc")}
    was, now = ["a", "b"], ["c", "b"]
    saved, current = ({"sources": [known[name] for name in names]} for names in (was, now))
    assert position_of(saved, current, now).description["described"] == current
    assert data_fit.align_sources({}, current, was, now) == {}
    [warning] = [record.getMessage() for record in caplog.records]
    assert 'New, from their first document: ["c"]. Gone, with their position: ["a"]' in warning


@pytest.mark.parametrize(
    ("saved", "sources", "names"),
    [
        ({"training": {"dataset": "text"}}, [], (["jsonl"], ["jsonl"])),
        ({"training": {"dataset": "text"}}, ["a", "text"], (["text"], ["a", "text"])),
        ({"data": {"sources": [{"dataset": "a"}]}}, ["b"], (["a"], ["b"])),
        ({"data": {"sources": [{"dataset": "a"}]}}, [], (["a"], ["jsonl"])),
        ({}, ["b"], (["b"], ["b"])),
    ],
)
def test_the_names_of_sources(saved, sources, names):
    config = JobConfig()
    config.training.dataset = "jsonl"
    config.data.sources = [DataSource(dataset=name) for name in sources]
    assert data_fit.sources_before_and_now(saved, config, own_loader=False) == names
