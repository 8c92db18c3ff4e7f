"""`torchtitan verify` tests pairs of texts with one label as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from two_towers import Model

from torchtitan.authoring.verify.catalog import all_checks, choose
from torchtitan.authoring.verify.check import CheckFailedError, NotApplicableError
from torchtitan.authoring.verify.observe import module_outputs
from torchtitan.authoring.verify.run import run_checks
from torchtitan.authoring.verify.subject import Subject
from torchtitan.config import load_config

CHECKS = {check.name: check for check in all_checks()}


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject("two_towers", "debugmodel", tmp_path, "two_towers")


def test_its_batches_are_those_of_its_loader_and_as_long_as_their_labels(subject):
    assert not subject.reads_text and subject.length == 1
    for name in ("contract.forward", "contract.dataloader", "learning.gradients"):
        CHECKS[name].run(subject)


def test_a_loss_that_compares_samples_says_so(subject, monkeypatch):
    with pytest.raises(NotApplicableError, match=r"Model\.compares_samples is True"):
        CHECKS["contract.loss"].run(subject)
    monkeypatch.setattr(Model, "compares_samples", False)
    with pytest.raises(CheckFailedError, match="the loss of two rows is ") as failed:
        CHECKS["contract.loss"].run(subject)
    assert failed.value.hint.endswith("docs/own_data.md, A loss of samples.")


def test_a_module_may_return_a_mask(subject, monkeypatch):
    class Masked(Model):
        def __init__(self, args):
            super().__init__(args)
            self.mask = nn.Threshold(0.5, -torch.inf)

        def forward(self, tokens, *, other):
            return super().forward(tokens, other=other) + self.mask(torch.zeros(2)).softmax(0)[0]

    CHECKS["numerics.finite"].run(subject)
    monkeypatch.setattr(subject.spec, "model_cls", Masked)
    with pytest.raises(CheckFailedError, match="not finite"):  # of a row without any key
        CHECKS["numerics.finite"].run(subject)
    monkeypatch.setattr(Masked, "forward", _forward_with_a_mask)
    CHECKS["numerics.finite"].run(subject)


def _forward_with_a_mask(self, tokens, *, other):
    return Model.forward(self, tokens, other=other) + self.mask(torch.arange(2.0)).softmax(0)[0]


@pytest.mark.parametrize(("scope", "seen"), [("block", {"layers.0", "others.0"}), ("model", {""})])
def test_what_is_inside_of_compiled_blocks_of_any_stack_is_not_observed(subject, scope, seen):
    job = load_config(["--compile.enable", f"--compile.scope={scope}"])
    model, example = subject.build().train(), subject.example(2)
    with module_outputs([model], job) as (outputs, _):
        example.run(model)
    assert seen <= outputs.keys() and "others.0.w1" not in outputs


@pytest.mark.long
def test_the_pages_loss_is_the_same_on_any_number_of_data_ranks(subject):
    only = choose(["layouts.fsdp2", "layouts.hsdp2x2", "layouts.accumulation"])
    outcomes = {o.check.name: o for o in run_checks(only, subject)}
    assert [f"{n}: {o.message}" for n, o in outcomes.items() if o.status == "fail"] == []
    assert outcomes["layouts.fsdp2"].status == outcomes["layouts.hsdp2x2"].status == "pass"
    assert "needs all samples of a step" in outcomes["layouts.accumulation"].message
