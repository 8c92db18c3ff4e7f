"""Compiled blocks under activation checkpointing, where parts of a block run eager.

The compiler must split a block where a part of it runs eager, and cannot within a checkpoint: it
would leave the whole block to eager mode. So the checkpoint is around the compiled block, rather
than the block with its checkpoint being compiled:

    checkpoint              in the forward pass      when it is recomputed
      compiled: q, k, v     run                      run again
      eager:    attention   run, and kept            taken from what was kept
      compiled: the router  run                      run again
      eager:    experts     run, some of it kept     taken, or run again

Per op, only the eager parts are asked what to keep. Of the kernels of compiled code, selective
checkpointing would hold on to results that this code later writes over, as it knows who else reads
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn as nn

from torchtitan.distributed.activation_checkpoint import checkpointed


def compile_inside(
    layer: nn.Module, compiler: Callable[..., Any], eager: list[nn.Module], keeps: bool
) -> None:
    """Compile what the checkpoint of a block recomputes.

    Args:
        layer: a block that `apply_ac` has checkpointed.
        eager: its modules that run eager, if selective checkpointing per op may keep something.
        keeps: whether it may; else per op recomputes the whole block, as `full`.
    """
    made: Any = layer.forward
    context_fn = None
    if keeps and made.context_fn is not None:
        parts = _Parts(made.context_fn)
        for module in eager:
            module.forward = parts.in_contexts(module.forward)
        context_fn = parts.contexts_of_block
    forward = checkpointed(compiler(made.checkpoint_of), context_fn)
    layer.forward = torch.compiler.disable(forward)  # around it the whole model may be traced


class _Parts:
    """The eager parts of a block, each of which runs in a context of its own.

    A block runs its parts in the same order when it is recomputed, so the n-th part of a
    recomputation belongs to the n-th of the forward pass.

    Args:
        context_fn: makes the contexts of one part's forward pass and recomputation.
    """

    def __init__(self, context_fn: Callable[[], Any]) -> None:
        self._context_fn = context_fn
        self.contexts: Iterator[Any] | None = None
        """What the parts that run next run in. None: outside of a checkpoint."""

    def in_contexts(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a part, in the next context."""

        @wraps(forward)
        @torch.compiler.disable
        def forward_in_context(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self.contexts is None else next(self.contexts):
                return forward(*args, **kwargs)

        return forward_in_context

    def contexts_of_block(self) -> tuple[_Pass, _Pass]:
        """The `context_fn` of the block's checkpoint."""
        recomputations: list[Any] = []

        def forwards() -> Iterator[Any]:
            while True:
                forward, recomputation = self._context_fn()
                recomputations.append(recomputation)
                yield forward

        return _Pass(self, forwards()), _Pass(self, recomputations)


class _Pass:
    """While it is entered, as often as it is, the parts run in `contexts`, one after the other."""

    def __init__(self, parts: _Parts, contexts: Iterable[Any]) -> None:
        self._parts = parts
        self._contexts = contexts

    def __enter__(self) -> None:
        self._parts.contexts = iter(self._contexts)

    def __exit__(self, *error: object) -> None:
        self._parts.contexts = None
