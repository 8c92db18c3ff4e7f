"""Checks irrelevance of other sequences, of the length, and of earlier forward passes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torchtitan.protocols import ModelProtocol
from torchtitan.tools.text import few

from .agreement import TOLERANCE, disagreement, run_of, run_with_gradients
from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .diagnose import problem_and_place
from .probe import cut_layers, recorded_outputs, relative_difference
from .reference import without_dropout
from .semantics import ROUTING
from .subject import Subject

CHECKS = Checks("contract.layers", "contract.forward")


@CHECKS.of("semantics.batch", "sequences of a batch are independent")
def rows_are_independent(subject: Subject) -> str:
    if not subject.reads_text:
        return _own_rows_are_independent(subject)
    model, tokens = subject.build_varied(), subject.tokens(3)
    model.train()
    for cut in cut_layers(model, tokens):
        if cut.adds_gradients():  # from a loss that may be over the whole batch
            continue
        seen = cut.gradient((1,))
        if (seen[[0, 2]] > 0).any():
            raise CheckFailedError(
                f"{cut.name}: a sequence of a batch sees the others",
                "Look for a norm or mean over the batch (dimension 0), a view() that mixes batch "
                f"and sequence, or attention over the batch. {ROUTING}",
            )
    model.eval()
    in_batch, alone = run_of(model, tokens), run_of(model, tokens[1:2])
    difference, module = disagreement(alone, in_batch, rows=slice(1, 2))
    if module:
        raise CheckFailedError(
            f"a sequence alone gives different logits than in a batch of 3, by {difference:.1e} "
            f"of the largest; the first module that differs is {module}",
            f"Nothing may depend on the size of the batch or on other sequences. {ROUTING}",
        )
    if subject.later_tokens:
        _own_rows_are_independent(subject)
    return f"equal to {difference:.0e}"


@torch.no_grad()
def _own_rows_are_independent(subject: Subject) -> str:
    """Compare rows in training and in evaluation, unless forward() is random."""
    model, example = subject.build_varied(), subject.example(3)
    worst, asked = 0.0, 0
    for training in (True, False):
        model.train(training)
        # In training, a model may return several tensors.
        together = tree_leaves(example.run(model))
        alone = tree_leaves(example.rows(slice(1, 2)).run(model))
        torch.manual_seed(1)
        again = tree_leaves(model(example.tokens, **example.inputs))
        if not all(map(torch.equal, again, together)):
            continue  # forward() draws random numbers
        asked += 1
        difference = max(map(relative_difference, alone, (whole[1:2] for whole in together)))
        worst = max(worst, difference)
        if difference > TOLERANCE:
            raise CheckFailedError(
                f"a row alone gives a different output than in a batch of 3, by {difference:.1e} "
                "of the largest",
                "Nothing may depend on the size of the batch or on other rows: look for a norm or "
                f"mean over dimension 0, or a view() that mixes it with others. {ROUTING}",
            )
    if not asked:
        raise NotApplicableError("forward() draws random numbers, so rows cannot be compared")
    return f"equal to {worst:.0e}"


@CHECKS.of("semantics.lengths", "sequences of any length work, and agree where they begin alike")
def any_length_works(subject: Subject) -> str:
    """Try 1, 2 and an odd number of tokens, and sequences longer than windows and chunks."""
    causal = not subject.spec.model_cls.sees_later_tokens
    if subject.own_batches and not causal:
        raise NotApplicableError(
            "its own loader may give only one length, such as two equal halves"
        )
    model = subject.build_varied()
    limits = window_sizes(vars(subject.args))
    lengths = {1, 2, 17, subject.length, *(2 * limit + 1 for limit in limits if limit <= 512)}
    longest = getattr(subject.args, "max_seq_len", None)
    if isinstance(longest, int):
        lengths = {n for n in lengths if n <= longest}
        if longest <= 2048:
            lengths.add(longest)
    tokens, whole = subject.tokens(1, max(lengths)), None
    for length in sorted(lengths, reverse=True):
        _require_work(model, tokens[:, :length])
        part = run_of(model, tokens[:, :length])
        whole = whole or part
        difference, module = disagreement(part, whole, places=slice(0, length))
        # What a layer changes in one or two tokens may be as small as rounding.
        differs = module if length > 2 else difference > TOLERANCE
        if differs and causal:
            raise CheckFailedError(
                f"the first {length} tokens alone give different logits than within "
                f"{max(lengths)}, by {difference:.1e} of the largest; the first module that "
                f"differs is {module}",
                "Nothing may depend on the length of the sequence: take no mean over it, count "
                "positions from its beginning, and look at windows, chunks and position tables at "
                "this length.",
            )
    return f"lengths {few(sorted(lengths), 8)}"


def _require_work(model: ModelProtocol, tokens: torch.Tensor) -> None:
    length = tokens.shape[1]
    try:
        logits = model(tokens)
        logits.float().square().mean().backward()
    except Exception as error:
        raise CheckFailedError(
            f"sequences of {length} tokens fail: {problem_and_place(error)}",
            "forward() must take any length: no table of a fixed size, no division by seq - 1, no "
            "view() that needs a multiple.",
        ) from error
    if list(logits.shape[:2]) != [1, length] or not logits.isfinite().all():
        raise CheckFailedError(
            f"sequences of {length} tokens give {list(logits.shape)} logits"
            + ("" if logits.isfinite().all() else " that are not finite")
        )


def window_sizes(fields: dict[str, Any]) -> list[int]:
    """Return the sizes of sliding windows and chunks among args, or in a config, by their names."""
    sizes = {
        value
        for name, value in fields.items()
        if ("window" in name or "chunk" in name) and "layers" not in name and type(value) is int
    }
    return sorted(size for size in sizes if size > 0)


@CHECKS.of("semantics.repeatable", "evaluation depends only on the tokens")
@torch.no_grad()
def forward_is_repeatable(subject: Subject) -> str:
    model = subject.build_varied()
    tokens, others = subject.example(2), subject.example(2, 40, seed=1)
    _require_same_weights_after_forward(model, tokens)
    _require_written_memory(model, tokens)
    with recorded_outputs(model) as first:
        expected = tokens.run(model)
    others.run(model)
    torch.manual_seed(12345)
    with recorded_outputs(model) as second:
        actual = model(tokens.tokens, **tokens.inputs)
    if not torch.equal(actual, expected):
        names = [n for n, t in first.items() if n in second and not torch.equal(t, second[n])]
        raise CheckFailedError(
            "the same tokens give different logits the second time"
            + (f"; the first module that differs is {names[0]}" if names else ""),
            "In eval() there may be no dropout (F.dropout needs training=self.training), and "
            "forward() may keep nothing between calls, such as a cache or a mask. Draw noise in "
            "the data loader.",
        )
    return "equal bit by bit"


def _require_same_weights_after_forward(model: ModelProtocol, example: Example) -> None:
    """FSDP drops such a change: it is made to the gathered weights, not to a rank's shards."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for training in (True, False):
        example.run(model.train(training))
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        if changed:
            raise CheckFailedError(
                f"forward() changes {len(changed)} parameters in place: {few(changed, 5)}",
                "Only the optimizer may change weights. Leave them as they are and use a changed "
                "copy, as in F.linear(x, F.normalize(self.weight)), or nn.utils.parametrize; no "
                "max_norm of nn.Embedding.",
            )


def _require_written_memory(model: ModelProtocol, example: Example) -> None:
    """Let PyTorch fill new memory with NaN, which shows where forward() reads it."""
    with recorded_outputs(model) as outputs, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations that are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            result = example.run(model)
        finally:
            torch.use_deterministic_algorithms(False)
    if result.isnan().any() and not example.run(model).isnan().any():
        names = [name for name, tensor in outputs.items() if tensor.isnan().any()]
        raise CheckFailedError(
            "forward() reads memory that nothing has written"
            + (f"; the first module whose output shows it is {names[0]}" if names else ""),
            "torch.empty and empty_like have any values: use torch.zeros, F.pad or torch.cat.",
        )


@CHECKS.of("semantics.evaluation", "evaluation computes what training does")
def evaluation_is_as_training(subject: Subject) -> str:
    """Without dropout; validation and `generate` would use another model than is trained."""
    model, example = subject.build_varied(), subject.example(2)
    example.run(model)
    tokens, inputs = example.tokens, example.inputs
    expected = run_of(model, tokens, **inputs)
    difference, module = disagreement(run_with_gradients(model, tokens, **inputs), expected)
    if module:
        raise CheckFailedError(
            f"under torch.no_grad(), the logits differ by {difference:.1e} of the largest; the "
            f"first module that differs is {module}",
            "Evaluation and generation disable gradients: look for torch.is_grad_enabled().",
        )
    with torch.no_grad(), without_dropout():
        actual = run_of(model.train(), tokens, **inputs)
        torch.manual_seed(1)
        again = model(tokens, **inputs)
    if getattr(actual.logits, "shape", None) != expected.logits.shape:
        return "in training, the model returns something else"
    if not torch.equal(again, actual.logits):
        return "in training, forward() draws random numbers"
    difference, module = disagreement(actual, expected)
    if module:
        raise CheckFailedError(
            f"in training, the logits differ by {difference:.1e} of the largest from those in "
            f"eval(), without dropout; the first module that differs is {module}",
            "Look for self.training. Evaluation must use the model as it is trained, but without "
            "dropout.",
        )
    return f"equal to {difference:.0e}"
