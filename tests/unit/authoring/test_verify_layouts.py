"""Which errors of a layout's first steps mean that the layout does not apply to the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.authoring.verify import layouts, reference
from torchtitan.authoring.verify.check import NotApplicableError
from torchtitan.authoring.verify.subject import Subject
from torchtitan.components.model_inputs import ModelInputs
from torchtitan.config import load_config
from torchtitan.errors import ConfigError
from torchtitan.models import MODEL_REGISTRY


class TakesPatches(torch.nn.Module):
    def forward(self, tokens: Any, patches: Any, positions: Any = None) -> None: ...


def refused(batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the check of a context-parallel layout whose first batch is refused."""
    config = load_config(["--training.local_batch_size=2", "--training.seq_len=8"])
    dims: Any = SimpleNamespace(cp=2, cp_enabled=True, pp_enabled=False)
    inputs = ModelInputs(TakesPatches(), dims, config)
    trainer = SimpleNamespace(model_parts=[], parallel_dims=dims)
    monkeypatch.setattr(layouts, "trainer_or_skip", lambda *of: trainer)
    monkeypatch.setattr(layouts.Recording, "load", lambda path: None)
    monkeypatch.setattr(layouts, "train", lambda trainer: inputs.checked(batch))
    subject: Any = SimpleNamespace(folder=Path("unused"))
    layouts.trains_like_one_device("cp2", subject)


def test_a_batch_that_context_parallelism_cannot_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "patches": torch.zeros(2, 3)}
    with pytest.raises(NotApplicableError, match=r"divides only tokens .* patches \[2, 3\]"):
        refused(batch, monkeypatch)


def test_another_mistake_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.raises(ConfigError, match="no 'patches', which forward"):
        refused({"tokens": tokens, "labels": tokens}, monkeypatch)


def test_checks_at_the_same_time_train_in_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trainer refuses a folder in which another process trains; checkpoints are shared."""
    monkeypatch.setattr(reference, "Trainer", lambda config: config)
    monkeypatch.setitem(MODEL_REGISTRY, "llama3", MODEL_REGISTRY["llama3"])  # the check replaces it
    subject = Subject("llama3", "debugmodel", tmp_path)

    def folder(port: str, *options: str) -> str:
        monkeypatch.setenv("MASTER_PORT", port)
        config: Any = reference.build_trainer(subject, *options)
        return config.job.dump_folder

    assert len({folder("1"), folder("2"), str(tmp_path)}) == 3
    assert folder("1", "--checkpoint.enable") == folder("2", "--checkpoint.enable") == str(tmp_path)
