"""Checks models that also get the tokens after each one, as for multi-token prediction.

What such a model makes of a text alone is the subject of the other checks. Here it gets a batch as
in training: `next_tokens`, and labels `[batch, seq, 1 + n]`, of which number k at place i is token
i + 1 + k of the text (see `torchtitan.data.packing.to_batch`).
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from torchtitan.components.loss import IGNORE_INDEX

from .agreement import TOLERANCE
from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .probe import accepts, recorded_outputs, relative_difference, require_causal
from .subject import Subject

CHECKS = Checks("contract.forward")


@CHECKS.of("semantics.later_tokens", "with later tokens, no prediction sees its label")
@torch.no_grad()
def no_prediction_sees_its_label(subject: Subject) -> str:
    """Nor does it see other documents. Tested by changing tokens, in training and in evaluation."""
    if not subject.later_tokens:
        raise NotApplicableError("its data loader gives no tokens after the next")
    require_causal(subject.spec.model_cls)
    model = subject.build_varied()
    packs = all(accepts(type(model), name) for name in ("positions", "document_ids"))
    for training in (False, True):
        model.train(training)
        for seed in (1, 2, 3):
            _labels_change_nothing(model, subject, seed)
        if packs:
            _documents_are_as_alone(model, subject)
    return f"{subject.later_tokens} after the next{'; documents are apart' if packs else ''}"


def _labels_change_nothing(model: nn.Module, subject: Subject, seed: int) -> None:
    depth, length = subject.later_tokens, subject.length + 1
    stream, others = subject.tokens(2, length), subject.tokens(2, length, seed)
    place = length // 2
    changed = torch.cat([stream[:, :place], others[:, place:]], dim=1)
    with recorded_outputs(model) as modules:
        expected = _predictions(model, subject.example_of(stream))
    with recorded_outputs(model) as changed_modules:
        actual = _predictions(model, subject.example_of(changed))
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        # If there is one for each label, this one may see the tokens up to the one before it.
        ahead = number if len(expected) == 1 + depth else depth
        blind = slice(0, place - ahead)
        difference = relative_difference(a[:, blind], b[:, blind])
        if difference <= TOLERANCE:
            continue
        last = slice(0, place - depth)
        names = [
            name
            for name, tensor in modules.items()
            if tensor.ndim > 2 and tensor.shape[:2] == b.shape[:2] and tensor.is_floating_point()
            if relative_difference(changed_modules[name][:, last], tensor[:, last]) > TOLERANCE
        ]
        raise CheckFailedError(
            f"{'in training, ' * model.training}prediction {number} at places before "
            f"{place - ahead} sees tokens from {place} on: changing them changes it by "
            f"{difference:.1e} of the largest"
            + (f"; the first module that differs is {names[0]}" if names else ""),
            f"Prediction {ahead} at place i is of token i + {1 + ahead} of the text, and may see "
            f"the tokens up to i + {ahead}. next_tokens[:, i, k] is token i + 1 + k, so only a "
            "later prediction may use it; and a block of its own needs the causal mask, too.",
        )


def _documents_are_as_alone(model: nn.Module, subject: Subject) -> None:
    """A document's predictions, where they have labels, are the same in a packed sequence."""
    stream = subject.tokens(2, subject.length + 1)
    starts = subject.length // 3, subject.length // 2  # of each row's second document
    document_ids = (torch.arange(stream.shape[1]) >= torch.tensor(starts)[:, None]).long()
    packed = subject.example_of(stream, document_ids)
    predictions = _predictions(model, packed)
    for row, start in enumerate(starts):
        text = stream[row : row + 1]
        for name, places, alone in (
            ("first", slice(0, start), text[:, : start + 1]),
            ("second", slice(start, None), text[:, start:]),
        ):
            found = _predictions(model, subject.example_of(alone))
            labels = packed.labels[row : row + 1, places]
            for number, (a, b) in enumerate(zip(predictions, found, strict=True)):
                label = number if len(found) == labels.shape[-1] else -1
                known = labels[..., label] != IGNORE_INDEX
                difference = relative_difference(a[row : row + 1, places][known], b[known])
                if difference > TOLERANCE:
                    raise CheckFailedError(
                        f"{'in training, ' * model.training}prediction {number} of the {name} "
                        f"document of row {row} differs by {difference:.1e} of the largest from "
                        "that of the document alone",
                        "A block that gets next_tokens needs the mask of documents and their "
                        "positions [batch, seq], as the layers do.",
                    )


def _predictions(model: nn.Module, example: Example) -> list[torch.Tensor]:
    """Return the outputs `[batch, seq, ...]`, one for each label if they are stacked as labels."""
    output = example.run(model)
    count = example.labels.shape[-1]
    if isinstance(output, torch.Tensor) and output.ndim > 3 and output.shape[2] == count:
        return list(output.unbind(2))
    tensors = [value for value in tree_leaves(output) if isinstance(value, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.shape[:2] == example.tokens.shape]
