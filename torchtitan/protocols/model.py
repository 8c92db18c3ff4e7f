"""The contract between a model and the trainer: `BaseModelArgs` and `ModelProtocol`."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch.nn as nn

from torchtitan.config import JobConfig
from torchtitan.errors import ConfigError


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

    compares_samples: ClassVar[bool] = False
    """Whether the loss compares the samples of a micro-batch, as a contrastive loss does. If so,
    `verify` does not ask for a sum over samples."""

    sequence_inputs: ClassVar[tuple[str, ...] | None] = None
    """Inputs of `forward` under names of its own, `[batch, n, ...]`, of which each rank gets a part
    under context parallelism, as of tokens; it gets the others whole. None: they are `[batch]`, or
    context parallelism is refused."""

    other_blocks: ClassVar[tuple[str, ...]] = ()
    """Names of modules beside `layers` that are blocks, too: a single block (such as that of
    multi-token prediction) or a stack of them. Each block is gathered, recomputed and compiled on
    its own (`torchtitan.distributed.blocks`), and `apply_tensor_parallel` applies the plan of
    blocks to it. A pipeline stage without such a module has None in its place."""

    training_blocks: ClassVar[tuple[str, ...]] = ()
    """Names of modules that only training uses, such as blocks of multi-token prediction. A model
    without them starts from a checkpoint that has them."""

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
    """Return the layers of a `ModelProtocol`, also of one that `torch.compile` has wrapped.

    Raises:
        ConfigError: they are not an `nn.ModuleDict`.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleDict):
        raise ConfigError(
            f"{type(model).__name__}.layers is {type(layers).__name__}, not nn.ModuleDict: a model "
            "keeps its blocks there, by their number. Of several stacks of blocks, such as two "
            "towers, all but one may have other names"
        )
    return layers
