"""Judges a layout: whether it trains like one process, and if not, where the difference begins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from torchtitan.components.checkpoint.model_tensors import buffer_names
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import CONFIG_KEYS
from torchtitan.tools.text import few
from torchtitan.train import Trainer

from .check import CheckFailedError
from .compare import Difference, RankPart, compare_outputs, compare_tensors
from .loss_and_loader import SUM
from .reference import LEARNING_RATE, STEPS, Recording


@dataclass(frozen=True)
class Limits:
    """Tolerated errors, relative. Another layout sums in another order, so it rounds differently.

    Over all layouts and models of the zoo, float32 differs by at most 3e-7 of a loss, 2e-6 of a
    gradient and of a weight, and float64 by 1e-14. The limits are between these and mistakes.
    """

    loss: float
    gradient: float
    weight: float
    output: float
    """Only serves to locate a difference."""
    initial: float
    recomputed: float

    @property
    def that_decide(self) -> dict[str, float]:
        """Quantity -> its limit."""
        return {
            "loss": self.loss,
            "gradient norm": self.gradient,
            "gradient": self.gradient,
            "weight": self.weight,
        }


_LIMITS = {
    torch.float32: Limits(1e-4, 1e-3, 1e-4, output=1e-4, initial=1e-6, recomputed=1e-5),
    torch.float64: Limits(1e-9, 1e-8, 1e-9, output=1e-9, initial=1e-14, recomputed=1e-12),
}


def limits() -> Limits:
    """Return the limits of the dtype in which this process computes."""
    return _LIMITS[torch.get_default_dtype()]


@dataclass
class Comparison:
    """The findings of a rank, to be shared with the others."""

    errors: dict[str, float]
    """The largest error of each of `Limits.that_decide`."""
    first_loss_error: float = 0.0
    """Error of the loss of the first step alone, which has the same weights."""
    names: set[str] = field(default_factory=set)
    """Names of this rank's parameters and buffers."""
    buffers: set[str] = field(default_factory=set)
    """Those of the buffers alone."""
    initial: list[Difference] = field(default_factory=list)
    outputs: list[Difference] = field(default_factory=list)
    recomputed: list[Difference] = field(default_factory=list)
    gradients: list[Difference] = field(default_factory=list)
    weights: list[Difference] = field(default_factory=list)
    compared: int = 0
    """Outputs of modules that could be compared."""
    left_out: int = 0
    recomputes: bool = True


def compare_runs(trainer: Trainer, run: Recording, reference: Recording) -> Comparison:
    """Compare this rank's recording with the reference."""
    limit = limits()
    found = Comparison(
        errors={
            "loss": largest_relative(run.losses, reference.losses),
            "gradient norm": largest_relative(run.grad_norms, reference.grad_norms),
        },
        first_loss_error=largest_relative(run.losses[:1], reference.losses[:1]),
        names=set(run.weights),
        buffers=buffer_names(trainer.model_parts),
        recomputes=bool(run.recomputed),
    )
    found.initial, _ = compare_tensors(run.initial, reference.initial, limit.initial)
    found.outputs, found.compared, found.left_out = compare_outputs(
        run.outputs, reference.outputs, RankPart(trainer), limit.output
    )
    found.recomputed = _compare_recomputed(run)

    # A gradient that should be 0 is rounding error: it is compared relative to the others' size.
    squares = sum(float(g.double().square().sum()) for g in reference.gradients.values())
    numbers = sum(g.numel() for g in reference.gradients.values())
    found.gradients, found.errors["gradient"] = compare_tensors(
        {name: torch.zeros_like(weight) for name, weight in run.weights.items()} | run.gradients,
        reference.gradients,
        limit.gradient,
        floor=1e-2 * math.sqrt(squares / max(numbers, 1)),
    )
    found.weights, found.errors["weight"] = compare_tensors(
        run.weights, reference.weights, limit.weight, floor=LEARNING_RATE * STEPS
    )
    return found


def judge(found: list[Comparison], reference: Recording, job_config: JobConfig) -> str:
    """Judge the layout by the findings of all ranks, alike on each. Return the measurements.

    Raises:
        CheckFailedError: the layout trains differently; names where that begins.
    """
    _refuse_other_names(found, reference)
    refuse = partial(_refuse, found, reference, job_config)
    refuse("initial")
    decide = limits().that_decide
    errors = {name: _max_error(c.errors[name] for c in found) for name in decide}
    wrong = {name: error for name, error in errors.items() if not error <= decide[name]}
    compared = sum(c.compared for c in found)
    if not wrong:
        left_out = max(c.left_out for c in found)
        not_placed = f", {left_out} outputs not comparable" if left_out and compared else ""
        return (
            f"off by {errors['loss']:.0e} of the loss, {errors['gradient']:.0e} of a gradient, "
            f"{errors['weight']:.0e} of a weight{not_placed}"
        )

    summary = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
    summary = f". Off in all: {summary}"
    refuse("outputs", summary)
    refuse("recomputed", summary)
    first_loss = _max_error(c.first_loss_error for c in found)
    if compared and not first_loss <= limits().loss / 10:  # untrained, tokens are very similar
        raise CheckFailedError(
            f"outputs agree, but the loss of step 1 is off by {first_loss:.2g}{summary}",
            SUM,
        )
    refuse("gradients", summary)
    refuse("weights", summary)
    raise CheckFailedError(
        "outputs, gradients and weights agree, but not the metrics that the trainer "
        f"reports{summary}",
        "The loss of the last stage, or of a rank, does not belong to its tokens.",
    )


def _refuse_other_names(found: list[Comparison], reference: Recording) -> None:
    expected, names = reference.weights.keys(), set().union(*(c.names for c in found))
    missing, extra = sorted(expected - names), sorted(names - expected)
    if missing or extra:
        lacks = f"no rank has {few(missing)}" if missing else ""
        has = f"there is {few(extra)}, which one process does not have" if extra else ""
        raise CheckFailedError(
            f"parameters and buffers have different names: {'; '.join(filter(None, (lacks, has)))}",
            "A checkpoint could not be loaded in another layout. A wrapper module must not change "
            "names (replace module.forward instead), and weights that are tied on one process "
            "must be tied before build_pipeline gets the model, which keeps them equal.",
        )


def _refuse(
    found: list[Comparison],
    reference: Recording,
    job_config: JobConfig,
    kind: str,
    end: str = "",
) -> None:
    """Raise `CheckFailedError` if tensors of a kind differ, and name where that begins."""
    differences = [(d, rank) for rank, c in enumerate(found) for d in getattr(c, kind)]
    if not differences:
        return
    places = {name: place for place, name in enumerate(reference.outputs)}

    def place_of(difference: tuple[Difference, int]) -> tuple[int, int]:
        """Return where the tensor's module ends in the forward pass, and the rank."""
        name, rank = difference[0].name, difference[1]
        while name and name not in places:
            name = name.rpartition(".")[0]
        return places.get(name, len(places)), rank

    # An error in gradients spreads backwards, so it begins at the last of them.
    choose = max if kind == "gradients" else min
    begin, rank = choose(differences, key=place_of)
    if kind == "weights" and begin.name in found[rank].buffers:
        kind = "buffers"
    others = len({d.name for d, _ in differences}) - 1
    also = f"; {others} more differ" if others else ""
    where = _PLACES[kind].format(begin.name or "the model")
    message = f"{where}: {begin} (rank {rank}){also}{end}"
    raise CheckFailedError(message, hint_of(kind, job_config))


_PLACES = {
    "initial": "the initial value of {} differs",
    "outputs": "the first module whose output differs is {}",
    "recomputed": "recomputed in the backward pass, {} gives a different output",
    "gradients": "outputs agree; the last parameter whose gradient differs is {}",
    "weights": "gradients agree in step 1; the weight {} differs at the end",
    "buffers": "gradients agree in step 1; the buffer {} differs at the end",
}

_ADDED = (
    "A loss whose gradients are added in the backward pass, such as one that balances experts, "
    "must be a sum over tokens, not a mean over those of a forward pass (docs/own_parts.md, A loss "
    "of several terms)"
)
_COMPILED = (
    "the compiled block computes something else: try compile.backend = 'eager' to tell tracing "
    "from code generation"
)
_HINTS = {
    ("initial", ""): "init_weights() must be a function of the parameter: no random generator of "
    "its own, no counter over layers; use nn.init and the layer's own number",
    ("outputs", "tp"): "the tensor-parallel plan in parallelize.py. Usual mistakes: "
    "RowwiseParallel left out for a matrix that reads split features (its result is a part of a "
    "sum); a norm that is not SequenceParallel; view() with the number of all heads instead of -1; "
    "a matrix of queries, keys and values whose rows are not ordered by head; a bias that each "
    "rank adds",
    ("outputs", "cp"): (
        "RoPE must turn by the `positions` that forward() is given, not by arange(seq); attention "
        "and its mask must be ScaledDotProductAttention and CausalMask. Code that mixes tokens by "
        "other means than attention (a recurrence, a convolution, a shift) sees only this rank's "
        "part of the sequence: such a model must leave apply_cp out"
    ),
    ("outputs", "pp"): (
        "a stage has some of the layers, under their original names, and runs once: a loop over "
        "all layers needs pipeline_fn=None, code that depends on a layer must use its own number, "
        "not its place in self.layers, and forward() must use `positions` and `document_ids`"
    ),
    (
        "outputs",
        "ep",
    ): "the router must score each token independently, and experts must accept rows in any order",
    ("outputs", "dp"): "something is computed over the batch, of which each rank has only a part",
    ("outputs", "ac"): (
        "checkpointed blocks compute different results: forward() depends on whether gradients are "
        "enabled (torch.is_grad_enabled, or use_reentrant=True), or on its calls before"
    ),
    ("outputs", "compile"): _COMPILED,
    ("outputs", ""): "something depends on the number of sequences in a forward pass, or is kept "
    "from one to the next",
    ("gradients", "tp"): "the tensor-parallel plan: a parameter that is used for a part of the "
    "sequence must be replicated as a DTensor (SequenceParallel), so that its gradients are added",
    ("gradients", "cp"): "apply_fsdp must be called when parallel_dims.dp_enabled, which is true "
    "under context parallelism too; no parameter may stay outside",
    ("gradients", "pp"): "every micro-batch must add to the gradients; weights must be tied before "
    "build_pipeline gets the model, which then adds up the gradients of their copies",
    ("gradients", "ep"): "experts are sharded over meshes of their own: own_meshes of apply_fsdp",
    ("gradients", "dp"): "fully_shard must be called for the whole model after its blocks, and "
    f"leave no parameter out: gradients of others are not added up over the data ranks. {_ADDED}",
    ("gradients", "ac"): (
        "the recomputed forward pass must equal the first one: no state, no random numbers outside "
        "of torch, apply_ac around whole blocks"
    ),
    ("gradients", "compile"): _COMPILED,
    ("gradients", ""): _ADDED,
    ("weights", ""): "all parameters must be given to the optimizer with requires_grad, in each "
    "stage and shard; see build_optimizer_fn",
    ("buffers", ""): (
        "forward() sees a micro-batch of one rank: let it only add to a buffer that is not saved, "
        "and change the others by its sum over all ranks, once a step (docs/own_modules.md, State "
        "that is not trained)"
    ),
}
"""Kind, and parallelism of the layout -> the usual mistakes."""


def hint_of(kind: str, job_config: JobConfig) -> str:
    """Return the usual mistakes of the layout's features, by the kind of tensor that differs."""
    kind = "gradients" if kind == "recomputed" else kind
    hints = [_HINTS[kind, name] for name in parallelisms(job_config) if (kind, name) in _HINTS]
    return ". ".join(hints) or _HINTS[kind, ""]


def parallelisms(job_config: JobConfig) -> list[str]:
    """Return the features that the layout uses: tp, cp, pp, ep, dp, ac, compile."""
    degrees = {name: getattr(job_config.parallelism, key) for name, key in CONFIG_KEYS.items()}
    used = [name for name in ("tp", "cp", "pp", "ep") if degrees[name] > 1]
    others = math.prod(degrees[name] for name in ("tp", "cp", "pp"))
    if dist.get_world_size() > others and not used:
        used.append("dp")
    if job_config.activation_checkpoint.mode != "none":
        used.append("ac")
    if job_config.compile.enable:
        used.append("compile")
    return used


def _compare_recomputed(run: Recording) -> list[Difference]:
    """Find modules whose output in the backward pass differs from the forward pass."""
    differences = []
    for name, outputs in run.recomputed.items():
        before = run.outputs.get(name, [])
        if len(before) != 1 or len(outputs) != 1 or outputs[0].shape != before[0].shape:
            continue  # micro-batches return in another order
        found, _ = compare_tensors({name: outputs[0]}, {name: before[0]}, limits().recomputed)
        differences += found
    return differences


def _max_error(errors: Iterable[float]) -> float:
    """Return the largest error; NaN is worse than any number."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def largest_relative(values: list[float], reference: list[float]) -> float:
    """Return the largest error, each relative to its reference; if that is 0, to the largest."""
    largest = max(map(abs, reference)) or 1.0  # a loss with a margin may be 0
    pairs = zip(values, reference, strict=True)
    return _max_error(abs(a - b) / (abs(b) or largest) for a, b in pairs)
