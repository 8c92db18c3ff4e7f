"""Checks an author's own loss and data loader against the trainer's requirements."""

from __future__ import annotations

import math
from typing import Any

import torch

from torchtitan.components.data_loader import Batch, check_dataloader, has_own_loader
from torchtitan.components.loss import IGNORE_INDEX, attach_loss, check_loss
from torchtitan.components.model_inputs import ModelInputs
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.tools.text import few, first_line

from .batches import Example, same
from .check import CheckFailedError, Checks, NotApplicableError
from .subject import Subject

CHECKS = Checks("contract.forward")

SUM = (
    "build_loss_fn: return a function (pred, labels) whose result is the sum, not the mean, over "
    "the tokens whose label is not IGNORE_INDEX, a float32 scalar. The trainer divides by the "
    "tokens of the whole step. A loss that compares samples gets those of a micro-batch alone: "
    "docs/own_data.md, A loss of samples."
)
_TOLERANCE = 1e-3


@CHECKS.of("contract.loss", "the loss is a sum over tokens")
def loss_is_a_sum(subject: Subject) -> str:
    if subject.spec.model_cls.compares_samples:
        raise NotApplicableError(f"{subject.spec.model_cls.__name__}.compares_samples is True")
    job_config = subject.config()
    loss_fn = subject.spec.build_loss_fn(job_config)
    try:
        check_loss(loss_fn, job_config)
    except ConfigError as error:
        raise CheckFailedError(str(error), SUM) from error
    if not subject.reads_text:
        return _own_loss_is_a_sum(loss_fn, subject)
    model, tokens = subject.build().train(), subject.tokens(2)
    attach_loss(loss_fn, [model])
    labels = tokens.roll(-1, 1)
    labels[0, : tokens.shape[1] // 2] = IGNORE_INDEX  # rows have different numbers of labels
    alone = labels.clone(), labels.clone()
    alone[0][1], alone[1][0] = IGNORE_INDEX, IGNORE_INDEX

    def summed(labels: torch.Tensor) -> float:
        torch.manual_seed(0)
        with torch.enable_grad():  # some losses differ without gradients
            loss = loss_fn(model(tokens), labels)
        return _number(loss)

    both, parts = summed(labels), [summed(part) for part in alone]
    if not abs(both - sum(parts)) <= _TOLERANCE * abs(both):
        raise CheckFailedError(
            f"the loss of two sequences is {both:.6g}, but {parts[0]:.6g} and {parts[1]:.6g} with "
            "the labels of only one of them",
            SUM,
        )
    if subject.own_batches is None and not subject.spec.model_cls.sees_later_tokens:
        _require_gradients_where_labels_are(loss_fn, model, tokens, subject.vocab_size)
    if subject.later_tokens:
        return f"a sum over tokens; with later ones, {_own_loss_is_a_sum(loss_fn, subject)}"
    return "a sum over tokens"


def _require_gradients_where_labels_are(
    loss_fn: Any, model: torch.nn.Module, tokens: torch.Tensor, vocab_size: int
) -> None:
    """Require that a token's output gets a gradient if its label counts, and only then."""
    # Each label occurs at least twice, 0 and the last among them, and is not the next token.
    rows, seq = tokens.shape
    spread = torch.linspace(0, vocab_size - 1, max(seq // 2, 2)).long()
    labels = spread.repeat(rows * seq // len(spread) + 1)[: rows * seq].view(rows, seq).clone()
    labels[0, seq // 4 : seq // 2] = IGNORE_INDEX
    pred = model(tokens)
    if not isinstance(pred, torch.Tensor) or pred.shape[:-1] != tokens.shape:
        return  # only the loss knows what this means
    (grad,) = torch.autograd.grad(loss_fn(pred, labels), pred, allow_unused=True)
    if grad is None:
        return
    counts, learned = labels != IGNORE_INDEX, grad.flatten(2).abs().amax(-1) > 0
    shifted = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
    if torch.equal(learned, shifted):
        raise CheckFailedError(
            "the loss compares the output for a token with the label of the next token: the last "
            "token gets no gradient",
            "build_loss_fn: labels are already shifted: labels[:, i] is the target of token i. "
            "Compare pred with the unchanged labels, not pred[:, :-1] with labels[:, 1:].",
        )
    if (learned & ~counts).any():
        row, place = (learned & ~counts).nonzero()[0].tolist()
        raise CheckFailedError(
            f"token {place} of row {row} has the label IGNORE_INDEX, but gets a gradient", SUM
        )
    never = [int(label) for label in spread.unique() if not learned[labels == label].any()]
    others = counts & ~torch.isin(labels, torch.tensor(never, dtype=torch.int64))
    if never and others.any() and torch.equal(learned, others):  # else it chooses by other rules
        raise CheckFailedError(
            f"tokens whose label is {few(never, 5)} are never learned: they get no gradient",
            "build_loss_fn: only IGNORE_INDEX (-100) excludes a label. There is no padding: 0 is "
            "an ordinary token.",
        )


def _own_loss_is_a_sum(loss_fn: Any, subject: Subject) -> str:
    """Check the loss over the rows of the loader's batch, whose labels may be of any kind."""
    model, example = subject.build().train(), subject.example(2)
    attach_loss(loss_fn, [model])

    def summed(part: Example, seed: int = 0) -> float:
        torch.manual_seed(seed)
        return _number(loss_fn(model(part.tokens, **part.inputs), part.labels))

    both, other = summed(example), summed(example, seed=1)
    if math.isnan(both) and example.labels.isnan().any():
        raise CheckFailedError(
            "the loss is NaN: some labels are", "build_loss_fn: labels that are NaN do not count."
        )
    if both != other:
        raise NotApplicableError("forward() draws random numbers, so losses cannot be compared")
    parts = [summed(example.rows(slice(row, row + 1))) for row in range(2)]
    if not abs(both - sum(parts)) <= _TOLERANCE * abs(both):
        raise CheckFailedError(
            f"the loss of two rows is {both:.6g}, but {parts[0]:.6g} and {parts[1]:.6g} alone",
            SUM,
        )
    floating = example.labels.is_floating_point()
    if not floating or example.labels.isnan().any():
        nothing = torch.full_like(example.labels, math.nan if floating else IGNORE_INDEX)
        ignored = _number(loss_fn(model(example.tokens, **example.inputs), nothing))
        if ignored != 0:
            name = "NaN" if floating else "IGNORE_INDEX"
            raise CheckFailedError(
                f"with {name} for all labels the loss is {ignored:.6g}, not 0", SUM
            )
    return "a sum over rows"


def _number(loss: Any) -> float:
    if not isinstance(loss, torch.Tensor) or loss.shape or loss.dtype != torch.float32:
        kind = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, torch.Tensor) else loss
        raise CheckFailedError(f"the loss is {kind}, not a float32 scalar", SUM)
    return loss.item()


@CHECKS.of(
    "contract.dataloader",
    "the model's own data loader gives batches and resumes",
    needs=("contract.spec",),
)
def dataloader_resumes(subject: Subject) -> str:
    build = subject.spec.build_dataloader_fn
    if not has_own_loader(build):
        return "torchtitan's own"
    config = subject.config("--checkpoint.enable", "--training.local_batch_size=2")
    loaders: list[Any] = []

    def loader(dp_rank: int = 0, dp_size: int = 1, config: JobConfig = config) -> Any:
        loaders.append(build(config, tokenizer, dp_rank, dp_size))
        return loaders[-1]

    try:
        tokenizer = subject.spec.tokenizer(config)
        first = loader()
    except Exception as error:  # the loader may need options or files of a job
        reason = first_line(error)
        raise NotApplicableError(f"it cannot be built without a job's options: {reason}") from error
    try:
        check_dataloader(first, config)
        dims = ParallelDims.from_config(config.parallelism, 1)
        model, note = subject.spec.meta_model(), ""
        inputs = ModelInputs(model, dims, config)
        before = _next(first, inputs)
        state = {
            "rows": first.state_dict()["rows"].clone(),
            "seq_len": subject.length,
            "described": getattr(first, "describe", dict)(),
        }
        expected = _next(first, inputs)
        again = loader()
        again.load_state_dict(state)
        _require_same(_next(again, inputs), expected)
        if not torch.equal(before["tokens"], expected["tokens"]):
            shares = _next(loader(0, 2), inputs), _next(loader(1, 2), inputs)
            _require_shares(*shares)
            of_both = subject.config("--training.local_batch_size=4")
            both = ModelInputs(model, dims, of_both)
            note = _note_on_shares(_next(loader(config=of_both), both), *shares)
    except ConfigError as error:
        raise CheckFailedError(str(error), "docs/own_data.md, A data loader of your own") from error
    finally:
        for made in loaders:
            getattr(made, "close", lambda: None)()
    return (
        f"batches {list(expected['tokens'].shape)}, resumed from {list(state['rows'].shape)}{note}"
    )


def _next(loader: Any, inputs: ModelInputs) -> Batch:
    try:
        batch = inputs.checked(next(loader))
    except StopIteration:
        raise CheckFailedError(
            "the loader ended before training did",
            "next() must give batches without end: after the last batch, start again with the "
            "first data.",
        ) from None
    return {name: tensor.clone() for name, tensor in batch.items()}


def _require_same(actual: Batch, expected: Batch) -> None:
    for name, tensor in expected.items():
        if name not in actual or not same(actual[name], tensor):
            raise CheckFailedError(
                f"a loader that resumes from a checkpoint gives a different {name!r} than the "
                "saved loader",
                "load_state_dict() gets only the rows of state_dict(); the next batch must then "
                "be the one after the last batch that next() gave.",
            )


def _require_shares(first: Batch, second: Batch) -> None:
    if torch.equal(first["tokens"], second["tokens"]):
        raise CheckFailedError(
            "the data ranks 0 and 1 get the same tokens",
            "build_dataloader_fn: rank dp_rank of dp_world_size must read its own share.",
        )


def _note_on_shares(whole: Batch, first: Batch, second: Batch) -> str:
    """Tell if two ranks do not have the samples that one process has; this is no requirement."""
    shared = {name: (first[name], second[name]) for name in whole}
    if any(part.shape[1:] != whole[n].shape[1:] for n, both in shared.items() for part in both):
        return ""  # samples are padded to the largest
    joined = {name: torch.cat(both) for name, both in shared.items()}
    if _samples(joined) == _samples(whole):
        return ""
    return (
        ". Two data ranks get other samples than one process, so losses differ between layouts. "
        "They would not if a sample, also what is drawn at random, depended on its row and step"
    )


def _samples(batch: Batch) -> list[bytes]:
    """Return the samples of a batch as bytes, sorted."""
    tensors = [t[:, None].contiguous() for t in batch.values()]  # some may be `[batch]`
    rows = zip(*(t.view(torch.uint8).unbind() for t in tensors), strict=True)
    return sorted(b"".join(part.numpy().tobytes() for part in row) for row in rows)
