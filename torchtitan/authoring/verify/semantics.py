"""What a token may depend on: itself and earlier tokens of its document, and nothing else.

Dependence is asked of each layer by gradients, which are zero exactly where there is no path, and
of the whole model by changing tokens, which also finds paths without gradients (routing). The model
is the untrained one with noise where weights are 0, since a path of zeros is none.
"""

from __future__ import annotations

import dataclasses

import torch

from .check import Check, CheckFailedError, NotApplicableError
from .probe import (
    accepts,
    cut_layers,
    layer_calls,
    recorded_outputs,
    relative_difference,
    rerun,
    some,
)
from .subject import Subject
from .weights import BUILDS

TOLERANCE = 1e-4
"""Of logits in float32, over the largest: what may come from the order of sums. A dependence on
another token is orders of magnitude above it."""

_NEEDS = ("contract.layers", BUILDS)
_ROUTING = (
    "A mixture of experts must not drop tokens that exceed a capacity, nor let experts choose "
    "tokens: then a token's output depends on which others are in the batch."
)


def no_token_sees_a_later_one(subject: Subject) -> str:
    """The output of a token does not depend on later ones."""
    model, tokens = subject.build_varied(), subject.tokens(1)
    seq = tokens.shape[1]
    queries = sorted({0, 1, seq // 3, seq // 2, seq - 2})
    for cut in cut_layers(model, tokens):
        for query in queries:
            later = cut.gradient((slice(None), query))[0, query + 1 :]
            if (later > 0).any():
                leak = query + 1 + int(later.argmax())
                raise CheckFailedError(
                    f"{cut.name}: token {query} sees {int((later > 0).sum())} later tokens, "
                    f"{some([str(query + 1 + int(i)) for i in later.nonzero().flatten()], 3)}; "
                    f"most of all token {leak}",
                    _mask_hint(query, later),
                )
    for seed in (1, 2, 3):
        _later_tokens_change_nothing(model, tokens, subject.tokens(1, seed=seed))
    return f"{len(model.layers)} layers, queries {some([str(q) for q in queries])} of {seq}"


def _mask_hint(query: int, later: torch.Tensor) -> str:
    if int((later > 0).sum()) == 1 and later[0] > 0:
        return (
            f"The mask is off by one: query {query} may look at keys up to {query}, "
            "torch.ones(seq, seq).tril(), not tril(1)."
        )
    return "Attention: F.scaled_dot_product_attention(q, k, v, is_causal=True), or a causal mask."


@torch.no_grad()
def _later_tokens_change_nothing(
    model: torch.nn.Module, tokens: torch.Tensor, others: torch.Tensor
) -> None:
    """Routing has no gradient, so this asks the whole model."""
    place = tokens.shape[1] // 2
    changed = torch.cat([tokens[:, :place], others[:, place:]], dim=1)
    with recorded_outputs(model) as before:
        expected = model(tokens)
    with recorded_outputs(model) as after:
        actual = model(changed)
    difference = relative_difference(actual[:, :place], expected[:, :place])
    module = _first_module(after, before, slice(0, place))
    if difference > TOLERANCE or module:
        raise CheckFailedError(
            f"changing tokens from {place} on changes logits of earlier ones by {difference:.1e} "
            f"of the largest; the first module that differs is {module or 'unknown'}",
            f"It is no path that gradients take, so a choice. {_ROUTING}",
        )


def _first_module(
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    places: slice = slice(None),
    rows: slice = slice(None),
) -> str:
    """The first module whose output `[batch, seq, features]` differs, by its own scale; or "".

    More sensitive than logits, since what layers add to an untrained model's residual stream is
    small.

    Args:
        places: tokens to compare.
        rows: sequences of `expected` that `actual` has.
    """
    for name, tensor in expected.items():
        other = actual.get(name)
        if other is None or tensor.ndim != 3 or other.ndim != 3 or not tensor.is_floating_point():
            continue
        a, b = other[:, places], tensor[rows, places]
        if a.shape == b.shape and relative_difference(a, b) > TOLERANCE:
            return name
    return ""


def tokens_see_earlier_ones(subject: Subject) -> str:
    """Every layer that mixes tokens lets them see earlier ones and themselves."""
    model, tokens = subject.build_varied(), subject.tokens(1)
    last = tokens.shape[1] - 1
    mixing: dict[str, bool] = {}
    kinds: dict[str, type] = {}
    for cut in cut_layers(model, tokens):
        seen = cut.gradient((slice(None), last))[0]
        mixing[cut.name], kinds[cut.name] = bool((seen[:last] > 0).any()), type(cut.module)
        if seen[last] == 0:
            raise CheckFailedError(
                f"{cut.name}: the output of token {last} does not depend on its own input",
                "The residual connection is missing, and the mask leaves out the query's own key.",
            )
        if mixing[cut.name]:
            nearest = int(seen[:last].nonzero().max())
            if nearest < last - 1:
                raise CheckFailedError(
                    f"{cut.name}: token {last} sees {nearest}, but not the nearer {nearest + 1}",
                    "A window or chunk ends at the query, not before it.",
                )
    if not any(mixing.values()):
        raise CheckFailedError(
            "in no layer does a token see earlier ones: each is processed alone",
            "The mask leaves the diagonal alone, or attention is over the wrong dimension: "
            "F.scaled_dot_product_attention wants [batch, heads, seq, head_dim].",
        )
    for name, mixes in mixing.items():
        if not mixes and any(kinds[n] is kinds[name] for n, other in mixing.items() if other):
            raise CheckFailedError(
                f"{name}: no token sees an earlier one, though other layers of its kind, "
                f"{kinds[name].__name__}, let them",
                "Look for what depends on the layer's number: its mask or its window.",
            )
    return f"{sum(mixing.values())} of {len(mixing)} layers mix tokens"


def documents_are_apart(subject: Subject) -> str:
    """A document gives the same in a packed sequence as alone."""
    if not accepts(subject.spec.model_cls, "document_ids"):
        raise NotApplicableError("forward() takes no document_ids, so documents are not told apart")
    model, tokens = subject.build_varied(), subject.tokens(1)
    seq = tokens.shape[1]
    start = seq // 3  # of the second document
    ids = (torch.arange(seq) >= start).long()[None]
    inputs = {"document_ids": ids}
    positions = torch.cat([torch.arange(start), torch.arange(seq - start)])[None]
    if accepts(subject.spec.model_cls, "positions"):
        inputs["positions"] = positions
    for cut in cut_layers(model, tokens, **inputs):
        seen = cut.gradient((slice(None), slice(start, None)))[0, :start]
        if (seen > 0).any():
            raise CheckFailedError(
                f"{cut.name}: tokens of the second document, from {start} on, see "
                f"{int((seen > 0).sum())} tokens of the first",
                "The mask must hold (document_ids[:, :, None] == document_ids[:, None, :]) besides "
                "the causal rule; see CausalMask in torchtitan/models/common/attention.py. Models "
                "without it must not take document_ids.",
            )
    with torch.no_grad():
        packed = model(tokens, **inputs)[:, start:]
        alone = model(tokens[:, start:])
    difference = relative_difference(packed, alone)
    if difference > TOLERANCE and "positions" in inputs:
        raise CheckFailedError(
            f"the second document's logits differ by {difference:.1e} of the largest from those "
            "that it has alone",
            "Positions count from the beginning of each document: use the argument `positions`, "
            "not torch.arange(seq), wherever places matter.",
        )
    return f"documents of {start} and {seq - start} tokens, equal to {difference:.0e}"


def positions_are_used(subject: Subject) -> str:
    """The argument `positions` counts from 0 by default, and changes what it should."""
    if not accepts(subject.spec.model_cls, "positions"):
        raise NotApplicableError("forward() takes no positions")
    model, tokens = subject.build_varied(), subject.tokens(2)
    counted = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        expected = model(tokens)
        for positions in (counted, counted.expand_as(tokens)):
            difference = relative_difference(model(tokens, positions=positions), expected)
            if difference > TOLERANCE:
                raise CheckFailedError(
                    f"positions 0, 1, 2, ... {list(positions.shape)} give other logits than None, "
                    f"by {difference:.1e} of the largest",
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


@torch.no_grad()
def order_matters(subject: Subject) -> str:
    """Some layer tells the same earlier tokens in another order apart."""
    model, tokens = subject.build_varied(), subject.tokens(1, 24)
    shuffled = tokens.clone()
    shuffled[:, :-1] = tokens[:, :-1].flip(1)
    calls = layer_calls(model, tokens)
    cuts = cut_layers(model, tokens)
    first_shuffled = cut_layers(model, shuffled)[0]
    sensitive, largest = [], 0.0
    for number, cut in enumerate(cuts):
        hidden = cut.input.clone()
        hidden[:, :-1] = cut.input[:, :-1].flip(1)
        if number == 0:  # whatever the embedding adds for a position stays where it is
            hidden = first_shuffled.input
        expected = rerun(cut, cut.input, calls)[:, -1] - cut.input[:, -1]
        actual = rerun(cut, hidden, calls)[:, -1] - hidden[:, -1]
        difference = relative_difference(actual, expected)
        largest = max(largest, difference)
        if difference > 1e-4:
            sensitive.append(cut.name)
    if sensitive:
        return f"{len(sensitive)} of {len(cuts)} layers tell the order apart"
    claims = _claims_of_positions(subject, model)
    if claims:
        raise CheckFailedError(
            "in no layer does the order of earlier tokens matter (it changes the last token by "
            f"{largest:.1e} at most), though the model has {some(claims)}",
            "Positions get lost: look at where rotary (or other) positions are applied to queries "
            "and keys, in attention.",
        )
    return "no layer tells the order apart but by the causal mask (a model without positions, NoPE)"


def _claims_of_positions(subject: Subject, model: torch.nn.Module) -> list[str]:
    words = ("rope", "rotary", "position", "freqs", "alibi")
    names = [field.name for field in dataclasses.fields(subject.args)]
    names += [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    claims = [name for name in names if any(word in name.lower() for word in words)]
    return claims + ["forward(positions)"] * accepts(subject.spec.model_cls, "positions")


def rows_are_independent(subject: Subject) -> str:
    """A sequence gives the same alone as in a batch, in training too."""
    model, tokens = subject.build_varied(), subject.tokens(3)
    model.train()
    for cut in cut_layers(model, tokens):
        seen = cut.gradient((1,))
        if (seen[[0, 2]] > 0).any():
            raise CheckFailedError(
                f"{cut.name}: a sequence of a batch sees the others",
                "Look for a norm or mean over the batch (dimension 0), a view() that mixes batch "
                f"and sequence, or attention over the batch. {_ROUTING}",
            )
    model.eval()
    with torch.no_grad():
        with recorded_outputs(model) as in_batch:
            batched = model(tokens)
        with recorded_outputs(model) as alone:
            single = model(tokens[1:2])
    difference = relative_difference(single, batched[1:2])
    module = _first_module(alone, in_batch, rows=slice(1, 2))
    if difference > TOLERANCE or module:
        raise CheckFailedError(
            f"a sequence alone gives other logits than in a batch of 3, by {difference:.1e} of the "
            f"largest; the first module that differs is {module or 'unknown'}",
            f"Nothing may depend on the size of the batch or on other sequences. {_ROUTING}",
        )
    return f"equal to {difference:.0e}"


@torch.no_grad()
def trailing_tokens_do_not_matter(subject: Subject) -> str:
    """A prefix gives the same alone as with padding behind it."""
    model, tokens = subject.build_varied(), subject.tokens(2)
    length = tokens.shape[1] // 2 + 3
    padded = tokens.clone()
    padded[:, length:] = 0
    with recorded_outputs(model) as long:
        expected = model(padded)[:, :length]
    with recorded_outputs(model) as short:
        actual = model(tokens[:, :length])
    difference = relative_difference(actual, expected)
    module = _first_module(short, long, slice(0, length))
    if difference > TOLERANCE or module:
        raise CheckFailedError(
            f"{length} tokens give other logits alone than with {tokens.shape[1] - length} tokens "
            f"of padding behind them, by {difference:.1e} of the largest; the first module that "
            f"differs is {module or 'unknown'}",
            "Nothing may depend on the length of the sequence: no mean over it, and positions "
            "count from its beginning.",
        )
    return f"equal to {difference:.0e}"


def any_length_works(subject: Subject) -> str:
    """Sequences of 1, 2 and an odd number of tokens, and longer than windows and chunks."""
    model = subject.build_varied()
    limits = window_sizes(subject)
    lengths = [1, 2, 17, *(2 * limit + 1 for limit in limits if limit <= 512)]
    longest = getattr(subject.args, "max_seq_len", None)
    if isinstance(longest, int):
        lengths = [n for n in lengths if n <= longest] + [longest] * (longest <= 2048)
    reference = None
    for length in sorted(set(lengths), reverse=True):
        tokens = subject.tokens(1, max(lengths))[:, :length]
        try:
            logits = model(tokens)
            logits.float().square().mean().backward()
        except Exception as error:
            raise CheckFailedError(
                f"sequences of {length} tokens fail: {type(error).__name__}: {error}",
                "forward() must take any length: no table of a fixed size, no division by "
                "seq - 1, no view() that needs a multiple.",
            ) from error
        if list(logits.shape[:2]) != [1, length] or not logits.isfinite().all():
            raise CheckFailedError(
                f"sequences of {length} tokens give {list(logits.shape)} logits"
                + ("" if logits.isfinite().all() else " that are not finite")
            )
        reference = logits.detach() if reference is None else reference
        difference = relative_difference(logits.detach(), reference[:, :length])
        if difference > TOLERANCE:
            raise CheckFailedError(
                f"the first {length} tokens give other logits alone than within "
                f"{max(lengths)}, by {difference:.1e} of the largest",
                "Look at windows, chunks and position tables at this length.",
            )
    return f"lengths {some([str(n) for n in sorted(set(lengths))], 8)}"


def window_sizes(subject: Subject) -> list[int]:
    """Sizes of sliding windows and chunks, by the names of the args' fields."""
    fields = {f.name: getattr(subject.args, f.name) for f in dataclasses.fields(subject.args)}
    return sorted(
        {
            value
            for name, value in fields.items()
            if ("window" in name or "chunk" in name) and type(value) is int and value > 0
        }
    )


@torch.no_grad()
def forward_is_repeatable(subject: Subject) -> str:
    """In evaluation, the logits are a function of the tokens alone."""
    model = subject.build_varied()
    tokens, others = subject.tokens(2), subject.tokens(2, 40, seed=1)
    with recorded_outputs(model) as first:
        expected = model(tokens)
    model(others)
    torch.manual_seed(12345)
    with recorded_outputs(model) as second:
        actual = model(tokens)
    if not torch.equal(actual, expected):
        names = [n for n, t in first.items() if n in second and not torch.equal(t, second[n])]
        raise CheckFailedError(
            "the same tokens give other logits the second time"
            + (f"; the first module that differs is {names[0]}" if names else ""),
            "In eval() there may be no dropout (F.dropout needs training=self.training), and "
            "forward() may keep nothing from one call for the next, such as a cache or a mask.",
        )
    return "equal bit by bit"


CHECKS = (
    Check(
        "semantics.causality", "no token sees a later one", no_token_sees_a_later_one, needs=_NEEDS
    ),
    Check("semantics.memory", "tokens see earlier ones", tokens_see_earlier_ones, needs=_NEEDS),
    Check(
        "semantics.documents",
        "packed documents do not see each other",
        documents_are_apart,
        needs=_NEEDS,
    ),
    Check(
        "semantics.positions", "forward(positions=...) is used", positions_are_used, needs=_NEEDS
    ),
    Check("semantics.order", "the order of tokens matters", order_matters, needs=_NEEDS),
    Check(
        "semantics.batch",
        "sequences of a batch are independent",
        rows_are_independent,
        needs=_NEEDS,
    ),
    Check(
        "semantics.padding",
        "trailing tokens do not matter",
        trailing_tokens_do_not_matter,
        needs=_NEEDS,
    ),
    Check("semantics.lengths", "sequences of any length work", any_length_works, needs=_NEEDS),
    Check(
        "semantics.repeatable",
        "evaluation is a function of the tokens alone",
        forward_is_repeatable,
        needs=_NEEDS,
    ),
)
