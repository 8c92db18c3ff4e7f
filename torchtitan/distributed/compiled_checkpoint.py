"""Compile checkpointed blocks in which some parts run eagerly.

The compiler must split a block around its eager parts, and cannot do so within a checkpoint: it
would run the whole block eagerly. So the checkpoint is outside and the compiled block inside it,
not the other way round:

    checkpoint              in the forward pass      when it is recomputed
      compiled: q, k, v     run                      run again
      eager:    attention   run, and kept            taken from what was kept
      compiled: the router  run                      run again
      eager:    experts     run, some of it kept     taken, or run again

Per op, selective checkpointing looks only at the eager parts. From compiled code it would keep
kernel results that this code overwrites later, as the compiler does not know of this reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn as nn

from torchtitan.distributed.activation_checkpoint import checkpointed


def compile_inside(layer: nn.Module, compiler: Callable[..., Any], eager: list[nn.Module]) -> None:
    """Compile the function that a block's checkpoint recomputes.

    Args:
        layer: a block that `apply_ac` has checkpointed.
        eager: its modules that run eagerly under selective checkpointing per op, which may keep
            some of their results.
    """
    made: Any = layer.forward
    context_fn = None
    if made.context_fn is not None:
        parts = _Parts(made.context_fn)
        for module in eager:
            module.forward = parts.in_contexts(module.forward)
        context_fn = parts.contexts_of_block
    forward = checkpointed(layer, compiler(made.checkpoint_of), context_fn)
    layer.forward = torch.compiler.disable(forward)  # the model around it may be traced


class _Parts:
    """The eager parts of a block, each of which runs in its own context.

    The recomputation runs a block's parts in the same order as the forward pass, so its n-th part
    belongs to the n-th of the forward pass.

    Args:
        context_fn: returns the contexts of one part's forward pass and recomputation.
    """

    def __init__(self, context_fn: Callable[[], Any]) -> None:
        self._context_fn = context_fn
        self.contexts: Iterator[Any] | None = None
        """Contexts of the parts that run next. None: outside of a checkpoint."""

    def in_contexts(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a part, run in the next context."""

        @wraps(forward)
        @torch.compiler.disable
        def forward_in_context(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self.contexts is None else next(self.contexts):
                return forward(*args, **kwargs)

        return forward_in_context

    def contexts_of_block(self) -> tuple[_Pass, _Pass]:
        """Return the contexts of the block's checkpoint, as its `context_fn`."""
        recomputations: list[Any] = []

        def forwards() -> Iterator[Any]:
            while True:
                forward, recomputation = self._context_fn()
                recomputations.append(recomputation)
                yield forward

        return _Pass(self, forwards()), _Pass(self, recomputations)


class _Pass:
    """While entered, any number of times, runs the parts in `contexts`, one after the other."""

    def __init__(self, parts: _Parts, contexts: Iterable[Any]) -> None:
        self._parts = parts
        self._contexts = contexts

    def __enter__(self) -> None:
        self._parts.contexts = iter(self._contexts)

    def __exit__(self, *error: object) -> None:
        self._parts.contexts = None
