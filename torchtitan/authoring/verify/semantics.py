"""Checks that a token depends only on itself and earlier tokens of its document.

The dependence of each layer is tested by gradients, which are zero where there is no path;
that of the whole model by changing tokens, which also finds paths without gradients (routing). The
model is untrained, with noise where weights are 0, since zeros would hide a path.
"""

from __future__ import annotations

import dataclasses

import torch

from torchtitan.protocols.model import ModelProtocol
from torchtitan.tools.text import few

from .agreement import TOLERANCE, disagreement, run_of
from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .probe import (
    CutLayer,
    accepts,
    cut_by_tokens,
    cut_layers,
    document_inputs,
    packed_documents,
    relative_difference,
    require_causal,
)
from .subject import Subject

CHECKS = Checks("contract.layers", "contract.forward")

ROUTING = (
    "A mixture of experts must not drop tokens that exceed a capacity, nor let experts choose "
    "tokens: then a token's output depends on which others are in the batch."
)

_IN_TRAINING = (
    "In evaluation it does not: look for self.training, such as is_causal=not self.training, and "
    "for a separate path for training."
)


@CHECKS.of("semantics.causality", "no token sees a later one")
def no_token_sees_a_later_one(subject: Subject) -> str:
    require_causal(subject.spec.model_cls)
    model, example = subject.build_varied(), subject.example_by_token()
    tokens, inputs = example.tokens, example.inputs
    seq = tokens.shape[1]
    queries = sorted({0, 1, seq // 3, seq // 2, seq - 2})
    for training in (False, True):
        for cut in _layers_to_ask(model.train(training), tokens, **inputs):
            for query in queries:
                later = cut.gradient((slice(None), query))[0, query + 1 :]
                seen = ((later > 0).nonzero().flatten() + query + 1).tolist()
                if seen:
                    raise CheckFailedError(
                        f"{cut.name}: {'in training, ' * training}token {query} sees {len(seen)} "
                        f"later tokens, {few(seen)}; most of all token "
                        f"{query + 1 + int(later.argmax())}",
                        _IN_TRAINING if training else _mask_hint(query, seen),
                    )
    model.eval()
    for seed in (1, 2, 3):
        _later_tokens_change_nothing(model, example, subject.example_by_token(seed).tokens)
    return f"{len(model.layers)} layers, queries {few(queries, 5)} of {seq}"


def _layers_to_ask(
    model: ModelProtocol, tokens: torch.Tensor, **inputs: torch.Tensor
) -> list[CutLayer]:
    """Return the layers whose gradients reveal paths; dropout removes some paths, and adds none.

    In training, layers whose backward pass adds a balance loss's gradient are left out.
    """
    cuts = cut_by_tokens(model, tokens, **inputs)
    return [cut for cut in cuts if not (model.training and cut.adds_gradients())]


def _mask_hint(query: int, seen: list[int]) -> str:
    if seen == [query + 1]:
        return (
            f"The mask is off by one: query {query} may look at keys up to {query}, "
            "torch.ones(seq, seq).tril(), not tril(1). Or a convolution or shift takes the next "
            "token: pad it at the beginning."
        )
    return (
        "Attention: F.scaled_dot_product_attention(q, k, v, is_causal=True), or a causal mask. If "
        "it has one, look for what else mixes tokens: heads that are joined without transpose(1, "
        "2), a mean or norm over the sequence, a convolution padded at the end."
    )


def _later_tokens_change_nothing(
    model: torch.nn.Module, example: Example, others: torch.Tensor
) -> None:
    """Test the whole model, since routing has no gradient."""
    tokens, inputs = example.tokens, example.inputs
    place = tokens.shape[1] // 2
    changed = torch.cat([tokens[:, :place], others[:, place:]], dim=1)
    difference, module = disagreement(
        run_of(model, changed, **inputs), run_of(model, tokens, **inputs), places=slice(0, place)
    )
    if module:
        raise CheckFailedError(
            f"changing tokens from {place} on changes logits of earlier ones by {difference:.1e} "
            f"of the largest; the first module that differs is {module}",
            f"Gradients do not take this path, so it is a discrete choice. {ROUTING}",
        )


@CHECKS.of("semantics.memory", "tokens see earlier ones")
def tokens_see_earlier_ones(subject: Subject) -> str:
    """Every layer that mixes tokens must let them see earlier ones and themselves."""
    model, tokens = subject.build_varied(), subject.tokens(1)
    last = tokens.shape[1] - 1
    mixing: dict[str, bool] = {}
    kinds: dict[str, type] = {}
    nearest: dict[str, int] = {}  # layers that mix -> the nearest token that the last one sees
    for cut in cut_by_tokens(model, tokens):
        seen = cut.gradient((slice(None), last))[0]
        mixing[cut.name], kinds[cut.name] = bool((seen[:last] > 0).any()), type(cut.module)
        if seen[last] == 0:
            raise CheckFailedError(
                f"{cut.name}: the output of token {last} does not depend on its own input",
                "The residual connection is missing, and the mask excludes the query's own key.",
            )
        if mixing[cut.name]:
            nearest[cut.name] = int(seen[:last].nonzero().max())
    skipping = [name for name, token in nearest.items() if token < last - 1]
    if skipping and len(skipping) == len(nearest):  # then no other layer makes up for it
        name = skipping[0]
        raise CheckFailedError(
            f"{name}: token {last} sees {nearest[name]}, but not the nearer {nearest[name] + 1}, "
            f"and no layer lets it see {last - 1}",
            "A window or chunk ends at the query, not before it.",
        )
    if not any(mixing.values()):
        raise CheckFailedError(
            "in no layer does a token see earlier ones: each is processed alone",
            "The mask keeps only the diagonal, or attention is over the wrong dimension: "
            "F.scaled_dot_product_attention wants [batch, heads, seq, head_dim].",
        )
    for name, mixes in mixing.items():
        if not mixes and any(kinds[n] is kinds[name] for n, other in mixing.items() if other):
            raise CheckFailedError(
                f"{name}: no token sees an earlier one, though other layers of its kind, "
                f"{kinds[name].__name__}, let them",
                "Look for what depends on the layer's number: its mask or its window.",
            )
    note = f", {few(skipping, 5)} without the token before (dilated?)" if skipping else ""
    return f"{sum(mixing.values())} of {len(mixing)} layers mix tokens{note}"


@CHECKS.of("semantics.documents", "packed documents do not see each other")
def documents_are_apart(subject: Subject) -> str:
    """A document must give the same in a packed sequence as alone."""
    if not accepts(subject.spec.model_cls, "document_ids"):
        raise NotApplicableError("forward() takes no document_ids, so documents are not separated")
    subject.require_ids()
    model, tokens = subject.build_varied(), subject.random_tokens(3)
    for seed in (1, 2):
        _last_documents_are_as_alone(model, tokens, seed)
    _documents_are_apart_in_training(model, tokens)
    return "the last document of each row, 2 batches of 3 rows"


def _last_documents_are_as_alone(model: ModelProtocol, tokens: torch.Tensor, seed: int) -> None:
    """Each row of a batch has its own documents, and the next batch of that shape has others."""
    inputs, last = _packed(model, tokens, seed)
    first_batch, _ = _packed(model, tokens, seed=1)
    if seed > 1:  # just before, so that anything kept from the last call is from this
        model(tokens, **first_batch)
    begins = last & (last.cumsum(dim=1) == 1)
    for cut in cut_by_tokens(model, tokens, **inputs):
        seen = cut.gradient((last,)).masked_fill(last, 0)
        for row in (seen > 0).any(dim=1).nonzero().flatten().tolist():
            hint = _MASK_OF_DOCUMENTS
            if not _sees_others_alone(model, tokens, inputs, last, row):
                hint = _hint_of_rows("document_ids", "the mask", row, seed, hint)
            raise CheckFailedError(
                f"{cut.name}: in {_which(row, seed)}, the last document sees "
                f"{int((seen[row] > 0).sum())} tokens of the others",
                hint,
            )
        later = cut.gradient((begins,)).masked_fill(~last | begins, 0)
        if (later > 0).any() and not model.sees_later_tokens:
            raise CheckFailedError(
                f"{cut.name}: with document_ids, the first token of a document sees "
                f"{int((later > 0).sum(dim=1).max())} later tokens of it",
                "The mask of documents must also include the causal rule; see CausalMask in "
                "torchtitan/models/common/attention.py.",
            )
    if "positions" not in inputs:
        return
    with torch.no_grad():
        if seed > 1:
            model(tokens, **first_batch)
        packed = model(tokens, **inputs)
        for row, start in enumerate(begins.long().argmax(dim=1).tolist()):
            alone = model(tokens[row : row + 1, start:])
            difference = relative_difference(packed[row : row + 1, start:], alone)
            if difference > TOLERANCE:
                raise CheckFailedError(
                    f"in {_which(row, seed)}, the last document's logits differ by "
                    f"{difference:.1e} of the largest from those of the document alone",
                    _hint_of_rows(
                        *("positions", "the values computed from positions", row, seed),
                        "Positions count from the beginning of each document: use the argument "
                        "`positions`, not torch.arange(seq), wherever positions matter.",
                    ),
                )


def _sees_others_alone(
    model: ModelProtocol,
    tokens: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    last: torch.Tensor,
    row: int,
) -> bool:
    """Whether the last document of a row sees the others where the row is the whole batch."""
    one = slice(row, row + 1)
    of_row = {name: value[one] for name, value in inputs.items()}
    cuts = cut_by_tokens(model, tokens[one], **of_row)
    return any((cut.gradient((last[one],))[~last[one]] > 0).any() for cut in cuts)


def _packed(
    model: ModelProtocol, tokens: torch.Tensor, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inputs with several documents per row, and a row's last document `[rows, seq]`."""
    rows, seq = tokens.shape
    ids = packed_documents(rows, seq, seed)
    return document_inputs(model, ids), ids == ids[:, -1:]


def _documents_are_apart_in_training(model: ModelProtocol, tokens: torch.Tensor) -> None:
    inputs, last = _packed(model.train(), tokens, seed=3)
    for cut in _layers_to_ask(model, tokens, **inputs):
        seen = cut.gradient((last,)).masked_fill(last, 0)
        if (seen > 0).any():
            raise CheckFailedError(
                f"{cut.name}: in training, tokens of the last document of a row see "
                f"{int((seen > 0).sum())} tokens of the others",
                _IN_TRAINING,
            )


def _which(row: int, seed: int) -> str:
    return f"row {row} of {'a batch' if seed == 1 else 'the second batch'}"


_MASK_OF_DOCUMENTS = (
    "The mask must hold (document_ids[:, :, None] == document_ids[:, None, :]) besides the causal "
    "rule; see CausalMask in torchtitan/models/common/attention.py. A recurrence must begin anew, "
    "and a convolution see zeros before a document. Other models must not take document_ids."
)


def _hint_of_rows(name: str, kept: str, row: int, seed: int, usual: str) -> str:
    """Return the hint for a row that is wrong, where those before it are right."""
    if seed > 1:
        return (
            f"The first batch, of the same shape, is right: {kept} seems to be kept from one call "
            "to the next. Documents differ from batch to batch, so keep nothing that depends on "
            f"{name}."
        )
    if row > 0:
        return (
            f"Row 0 is right: each row has its own {name} [batch, seq]. Look for {name}[0] or "
            f"{name}[:1] in forward(), in the mask, and in the tables of rotary positions."
        )
    return usual


@CHECKS.of("semantics.positions", "forward(positions=...) is used")
def positions_are_used(subject: Subject) -> str:
    """The argument `positions` counts from 0 by default, and must change the logits."""
    if not accepts(subject.spec.model_cls, "positions"):
        raise NotApplicableError("forward() takes no positions")
    subject.require_ids()
    model, tokens = subject.build_varied(), subject.random_tokens(2)
    counted = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        expected = model(tokens)
        for positions in (counted, counted.expand_as(tokens)):
            difference = relative_difference(model(tokens, positions=positions), expected)
            if difference > TOLERANCE:
                raise CheckFailedError(
                    f"positions 0, 1, 2, ... {list(positions.shape)} give different logits than "
                    f"None, by {difference:.1e} of the largest",
                    "By default, positions = torch.arange(seq)[None].",
                )
        turned = relative_difference(model(tokens, positions=counted.flip(1)), expected)
    if turned < 1e-6:
        raise CheckFailedError(
            f"positions in the reverse order change no logit (at most {turned:.1e} of the largest)",
            "forward() takes `positions` and must turn queries and keys by them, not by "
            "torch.arange(seq).",
        )
    return f"positions in the reverse order change logits by {turned:.0e}"


@CHECKS.of("semantics.order", "the order of tokens matters")
@torch.no_grad()
def order_matters(subject: Subject) -> str:
    """Some layer must distinguish the same earlier tokens in another order."""
    model, tokens = subject.build_varied(), subject.tokens(1, 24)
    shuffled = tokens.clone()
    shuffled[:, :-1] = tokens[:, :-1].flip(1)
    cuts = cut_layers(model, tokens)
    first_shuffled = cut_layers(model, shuffled)[0]
    sensitive, largest = [], 0.0
    for number, cut in enumerate(cuts):
        hidden = cut.input.clone()
        hidden[:, :-1] = cut.input[:, :-1].flip(1)
        if number == 0:  # an embedding of positions stays where it is
            hidden = first_shuffled.input
        expected = cut.rerun(cut.input)[:, -1] - cut.input[:, -1]
        actual = cut.rerun(hidden)[:, -1] - hidden[:, -1]
        difference = relative_difference(actual, expected)
        largest = max(largest, difference)
        if difference > 1e-4:
            sensitive.append(cut.name)
    if sensitive:
        return f"{len(sensitive)} of {len(cuts)} layers depend on the order"
    claims = _claims_of_positions(subject, model)
    if claims:
        raise CheckFailedError(
            "in no layer does the order of earlier tokens matter (it changes the last token by "
            f"{largest:.1e} at most), though the model has {few(claims, 5)}",
            "Positions are lost: look at where rotary (or other) positions are applied to queries "
            "and keys, in attention.",
        )
    return (
        "layers depend on the order only through the causal mask (a model without positions, NoPE)"
    )


def _claims_of_positions(subject: Subject, model: torch.nn.Module) -> list[str]:
    words = ("rope", "rotary", "position", "freqs", "alibi")
    names = [field.name for field in dataclasses.fields(subject.args)]
    names += [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    claims = [name for name in names if any(word in name.lower() for word in words)]
    return claims + ["forward(positions)"] * accepts(subject.spec.model_cls, "positions")
