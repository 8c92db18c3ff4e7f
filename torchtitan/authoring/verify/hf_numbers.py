"""Compares the numbers of each layer with those of a Hugging Face checkpoint (`--hf`).

Both models get the same tokens. Hidden states are compared before the first layer, after each
layer, and at the end; within the first layer that differs, the outputs of modules whose weights
the adapter maps onto each other. Constant tensors of the checkpoint get noise in both models: the
norms of a new model are all 1, and could be exchanged without notice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from torchtitan.components.checkpoint.model_tensors import buffer_names, first_names
from torchtitan.distributed.determinism import derive_seed
from torchtitan.distributed.init import initialize_weights
from torchtitan.models.from_hf import read_hf_config
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol
from torchtitan.tools.text import few

from .check import CheckFailedError, Checks, NotApplicableError
from .hf_files import adapter_of_files, args_of, folder_of, model_of_files
from .invariances import window_sizes
from .probe import States, is_constant, recorded_states, relative_difference, with_noise
from .subject import Subject

CHECKS = Checks("adapter.hf_names")

_TOLERANCE = 1e-4
"""Largest difference allowed in hidden states and logits in float32, relative to the largest."""

_BEYOND = 64
"""Tokens after a window, which no longer see the first ones."""
_CARRIED = 256
"""Of chunks up to this size three are reached: a recurrence carries what the first leaves."""
_OPERATIONS = 6e12
"""Limit on the FLOPs of a forward and backward pass, to see where windows end. The check runs a
third of it, the forward pass, on both models: some minutes on a CPU."""


@CHECKS.of("adapter.hf_numbers", "logits and every layer equal those of transformers", timeout=600)
def numbers_match(subject: Subject) -> str:
    subject.require_ids()
    folder = _without_constants(folder_of(subject), subject)
    theirs = _load_theirs(folder)
    ours = _load_ours(subject, folder)
    config = theirs.config.get_text_config()
    reached = _beyond_windows(subject, args_of(subject), config)
    tokens = subject.random_tokens(2 if reached.length == subject.length else 1, reached.length)
    tokens = tokens % min(subject.vocab_size, config.vocab_size)
    our_layers, their_layers = [f"layers.{n}" for n in ours.layers], _layers_of(theirs)
    if len(our_layers) != len(their_layers):
        raise CheckFailedError(f"{len(our_layers)} layers, not {len(their_layers)}")
    layers = dict(zip(our_layers, their_layers, strict=True))
    pairs = _pairs(ours, theirs, adapter_of_files(subject)) | layers
    our_modules = [(mine, ours.get_submodule(mine)) for mine in pairs]
    their_modules = [(other, theirs.get_submodule(other)) for other in pairs.values()]
    with torch.no_grad(), recorded_states(our_modules) as a, recorded_states(their_modules) as b:
        our_logits, their_logits = ours(tokens), theirs(tokens, use_cache=False).logits
    worst = 0.0
    for number, (mine, other) in enumerate(layers.items()):
        (our_input, our_output), (their_input, their_output) = a[mine], b[other]
        if number == 0 and (d := _difference(our_input, their_input)) > _TOLERANCE:
            raise CheckFailedError(
                f"the input of {mine} differs by {d:.1e} of the largest: the embedding",
                "Look at a factor of the embedding (Gemma: sqrt(dim)), positions, or a norm.",
            )
        difference = _difference(our_output, their_output)
        if difference > _TOLERANCE:
            inner = {m: o for m, o in pairs.items() if m.startswith(f"{mine}.")}
            where, hint = _within(inner, a, b)
            first = _first_token(our_output, their_output)
            ended = [window for window in reached.windows if window - 1 <= first <= window + 1]
            if ended:
                hint = (
                    f"Earlier tokens agree, so look at the window or chunk of {ended[0]}: in most "
                    f"models query q sees the {ended[0]} keys q - {ended[0] - 1} to q, including "
                    "itself."
                )
            raise CheckFailedError(
                f"{mine} is the first layer that differs from {other}, by {difference:.1e} of the "
                f"largest{f', from token {first} on' if first else ''}{where}",
                hint,
            )
        worst = max(worst, difference)
    difference = relative_difference(our_logits, their_logits)
    if difference > _TOLERANCE:
        raise CheckFailedError(
            f"all layers agree, but the logits differ by {difference:.1e} of the largest",
            "Look at the final norm, at the output layer (tied?), and at a factor or soft limit of "
            "the logits.",
        )
    return (
        f"logits of {reached.length} tokens equal to {difference:.0e}, layers to {worst:.0e}"
        f"{reached.note}"
    )


@dataclass(frozen=True)
class _Reached:
    """The number of tokens to compare, such that the windows of attention end within them."""

    length: int
    windows: list[int]
    """Windows and chunks that end within the tokens."""
    note: str
    """The windows that do not end within them, for a message."""


def _beyond_windows(subject: Subject, args: BaseModelArgs, config: Any) -> _Reached:
    """Choose as many tokens as needed, as both models take, and as can be computed.

    Args:
        args: of our model of these files.
        config: the transformers config of the text part.
    """
    longest = [getattr(config, "max_position_embeddings", None), getattr(args, "max_seq_len", None)]
    most = min((n for n in longest if isinstance(n, int)), default=2**62)
    length, reached, left = subject.length, [], []
    for window in sorted({*window_sizes(vars(args)), *window_sizes(config.to_dict())}):
        wanted = window + 1 + max(_BEYOND, min(window, _CARRIED))
        if window >= most:  # the window never ends
            continue
        wanted = min(wanted, most)
        if args.get_nparams_and_flops(wanted)[1] * wanted > _OPERATIONS:
            left.append(str(window))
        else:
            length = max(length, wanted)
            reached.append(window)
    note = f"; they do not reach the window of {', '.join(left)}" if left else ""
    return _Reached(length, reached, note)


def _first_token(a: torch.Tensor, b: torch.Tensor) -> int:
    """Return the first token whose hidden states `[batch, seq, dim]` differ; 0 if shapes differ."""
    if a.shape != b.shape or a.ndim != 3:
        return 0
    limit = _TOLERANCE * b.abs().max()
    return int(((a - b).abs().amax(dim=(0, 2)) > limit).long().argmax())


def _without_constants(folder: Path, subject: Subject) -> Path:
    """Return a folder with noise in the constant tensors; `folder` itself if there are none."""
    copied = subject.folder / "hf_with_noise"
    changed: set[str] = set()
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        constant = [name for name, tensor in tensors.items() if is_constant(tensor)]
        if constant:
            for name in constant:
                with_noise(tensors[name], derive_seed(subject.seed, "noise", name))
            copied.mkdir(exist_ok=True)
            save_file(tensors, copied / file.name, metadata={"format": "pt"})
            changed.add(file.name)
    if not changed:
        return folder
    for file in folder.iterdir():
        if file.name not in changed:
            (copied / file.name).symlink_to(file.resolve())
    return copied


def _load_theirs(folder: Path) -> Any:
    """Load transformers' model. Raises `NotApplicableError` if there is nothing to compare with."""
    try:
        import transformers
    except ImportError as error:
        raise NotApplicableError(
            "transformers is not installed: pip install transformers to compare numbers"
        ) from error
    config = read_hf_config(folder)
    kind = config.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        told = f"model_type = {kind!r}" if kind else "a config.json without model_type"
        raise NotApplicableError(
            f"transformers {transformers.__version__} has no model of {told} to compare with"
        )
    masked = str(config.get("architectures")).endswith("ForMaskedLM']")
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.eval()


def _load_ours(subject: Subject, folder: Path) -> ModelProtocol:
    """Load our model by the adapter of this spec, whatever other models are registered."""
    model = model_of_files(subject)
    initialize_weights(model, subject.seed, torch.device("cpu"))
    hf: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        hf |= load_file(file)
    state = adapter_of_files(subject).from_hf(hf)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = first_names(model)
    buffers = buffer_names([model])
    missing = [name for name in missing if name not in tied and name not in buffers]
    if missing or unexpected:
        raise CheckFailedError(
            f"from_hf() of the files lacks or has too many of {few([*missing, *unexpected], 5)}",
            "state_dict_adapter.py: from_hf() must give the names of model.state_dict().",
        )
    return model.float().eval()


def _layers_of(theirs: nn.Module) -> list[str]:
    for name, module in theirs.named_modules():
        has_usual_name = name.rpartition(".")[2] in ("layers", "layer", "h")
        if has_usual_name and isinstance(module, nn.ModuleList):
            return [f"{name}.{number}" for number in range(len(module))]
    raise NotApplicableError(f"{type(theirs).__name__} has no list of layers")


def _pairs(ours: nn.Module, theirs: nn.Module, adapter: Any) -> dict[str, str]:
    """Pair the modules of both models that have the same weight, by the adapter's names."""
    modules = dict(theirs.named_modules())
    pairs = {}
    for name, module in ours.named_modules():
        key = f"{name}.weight"
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        try:
            (other,) = adapter.to_hf({key: module.weight.detach()})
        except Exception:
            continue
        other = other.removesuffix(".weight")
        if other in modules:
            pairs[name] = other
    return pairs


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() != b.numel():
        return float("inf")
    return relative_difference(a.flatten(2), b.flatten(2).view_as(a.flatten(2)))


def _within(pairs: dict[str, str], a: States, b: States) -> tuple[str, str]:
    """Return the first difference within a layer, and the likely mistake."""
    for mine in (name for name in a if name in pairs and pairs[name] in b):  # as they complete
        other = pairs[mine]
        (our_input, our_output), (their_input, their_output) = a[mine], b[other]
        if _difference(our_input, their_input) > _TOLERANCE:
            return (
                f"; in it, the input of {mine} (theirs: {other})",
                f"All modules with weights before {mine} agree, so the operations between them "
                "differ. Before attention's output: how queries and keys are rotated (features i "
                "and i + head_dim / 2, or 2i and 2i + 1: one convention may need a permutation of "
                "the rows of wq and wk, the other none), rope_theta and its scaling, the scale of "
                "scores, the mask, and which query heads share a key. Elsewhere: norms, or gate "
                "and up, exchanged; the activation, the residual, or routing.",
            )
        if _difference(our_output, their_output) > _TOLERANCE:
            flat = our_output.flatten(2), their_output.flatten(2)
            same_numbers = flat[0].shape == flat[1].shape and (
                _difference(flat[0].sort().values, flat[1].sort().values) < _TOLERANCE
            )
            if same_numbers:
                return (
                    f"; in it, {mine} gives the features of {other} in a different order",
                    "The adapter permutes rows where it should not (or the other way round). "
                    "Hugging Face's wq and wk are for rotary pairs i and i + head_dim / 2 in most "
                    "models: permute q and k only if the model rotates pairs 2i and 2i + 1.",
                )
            return (
                f"; in it, {mine} (theirs: {other}), for the same input",
                "Its weight or bias differs: two names exchanged in the adapter, a transposed or "
                "permuted matrix, a bias left out; or a norm with a different eps or offset.",
            )
    return (
        "; no module with a weight of its own differs",
        "Look at experts and their router: normalised weights, the scale, which are chosen; and at "
        "the residual connections.",
    )
