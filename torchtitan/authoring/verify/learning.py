"""The model learns: every parameter gets a gradient, and the loss falls."""

from __future__ import annotations

import json
import math
import re

import torch

from torchtitan.errors import ConfigError
from torchtitan.tools.text import few

from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .subject import Subject

CHECKS = Checks("contract.forward")

_STEPS = 100
_FALL = 0.5
"""Share of the first loss that is left after so many steps on one batch, at most."""
_OWN_FALL = 0.9
"""The same of a loader's or a loss of the author's, of which no more is known than that it can be
learned: noise that is to be told from data, for one, is learned slowly, and a loss may have a
floor."""
_DEAD = 1e-10
"""A largest gradient below this share of the model's largest is rounding, or none."""


@CHECKS.of("learning.gradients", "every parameter gets a gradient")
def every_parameter_gets_a_gradient(subject: Subject) -> str:
    """Over some steps, and enough tokens for every expert."""
    model = subject.build().train()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise CheckFailedError(
            f"{len(frozen)} parameters do not require gradients: {few(frozen, 5)}",
            "What is not trained is a buffer; what a user wants frozen is optimizer.rules.",
        )
    largest = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(3):  # weights that start at 0 hide others in the first step
        example = subject.example(8, 64, seed=step)
        optimizer.zero_grad()
        example.loss(example.run(model)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                largest[name] = max(largest[name], parameter.grad.abs().max().item())
        optimizer.step()
    limit = _DEAD * max(largest.values())
    dead = [name for name, value in largest.items() if value <= limit]
    if dead:
        experts = [name for name in dead if re.search(r"experts?\.\d+\.", name)]
        note = ""
        if len(experts) == len(dead):
            note = " Of 1,536 tokens the router sent none to these experts: it starts too uneven. "
        raise CheckFailedError(
            f"{len(dead)} of {len(largest)} parameters get no gradient: {few(dead, 5)}",
            f"{note}They are not used in forward(), or behind detach(), no_grad() or a factor of "
            "0. Remove them, or use them.",
        )
    return f"{len(largest)} parameters"


@CHECKS.of("learning.one_batch", "one batch is learned by heart")
def one_batch_is_learned(subject: Subject) -> str:
    own = subject.own_batches
    usual = subject.reads_text and subject.own_loss is None
    try:
        return _learn(subject, subject.example(4, 32), _FALL if usual else _OWN_FALL)
    except CheckFailedError:
        if not subject.reads_text or own is None or own.error:
            raise
        # It may be made to predict something else than the next token, as an encoder-decoder is.
        return _learn(subject, own.example(4, 1), _FALL if usual else _OWN_FALL)


def _learn(subject: Subject, example: Example, fall: float) -> str:
    """Until `fall` of the first loss is left. Raises `CheckFailedError` if it takes too long."""
    model = subject.build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 5)
        optimizer.zero_grad()
        loss = example.loss(example.run(model))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise CheckFailedError(f"the loss is {losses[-1]} after {step} steps on one batch")
        if losses[-1] < losses[0] - (1 - fall) * abs(losses[0]):
            return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {step} steps"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    raise CheckFailedError(
        f"after {_STEPS} steps on one batch of {example.labels.shape[:2].numel()} tokens, the loss "
        f"fell from {losses[0]:.2f} to {losses[-1]:.2f} only, not below {fall * losses[0]:.2f}",
        "Look at learning.gradients for dead parameters; then for detach(), no_grad() or argmax in "
        "forward(), a residual connection that is missing, and norms.",
    )


@CHECKS.of("learning.training", "training lowers the loss")
def training_lowers_the_loss(subject: Subject) -> str:
    """`torchtitan train` on the CPU, with the TrainSpec's own builders and default data."""
    from torchtitan.train import Trainer

    steps = 20
    folder = subject.folder / "learning"
    config = subject.config(
        f"--training.steps={steps}",
        "--training.local_batch_size=4",
        "--optimizer.lr=3e-3",
        "--lr_scheduler.warmup_steps=3",
        "--lr_scheduler.decay_ratio=0",  # a small model needs all of the few steps
        "--metrics.log_freq=1",
        f"--job.dump_folder={folder}",
    )
    try:
        trainer = Trainer(config)
    except ConfigError as error:
        raise NotApplicableError(f"it does not train with default options: {error}") from error
    trainer.train()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    most = 0.9 if subject.reads_text else 1.0
    if not losses[-1] <= losses[0] - (1 - most) * abs(losses[0]):
        raise CheckFailedError(
            f"in {steps} steps of training the loss went from {losses[0]:.2f} to {losses[-1]:.2f}",
            "If learning.one_batch passes, look at the TrainSpec's builders: the optimizer's "
            "parameters, the learning rate, labels and loss.",
        )
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {steps} steps"
