"""Checks how large numbers are: finite at long contexts and with large weights; the first loss."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from torchtitan.tools.text import few

from .batches import Example
from .check import CheckFailedError, Checks
from .numerics import autocast
from .probe import loss_of, recorded_outputs
from .subject import Subject

CHECKS = Checks("contract.forward")

LONG_CONTEXT = 2048
"""Tokens; fewer if the model takes no more."""


@CHECKS.of("numerics.finite", "outputs and gradients at a long context are finite")
def long_contexts_are_finite(subject: Subject) -> str:
    model, seq = subject.build().train(), subject.at_most(LONG_CONTEXT)
    example = subject.example(1, seq)
    seq = example.labels.shape[1]
    _require_finite(model, example, f"at {seq} tokens")
    return f"{seq} tokens, float32 and bfloat16"


@CHECKS.of(
    "numerics.large_weights",
    "outputs with large weights are finite",
    needs=("contract.layers", "contract.forward"),
)
def large_weights_are_finite(subject: Subject) -> str:
    """Training makes weights larger, and so the scores of attention."""
    model, example = subject.build().train(), subject.example(2)
    with torch.no_grad():
        # Not other parameters, which may be logarithms, as those of Mamba's decay rates.
        for weight in {m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)}:
            weight.mul_(_LARGER)
        _require_finite(model, example, f"with linear layers' weights {_LARGER:g} times as large")
    return f"{_LARGER:g} times as large as initial ones, float32 and bfloat16"


_LARGER = 32.0
"""Factor on linear layers' weights in `large_weights_are_finite`."""


def _require_finite(model: nn.Module, example: Example, when: str) -> None:
    """Check outputs; and gradients, unless they are disabled."""
    for cast, dtype in ((nullcontext, "float32"), (autocast, "bfloat16")):
        model.zero_grad()
        with recorded_outputs(model) as outputs, cast(model):
            logits = example.cast(getattr(torch, dtype)).run(model)
        loss = example.loss(logits)
        # A module may return a mask of 0 and -inf.
        good = {name: out.isfinite() | (out == -math.inf) for name, out in outputs.items()}
        bad = [name for name, places in good.items() if not places.all()]
        results = [t for t in tree_leaves(logits) if isinstance(t, torch.Tensor) and _broken(t)]
        if bad or results:
            first = outputs[bad[0]] if bad else results[0]
            places = (~first.isfinite()).nonzero()
            where = f", first at index {places[0].tolist()} of {list(first.shape)}"
            raise CheckFailedError(
                f"{when} in {dtype}, the output of {bad[0] if bad else 'the model'} is not "
                f"finite{where}",
                "Usual causes: a row of the mask without any key (softmax of -inf alone), float16 "
                "or exp() that overflows (softmax without subtracting the largest), a division by "
                "a sum that can be 0, a position table that is too short.",
            )
        if loss.requires_grad:
            loss.backward()
        bad = [n for n, p in model.named_parameters() if p.grad is not None and _broken(p.grad)]
        if bad:
            raise CheckFailedError(
                f"{when} in {dtype}, gradients of {len(bad)} parameters are not finite: "
                f"{few(bad, 5)}",
                "The outputs are finite: look for sqrt() or a norm at 0, and for where() over a "
                "branch that is not finite.",
            )


def _broken(tensor: torch.Tensor) -> bool:
    return not bool(tensor.isfinite().all())


@CHECKS.of("numerics.first_loss", "the untrained loss is near log(vocab_size)")
@torch.no_grad()
def first_loss_is_that_of_guessing(subject: Subject) -> str:
    """An untrained model neither knows the next token nor is confident of a wrong one."""
    model, tokens = subject.build(), subject.tokens(4)
    guessing = math.log(subject.vocab_size)
    loss = loss_of(model(tokens), tokens).item()
    if loss < 0.9 * guessing:
        raise CheckFailedError(
            f"the untrained loss on random tokens is {loss:.2f}, below log(vocab_size) = "
            f"{guessing:.2f}, which no model can beat",
            "The model sees the tokens that it should predict: look at the causal mask.",
        )
    if not loss < 1.5 * guessing + 1:
        raise CheckFailedError(
            f"the untrained loss is {loss:.2f}, far above log(vocab_size) = {guessing:.2f}",
            "The initial weights are too large. Usual: std=0.02, less for matrices that write to "
            "the residual stream, and a final norm before the output layer.",
        )
    return f"{loss:.2f}, log(vocab_size) = {guessing:.2f}"
