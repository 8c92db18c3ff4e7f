"""What keeps layouts from being compared, and what the checks beside them find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torchtitan.authoring.verify import layouts, reference
from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError
from torchtitan.authoring.verify.reference import Recording
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


def repeated(forward: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """Run the model as often as the check of the reference does."""
    subject: Any = SimpleNamespace(
        example=lambda rows: SimpleNamespace(tokens=torch.ones(rows, 8), inputs={}),
        own_batches=None,
    )
    return layouts._require_repeatable(SimpleNamespace(model_parts=[forward]), subject)


def test_a_forward_pass_that_cannot_be_repeated() -> None:
    assert repeated(lambda tokens: 2 * tokens) == ""
    assert "Dropout is disabled" in repeated(lambda tokens: F.dropout(tokens, 0.5))
    with pytest.raises(NotApplicableError, match="draws random numbers"):
        repeated(lambda tokens: tokens + torch.randn(()))
    calls: list[int] = []
    with pytest.raises(CheckFailedError, match=r"differ by 0\.5 of the logits' norm"):
        repeated(lambda tokens: tokens * (calls.append(1) or 1 + len(calls)))


def test_parameters_that_the_optimizer_leaves_out(tmp_path: Path) -> None:
    """One moved; one has a gradient too small for its size, and one has none."""
    subject: Any = SimpleNamespace(folder=tmp_path)
    values = {name: torch.ones(2) for name in ("moved", "rounded", "frozen", "kept")}
    gradients = {name: torch.ones(2) for name in ("moved", "kept")}
    run = Recording(
        initial=values,
        gradients=gradients | {"rounded": torch.full((2,), 1e-5)},
        weights=values | {"moved": torch.zeros(2)},
    )
    run.save(layouts.reference_path(subject))
    with pytest.raises(CheckFailedError, match=r"1 of 3 parameters .* unchanged: kept$"):
        layouts.every_parameter_is_updated(subject)
    run.weights["kept"] = torch.zeros(2)
    run.save(layouts.reference_path(subject))
    assert layouts.every_parameter_is_updated(subject) == "3 parameters"


def test_a_precision_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output of the model itself may be in another one."""
    subject: Any = None
    monkeypatch.setattr(layouts, "trainer_or_skip", lambda *of: None)
    wide, narrow = [torch.zeros(1)], [torch.zeros(1, dtype=torch.bfloat16)]
    outputs = {"layers.0": wide, "norm": wide, "": narrow}
    monkeypatch.setattr(layouts, "train", lambda *of, steps: Recording(outputs=outputs))
    with pytest.raises(CheckFailedError, match="no module gives bfloat16"):
        layouts.fsdp_computes_in_bfloat16(subject)
    outputs["layers.0"] = narrow
    assert layouts.fsdp_computes_in_bfloat16(subject) == "1 of 2 modules give bfloat16"


def test_checks_at_the_same_time_train_in_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A trainer refuses a folder in which another process trains."""
    monkeypatch.setattr(reference, "Trainer", lambda config: config)
    monkeypatch.setitem(MODEL_REGISTRY, "llama3", MODEL_REGISTRY["llama3"])  # the check replaces it
    subject = Subject("llama3", "debugmodel", tmp_path)

    def folder(port: str) -> str:
        monkeypatch.setenv("MASTER_PORT", port)
        config: Any = reference.build_trainer(subject, "--checkpoint.enable")
        return config.job.dump_folder

    assert len({folder("1"), folder("2"), str(tmp_path)}) == 3
