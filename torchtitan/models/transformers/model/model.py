"""A causal language model of the library transformers, as a model of torchtitan."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from torchtitan.models.common.attention import CausalMask
from torchtitan.protocols.model import ModelProtocol

from .args import TransformersArgs
from .build import (
    WithoutDropout,
    build_model,
    check_body,
    check_layers,
    masks_for_body,
    parts_of,
    run_body,
)


class TransformersModel(ModelProtocol):
    """Runs the code of transformers between the embedding and the output layer.

    The modules are those of the library, with our names for the embedding, the layers, the norm and
    the output layer. In a pipeline stage, layers may be deleted and the other parts be None.

    Raises:
        CheckpointError: the architecture is none that we can train, see `build.py`.
    """

    def __init__(self, args: TransformersArgs) -> None:
        super().__init__()
        self.args = args
        whole = build_model(args)
        parts = parts_of(whole)
        with WithoutDropout(whole.config):
            check_body(whole, parts)
            self.calls = check_layers(whole, parts)
        self.tp_plan: dict[str, str] = whole.config.base_model_tp_plan or {}
        """Pattern of a module's name -> transformers' style of tensor parallelism."""
        self.tok_embeddings = parts.embedding
        self.layers = nn.ModuleDict({str(i): layer for i, layer in enumerate(parts.layers)})
        self.norm = parts.norm
        self.output = parts.output
        self.others = nn.ModuleDict(parts.others)
        windows = dict.fromkeys(self.calls.windows)
        self.masks = nn.ModuleList([CausalMask(args.attention, window) for window in windows])
        """One for each window."""
        body = whole.base_model
        for name in list(body._modules):
            delattr(body, name)
        self._body = [body]
        """Its code and config; in a list, since its modules are ours."""
        self._names = {ours: theirs.rpartition(".")[2] for ours, theirs in parts.names.items()}

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits `[batch, seq, vocab]` of the next token, see `Decoder.forward`."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        length, device = positions.shape[1], positions.device
        windows = dict.fromkeys(self.calls.windows)
        masks = {
            window: mask(length, document_ids, device)
            for window, mask in zip(windows, self.masks, strict=True)
        }

        h = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        (body,) = self._body
        present = dict(self.layers.items())
        layers = [present.get(str(i), _unchanged) for i in range(len(self.calls.windows))]
        parts: dict[str, Any] = {
            self._names["tok_embeddings"]: None,
            self._names["layers"]: layers,
            self._names["norm"]: _unchanged if self.norm is None else self.norm,
            **self.others,
        }
        mask = masks_for_body(body.config, self.calls.windows, masks)
        h = run_body(body, parts, h, position_ids=positions, attention_mask=mask).last_hidden_state
        return h if self.output is None else self.output(h)

    def init_weights(self) -> None:
        """Initialize as transformers does; this sets the tables of rotations, too."""
        from transformers.activations import XIELUActivation

        (body,) = self._body
        for module in self.modules():
            body._init_weights(module)
            if isinstance(module, XIELUActivation):  # keeps the numbers of its constructor
                for name, number in XIELUActivation(dtype=torch.float32).state_dict().items():
                    getattr(module, name).fill_(number.item())


def _unchanged(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stand in for a module of another pipeline stage."""
    return hidden
