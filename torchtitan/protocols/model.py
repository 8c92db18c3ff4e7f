"""The contract between a model and the trainer: `BaseModelArgs` and `ModelProtocol`."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch.nn as nn

if TYPE_CHECKING:
    from torchtitan.config import JobConfig


_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class BaseModelArgs:
    """Hyperparameters of a model; subclasses add fields with defaults.

    A field `max_seq_len`, if there is one, is the longest sequence that the model takes; `verify`
    and `generate` respect it.
    """

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Return `(num_params, flops_per_token)`.

        `flops_per_token` counts forward plus backward in training at sequences of `seq_len`
        tokens; it is the numerator of TFLOP/s and MFU.
        """
        raise NotImplementedError(f"{type(self).__name__} must define get_nparams_and_flops")

    @property
    def num_experts(self) -> int:
        """Number of experts in a mixture-of-experts layer, for expert parallelism; 0: none."""
        return 0

    def update_from_config(self, job_config: JobConfig) -> Self:
        """Return args adapted to a training config. Raise `ConfigError` if that is impossible.

        Called before any weights are allocated. Return a copy rather than change a flavor in place.
        """
        return self

    def to_hf_config(self) -> dict[str, Any] | None:
        """Return the `config.json` for Hugging Face's implementation of this model.

        It is the inverse of the class method `from_hf_config(config)`, which models that read
        Hugging Face files define, too. None: there is no such implementation, or it is unknown.
        """
        return None


class ModelProtocol(nn.Module):
    """A single-device model. Parallelism is applied to it from outside.

    `forward(tokens)` takes `[batch, seq]` int64 token ids and returns `[batch, seq, vocab]` logits,
    or whatever its own data loader and loss agree on (see `torchtitan.components.DataLoader`).
    It may declare these optional keyword arguments, both `[batch, seq]` int64. The trainer passes
    those that it finds in the signature under `training.document_mask`:

    * `document_ids`: the number of each token's document;
    * `positions`: the position of each token in its document.

    For pipeline parallelism, layers live in an `nn.ModuleDict`, and the embedding, the final norm
    and the output layer may be None.
    """

    layers: nn.ModuleDict
    sees_later_tokens: ClassVar[bool] = False
    """Whether tokens see later ones, as in encoders and masked diffusion. If so, `verify` skips its
    test of causality, and `generate` and `eval` refuse the model. (Not named `causal`, because mask
    buffers have that name.)"""
    estimates_gradients: ClassVar[bool] = False
    """Whether some gradients differ from the slope of the loss on purpose, as with straight-through
    estimators, `detach()` within a formula, and scaled gradients. If so, `verify` does not measure
    the slope."""

    other_blocks: ClassVar[tuple[str, ...]] = ()
    """Names of modules beside `layers` that are blocks, too: a single block (such as that of
    multi-token prediction) or a stack of them. Each block is gathered, recomputed and compiled on
    its own (`blocks_of`), and `apply_tensor_parallel` applies the plan of blocks to it. A pipeline
    stage without such a module has None in its place."""

    if not TYPE_CHECKING:  # hidden, so that type checkers accept `model_cls(args)`

        def __init__(self) -> None:
            super().__init__()

    @abstractmethod
    def init_weights(self) -> None:
        """Set every parameter and buffer, recursively.

        Called once after the model was moved from the meta device, with sharded parameters. Use
        in-place initialisers (`nn.init.*`); they give the same values on every layout.
        """
        raise NotImplementedError(f"{type(self).__name__} must define init_weights")

    def load_checkpoint(self, path: str | Path) -> Self:
        """Load weights from a torchtitan (DCP) or a Hugging Face (safetensors) checkpoint folder.

        Hugging Face folders go through the `state_dict_adapter` of the model's `TrainSpec`. Raises
        `CheckpointError` for a missing or damaged file, or keys and shapes that do not fit.
        """
        from torchtitan.components.checkpoint.load import load_model_weights

        load_model_weights(self, path)
        return self


def layers_of(model: nn.Module) -> nn.ModuleDict:
    """Return the layers of a `ModelProtocol`, also of one that `torch.compile` has wrapped."""
    return cast(nn.ModuleDict, model.layers)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that are gathered, recomputed and compiled one by one: name -> module.

    These are the layers, then the members of other stacks, such as an encoder's or a vision
    tower's, then the modules that the model's `other_blocks` names. A stack is a list, dict or
    sequence of modules that all have a `forward` and submodules with parameters, at least two of
    the same type. Except for layers, modules that share a parameter with another part of the model
    are left out. Pipelines cut between layers only.
    """
    blocks: dict[str, nn.Module] = {f"layers.{n}": layer for n, layer in layers_of(model).items()}
    uses = _uses(model)
    others = other_blocks_of(model)
    for name, block in (*_blocks_in(model, "", set(others.values())), *others.items()):
        if all(uses[parameter] == count for parameter, count in _uses(block).items()):
            blocks[name] = block
    return blocks


def other_blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks that the model's `other_blocks` names and that this stage has."""
    blocks: dict[str, nn.Module] = {}
    for name in getattr(model, "other_blocks", ()):
        module: Any = model
        for part in name.split("."):
            module = getattr(module, part) if module is not None else None
        if isinstance(module, _LISTS):
            blocks |= {f"{name}.{n}": block for n, block in module.named_children()}
        elif module is not None:
            blocks[name] = module
    return blocks


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """Count the places in which each parameter is used."""
    return Counter(param for _, param in module.named_parameters(remove_duplicate=False))


def _blocks_in(
    module: nn.Module, prefix: str, known: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of stacks, except layers and modules that are known already."""
    for name, child in module.named_children():
        if prefix + name == "layers" or child in known:
            continue
        if _is_stack(child):
            yield from ((f"{prefix}{name}.{n}", block) for n, block in child.named_children())
        else:
            yield from _blocks_in(child, f"{prefix}{name}.", known)


def _is_stack(module: nn.Module) -> bool:
    members = list(module.children())
    return (
        isinstance(module, _LISTS)
        and len({type(member) for member in members}) < len(members)
        and all(_can_be_called(member) for member in members)
        and all(any(True for _ in _inner_parameters(member)) for member in members)
    )


def _can_be_called(module: nn.Module) -> bool:
    """Return whether the module has a forward, unlike a list of parts: FSDP gathers on a call."""
    return type(module).forward is not nn.Module.forward


def _inner_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    return (param for child in module.children() for param in child.parameters())
