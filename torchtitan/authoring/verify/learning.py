"""Checks that the model learns: every parameter gets a gradient, and the loss falls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from torchtitan.components.loss import count_of
from torchtitan.errors import ConfigError
from torchtitan.tools.text import few
from torchtitan.train import Trainer

from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .probe import hooked
from .subject import Subject

CHECKS = Checks("contract.forward")

_STEPS = 100
_FALL = 0.5
"""Largest share of the first loss that may remain after `_STEPS` steps on one batch."""
_OWN_FALL = 0.9
"""The same for an author's loader or loss, which is only known to be learnable: denoising, for
example, is learned slowly, and a loss may have a floor."""
_MOST_BATCHES = 8
"""Of `learning.gradients`."""
_DEAD = 1e-10
"""A parameter whose largest gradient is below this share of the model's largest has only rounding
errors, or none."""


@CHECKS.of("learning.gradients", "every parameter gets a gradient")
def every_parameter_gets_a_gradient(subject: Subject) -> str:
    """Use some steps, and enough tokens for every expert.

    In the first step, weights that start at 0 block the gradients of others, and several in a row
    do so for as many steps. So it goes on while more parameters get a gradient.
    """
    model = subject.build().train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise CheckFailedError("no parameter requires gradients", "Train some of them.")
    largest = dict.fromkeys(trained, 0.0)
    rows = _Rows(model, subject)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def backward(example: Example) -> None:
        optimizer.zero_grad()
        with rows.watching(example.labels.shape[1], 1 + subject.later_tokens):
            example.loss(example.run(model)).backward()

    dead, before, steps = list(trained), 0, 0
    while steps < 3 or (0 < len(dead) < before and steps < _MOST_BATCHES):
        before = len(dead)
        example = subject.example(8, 64, seed=steps)
        backward(example)
        for name, parameter in trained.items():
            if parameter.grad is not None:
                largest[name] = max(largest[name], parameter.grad.abs().max().item())
        optimizer.step()
        limit = _DEAD * max(largest.values())
        dead = [name for name, value in largest.items() if value <= limit]
        steps += 1
    if dead:
        note = ""
        if all(re.search(r"experts?\.\d+\.", name) for name in dead):
            note = (
                f"The router sent none of {steps * 512:,} tokens to these experts: its start is "
                "too unbalanced. "
            )
        if all(largest[name] for name in dead):  # by rounding
            hint = (
                "They change no output, as the bias of keys, which the softmax of attention "
                "cancels. Remove them, or freeze them by requires_grad_(False) in __init__, since "
                "an optimizer would follow their rounding errors."
            )
        else:
            hint = (
                f"{note}They are unused in forward(), or used behind detach(), no_grad() or a "
                "factor of 0. Remove them, or use them."
            )
        raise CheckFailedError(
            f"{len(dead)} of {len(largest)} parameters get no gradient: {few(dead, 5)}", hint
        )
    rows.negate_dead()
    backward(example)
    rows.require_gradients()
    frozen = sum(1 for p in model.parameters() if not p.requires_grad)
    return f"{len(largest)} parameters" + f", and {frozen} that the model freezes" * bool(frozen)


FEW_TOKENS = re.compile(r"experts?\b|(^|\.)(router|gate)(\.|$)")
"""Names of modules that have parts which may get few tokens, or none."""


class _Rows:
    """Tracks the rows of matrices that got a gradient, where each row should.

    Each row should in the outputs of a linear layer or a convolution, and in an embedding for each
    token that was looked up and has a next one. Other parameters may be tables that are read in
    part.
    """

    def __init__(self, model: nn.Module, subject: Subject) -> None:
        self._embeddings, self._matrices = {}, {}
        self._asked: dict[str, torch.Tensor] = {}
        self._alive: dict[str, torch.Tensor] = {}
        vocab_size = subject.vocab_size if subject.reads_text else None
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
                continue
            if FEW_TOKENS.search(name):
                continue
            if isinstance(module, nn.Embedding):
                if subject.reads_text:  # other models may have padding tokens
                    self._embeddings[name] = module
                    self._asked[name] = torch.zeros(len(weight), dtype=torch.bool)
            elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
                self._matrices[name] = module
                # A vocabulary may be padded.
                last = None if name.startswith("layers.") else vocab_size
                self._asked[name] = torch.arange(len(weight)) < (last or len(weight))
            if name in self._asked:
                self._alive[name] = torch.zeros(len(weight), dtype=torch.bool)

    @contextmanager
    def watching(self, seq_len: int, ahead: int) -> Iterator[None]:
        """Wrap a forward and backward pass on sequences of `seq_len` tokens.

        The last `ahead` of them may have no token to predict.
        """

        looked_up: dict[str, list[torch.Tensor]] = {name: [] for name in self._embeddings}

        def read(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            ids = _ids(args, kwargs)
            if ids is not None and ids.numel() % seq_len == 0:
                looked_up[name].append(ids.reshape(-1, seq_len)[:, :-ahead].flatten())

        with hooked(self._embeddings.items(), read):
            yield
        for name, module in [*self._matrices.items(), *self._embeddings.items()]:
            if module.weight.grad is None:
                continue
            alive = module.weight.grad.flatten(1).abs().amax(1) > 0
            self._alive[name] |= alive
            if alive.any():  # there is none if the weights after this module are still 0
                for rows in looked_up.get(name, []):
                    self._asked[name][rows] = True

    @torch.no_grad()
    def negate_dead(self) -> None:
        """Negate the rows of matrices that got no gradient.

        The inputs may be so few that a ReLU was 0 for all of them. Then it is not for their
        opposites, whereas an output that is never used still gets no gradient.
        """
        for name, module in self._matrices.items():
            module.weight[self._asked[name] & ~self._alive[name]] *= -1

    def require_gradients(self) -> None:
        for name, asked in self._asked.items():
            dead = asked & ~self._alive[name]
            if not dead.any():
                continue
            numbers = few(dead.nonzero().flatten().tolist())
            what = f"{int(dead.sum())} of {len(dead)} rows"
            padding = getattr(self._embeddings.get(name), "padding_idx", None)
            hint = (
                "Outputs of this layer are never used: look at how forward() slices or splits "
                "them (two slices that should differ may be the same). Use them, or make the "
                "layer smaller."
            )
            if padding is not None:
                hint = (
                    f"nn.Embedding(padding_idx={padding}) never trains that row. The model never "
                    "gets padding, and the token may occur in texts, so leave it out."
                )
            elif name in self._embeddings:
                hint = "These rows were looked up, but the loss does not depend on them."
            raise CheckFailedError(f"{name}.weight: {what} get no gradient: {numbers}", hint)


def _ids(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the first tensor of integers among the arguments."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return value
    return None


@CHECKS.of("learning.one_batch", "training on one batch lowers its loss")
def one_batch_is_learned(subject: Subject) -> str:
    own = subject.own_batches
    usual = subject.reads_text and subject.own_loss is None
    try:
        return _learn(subject, subject.example(4, 32), _FALL if usual else _OWN_FALL)
    except CheckFailedError:
        if not subject.reads_text or own is None or own.error:
            raise
        # The model may not predict the next token, for example as an encoder-decoder.
        return _learn(subject, own.example(4, 1), _FALL if usual else _OWN_FALL)


def _learn(subject: Subject, example: Example, fall: float) -> str:
    """Train until `fall` of the first loss is left. Raises `CheckFailedError` if it does not."""
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
        f"after {_STEPS} steps on one batch of {example.labels.shape[:2].numel()} tokens, the "
        f"loss fell only from {losses[0]:.2f} to {losses[-1]:.2f}, not below "
        f"{fall * losses[0]:.2f}",
        "Look at learning.gradients for dead parameters; then for detach(), no_grad() or argmax "
        "in forward(), a missing residual connection, and norms.",
    )


@CHECKS.of("learning.training", "training lowers the loss")
def training_lowers_the_loss(subject: Subject) -> str:
    """Run `torchtitan train` on the CPU, with the TrainSpec's own builders and default data."""
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
    # Losses of steps with different noise tell little, so own batches are compared with themselves.
    before = None if subject.reads_text else _loss_of_first_batch(trainer, subject)
    trainer.train()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    if before is not None:
        losses = [before, _loss_of_first_batch(trainer, subject)]
    most = 0.9 if subject.reads_text else 1.0
    if not losses[-1] <= losses[0] - (1 - most) * abs(losses[0]):
        raise CheckFailedError(
            f"in {steps} steps of training the loss went from {losses[0]:.2f} to {losses[-1]:.2f}",
            "If learning.one_batch passes, look at the TrainSpec's builders: the optimizer's "
            "parameters, the learning rate, labels and loss.",
        )
    return f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {steps} steps"


def _loss_of_first_batch(trainer: Any, subject: Subject) -> float:
    subject.require_own()
    assert subject.own_batches is not None
    batch = subject.own_batches.batch(1)
    torch.manual_seed(0)
    return (trainer.evaluate(batch) / count_of(trainer.loss_fn)(batch["labels"])).item()
