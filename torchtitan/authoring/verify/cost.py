"""Checks `get_nparams_and_flops` against the model itself.

FLOPs are measured by running the forward and backward pass under PyTorch's counter, at two short
lengths: the part that grows with the length is attention's, the rest is the weights'. A model that
computes in chunks pads the last one, so a count that does not fit is measured at longer lengths
too. Conventions differ, so some counts pass that leave something out, and the outcome reports it:

* attention may count all keys (as measured), or half of them (causal), or those in its window;
* `6 * num_params` (the guide's approximation) counts the embedding, which is a look-up, and no
  attention; with or without the embedding's weights.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NoReturn

import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.components.checkpoint.model_tensors import first_names
from torchtitan.models.common.state_dict import pattern_of
from torchtitan.planning.operations import FORMULAS
from torchtitan.protocols.train_spec import get_train_spec, model_flavors
from torchtitan.tools.text import few

from .batches import Example
from .check import CheckFailedError, Checks, NotApplicableError
from .subject import Subject

CHECKS = Checks("contract.spec")

_LENGTHS = ((8, 16), (64, 128), (256, 512))
"""Tokens, in pairs. The first are no longer than the windows of debug models, the others are
multiples of the usual chunk sizes."""
_TOLERANCE = 0.02


@CHECKS.of("cost.nparams", "the number of parameters is exact")
def nparams_are_exact(subject: Subject) -> str:
    """For every flavor."""
    flavors = model_flavors(subject.name) or [subject.flavor]
    wrong = []
    for flavor in dict.fromkeys([subject.flavor, *flavors]):
        spec = get_train_spec(subject.name, flavor)
        claimed = _claim(spec.model_args, subject.length)[0]
        model = spec.meta_model()
        counted = sum(parameter.numel() for parameter in model.parameters())
        if claimed != counted:
            wrong.append((flavor, claimed, counted, model))
    if not wrong:
        return f"{len(flavors)} flavors"
    flavor, claimed, counted, model = wrong[0]
    others = f" (and of {len(wrong) - 1} other flavors)" if len(wrong) > 1 else ""
    raise CheckFailedError(
        f"{flavor}{others}: {claimed:,} parameters are claimed, but the model has {counted:,}, "
        f"{abs(claimed - counted):,} {'more' if counted > claimed else 'less'}",
        f"args.py: get_nparams_and_flops. {_guess_of_difference(model, claimed - counted)}",
    )


def _claim(args: Any, seq_len: int) -> tuple[int, int]:
    try:
        nparams, flops = args.get_nparams_and_flops(seq_len)
    except NotImplementedError as error:
        raise CheckFailedError(
            f"{type(args).__name__} does not define get_nparams_and_flops(seq_len)",
            "args.py: return (num_params, flops_per_token). MFU and TFLOP/s come from it.",
        ) from error
    return nparams, flops


def _guess_of_difference(model: nn.Module, difference: int) -> str:
    """Name a part with as many parameters as the difference."""
    for name in sorted(first_names(model)):
        if model.get_parameter(name).numel() == difference:
            return f"{name} shares its weight with another tensor, so count it once."
    sizes: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        sizes[pattern_of(name).replace("{}", "N")] += parameter.numel()
    alike = [name for name, size in sizes.items() if size == abs(difference)]
    if alike:
        kind = "counted twice" if difference > 0 else "not counted"
        return f"The difference is the size of {few(alike, 5)}: perhaps {kind}."
    return "Count every weight, bias and norm once."


@CHECKS.of("cost.flops", "FLOPs per token agree with the measurement", needs=("contract.forward",))
def flops_are_as_measured(subject: Subject) -> str:
    if not subject.reads_text:
        _tell_of_own_batch(subject)
    model = subject.build().train()
    misfit: CheckFailedError | None = None
    for lengths in _LENGTHS:
        if misfit is not None and subject.at_most(lengths[-1]) < lengths[-1]:
            break
        try:
            fits = _claims_fit(model, subject, lengths)
        except CheckFailedError as error:
            misfit = misfit or error
        except Exception:  # the model may not take so many tokens
            if misfit is None:
                raise
            break
        else:
            return fits if misfit is None else f"{fits} (at {lengths[0]} tokens and more)"
    assert misfit is not None  # _LENGTHS is not empty
    raise misfit


def _tell_of_own_batch(subject: Subject) -> NoReturn:
    """Skip: a loader's batches have one length, which does not separate attention from weights."""
    measured = _measure(subject.build().train(), subject.example(2)) / 2 / subject.length
    raise NotApplicableError(
        f"applies to token ids at several lengths; for its own batches, {measured:,.0f} FLOPs are "
        f"measured for each of {subject.length} places, "
        f"{_claim(subject.args, subject.length)[1]:,} are claimed"
    )


def _claims_fit(model: nn.Module, subject: Subject, lengths: tuple[int, int]) -> str:
    measured = [_measure(model, subject.example(2, seq)) / 2 / seq for seq in lengths]
    nparams, _ = _claim(subject.args, lengths[0])
    claimed = [float(_claim(subject.args, seq)[1]) for seq in lengths]
    weights, attention = _split(measured, lengths)
    claimed_weights, claimed_attention = _split(claimed, lengths)
    notes = [
        _weights_fit(claimed_weights, weights, nparams, model),
        _attention_fits(claimed_attention, attention),
    ]
    return "; ".join(note for note in notes if note)


def _split(flops: list[float], lengths: tuple[int, int]) -> tuple[float, float]:
    """Return the FLOPs a token that do not depend on the length, and those per token of length."""
    short, long = lengths
    slope = (flops[1] - flops[0]) / (long - short)
    return flops[0] - slope * short, slope


def _measure(model: nn.Module, example: Example) -> int:
    """Return the FLOPs of a step. Uses the plain attention kernels, which the counter knows."""
    model.zero_grad()
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter, sdpa_kernel(SDPBackend.MATH):
        example.loss(example.run(model)).backward()
    if counter.get_total_flops() == 0:
        raise NotApplicableError("the model uses no operation whose FLOPs PyTorch counts")
    return counter.get_total_flops()


def _weights_fit(claimed: float, measured: float, nparams: int, model: nn.Module) -> str:
    ratio = claimed / measured
    if abs(ratio - 1) < _TOLERANCE:
        return f"weights: {measured:,.0f} FLOPs a token, as measured"
    embedding = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    has_experts = measured < 0.9 * 6 * (nparams - embedding)
    if not has_experts:
        for params, text in (
            (nparams, "6 x all parameters"),
            (nparams - embedding, "6 x the parameters without the embedding"),
        ):
            if abs(claimed / (6 * params) - 1) < _TOLERANCE / 2:
                return f"weights: approximate, {text}, {ratio - 1:+.0%} of what is measured"
    hint = "6 FLOPs per weight that multiplies the token: 2 forward and 4 backward (frozen: 2). "
    for factor, reason in (
        (2, "Twice that: a multiplication and an addition are already 2 FLOPs."),
        (1 / 2, "Half of that: 3 per weight counts only multiplications."),
        (1 / 3, "A third of that: counts only the forward pass."),
        (4 / 3, "A third more: recomputation (activation checkpointing) does not count."),
    ):
        if abs(ratio / factor - 1) < 0.05:
            hint += reason
    if has_experts and abs(claimed / (6 * nparams) - 1) < 0.1:
        hint = f"{hint.rstrip()} Of a mixture of experts, count only the experts that a token uses."
    raise CheckFailedError(
        f"{claimed:,.0f} FLOPs a token are claimed for the weights, {ratio:.2f} times the "
        f"{measured:,.0f} that are measured",
        f"args.py: get_nparams_and_flops. {hint} The output layer counts, the embedding does not.",
    )


def _attention_fits(claimed: float, measured: float) -> str:
    if measured <= 0:
        return ""
    ratio = claimed / measured
    if ratio > 1 + 2 * _TOLERANCE or ratio < -_TOLERANCE:
        raise CheckFailedError(
            f"{claimed:,.0f} FLOPs are claimed for each key that a token attends to, {ratio:.2f} "
            f"times the {measured:,.0f} that are measured",
            "args.py: get_nparams_and_flops. 12 x layers x heads x head_dim a key: 2 products of 2 "
            "FLOPs a feature, forward and twice backward.",
        )
    if ratio < _TOLERANCE:
        return "attention is left out, so that MFU is too low at long contexts"
    if abs(ratio - 1) < 2 * _TOLERANCE:
        return "attention as measured"
    if ratio > 0.5 - _TOLERANCE:  # causal kernels skip half; some compute with padded heads
        return f"attention counted as {ratio:.0%} of what is measured"
    raise CheckFailedError(
        f"{claimed:,.0f} FLOPs are claimed for each key that a token attends to, {ratio:.2f} "
        f"times the {measured:,.0f} that are measured, less than causal attention's half",
        "args.py: get_nparams_and_flops. 12 x layers x heads x head_dim a key, or 6 if it counts "
        "as causal. Count each layer.",
    )
