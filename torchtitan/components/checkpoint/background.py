"""Save in the background: copy the state while the next step computes, then write it."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchtitan.distributed.dtensor import local_tensor

from .model_tensors import buffer_names
from .save_planner import SharingSavePlanner
from .writer import CheckpointWriter

if TYPE_CHECKING:
    from torchtitan.components.optimizer import OptimizersContainer

_ALIGNMENT = 64
"""Alignment of tensors in bytes."""


class BackgroundSaves:
    """Runs one save at a time while training continues.

    Args:
        model_parts: this rank's parts of the model.
        optimizers: an iterable of optimizers.
        group: all ranks; used by nothing else while a save is in progress.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        optimizers: OptimizersContainer,
        group: dist.ProcessGroup,
    ) -> None:
        self._model_parts = model_parts
        self._optimizers = optimizers
        self._group = group
        self._stager: HostCopy | None = None
        self._future: Future | None = None
        self.step: int | None = None
        """Step of the save in progress, until `finish` has seen its end; None: there is none."""

    def start(
        self,
        step: int,
        state: dict[str, Any],
        writer: CheckpointWriter,
        planner: SharingSavePlanner,
    ) -> None:
        """Begin to save `state`, which has the parts "model", "optimizer" and others.

        Parameters and optimizer state change only in `optimizer.step()`, which waits for the copy,
        and in meetings of replica groups, which call `wait_for_copy`, as "semi_sync" does. All else
        may change earlier (buffers in the forward pass); it is small and copied at once.
        """
        assert self._future is None
        if self._stager is None:
            stager = self._stager = HostCopy()
            for optimizer in self._optimizers:
                optimizer.register_step_pre_hook(lambda *_: stager.synchronize_staging())
        buffers = buffer_names(self._model_parts)
        model = state["model"]
        state["model"] = {k: t.clone() if k in buffers else t for k, t in model.items()}
        early = state.keys() - {"model", "optimizer", "semi_sync"}
        state |= {part: deepcopy(state[part]) for part in early}
        writer.per_thread_copy_ahead = 0  # the data is already on the host
        response = dcp.async_save(
            state,
            storage_writer=writer,
            planner=planner,
            process_group=self._group,
            async_stager=self._stager,
        )
        self.step = step
        # With a stager, the response is an AsyncSaveResponse.
        self._future = cast(Any, response).upload_completion

    def wait_for_copy(self) -> None:
        """Wait until all of the state may change."""
        if self._stager is not None:
            self._stager.synchronize_staging()

    @property
    def done(self) -> bool:
        """Whether a save has succeeded or failed, and `finish` was not called since."""
        return self._future is not None and self._future.done()

    @property
    def completed(self) -> int | None:
        """Step of a save that has succeeded, if `finish` was not called since."""
        if self._future is None or not self._future.done() or self._future.exception() is not None:
            return None
        return self.step

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the save in progress; return False if it continues."""
        if self._future is None:
            return True
        with suppress(Exception):  # `finish` raises a failure
            self._future.exception(timeout)
        return self._future.done()

    def finish(self) -> None:
        """Wait for the save in progress, and raise its error."""
        future, self._future, self.step = self._future, None, None
        if future is not None:
            future.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()


class HostCopy(AsyncStager):
    """Copies the state in a thread, into memory that is kept for the next save.

    New memory would have to be mapped page by page (and pinned, with CUDA) at each save, which
    takes longer than the copy. The thread runs no Python while it copies, so that training
    continues; torch's `DefaultStager` holds the GIL meanwhile.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._host: list[torch.Tensor] = []
        """Copies of the tensors of the last state, in its order."""
        self._layouts: list[object] = []
        # New threads start with GPU 0, where a context of each rank of the host would take memory.
        on_gpu = torch.cuda.is_available()
        begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_gpu else None
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint-staging", initializer=begin
        )
        self._done: Future[dict[str, Any]] | None = None
        self._stream = torch.cuda.Stream() if on_gpu else None

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Start copying nested dicts and lists of tensors, DTensors and plain values."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        leaves, structure = tree_flatten(state_dict)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self._make_room(tensors)
        pairs = [*zip(map(local_tensor, self._host), map(local_tensor, tensors), strict=True)]
        hosts = iter(self._host)
        copies = [next(hosts) if torch.is_tensor(leaf) else deepcopy(leaf) for leaf in leaves]
        self._done = self._thread.submit(self._copy, pairs, tree_unflatten(copies, structure))
        return self._done

    def synchronize_staging(self) -> None:
        """Wait until the state passed to `stage` may change."""
        if self._done is not None:
            self._done.result()

    def close(self) -> None:
        self._thread.shutdown()
        self._host, self._layouts = [], []

    def _make_room(self, tensors: list[torch.Tensor]) -> None:
        """Provide memory for the tensors, that of the last save where it fits.

        The data loader's state may have other tensors each time, so any place will do.
        """
        free: defaultdict[object, list[torch.Tensor]] = defaultdict(list)
        for layout, kept in zip(self._layouts, self._host, strict=True):
            free[layout].append(kept)
        self._layouts = [_layout(tensor) for tensor in tensors]
        found = [free[layout].pop() if free[layout] else None for layout in self._layouts]
        lacking = [t for t, host in zip(tensors, found, strict=True) if host is None]
        self._host = []
        free.clear()
        memory = iter(_memory_like([local_tensor(tensor) for tensor in lacking]))
        for tensor, host in zip(tensors, found, strict=True):
            self._host.append(_with_memory(tensor, next(memory)) if host is None else host)

    @torch.no_grad()
    def _copy(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor]], staged: dict[str, Any]
    ) -> dict[str, Any]:
        with torch.cuda.stream(self._stream):
            for host, tensor in pairs:
                host.copy_(tensor, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return staged


def _layout(tensor: torch.Tensor) -> object:
    spec = tensor._spec if isinstance(tensor, DTensor) else None
    return tensor.shape, tensor.dtype, tensor.device, spec


def _with_memory(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return a tensor like `tensor`, whose values on this rank are in `local`."""
    if not isinstance(tensor, DTensor):
        return local
    host: Any = torch.empty_like(tensor, device="cpu")  # untouched, so it takes no memory
    host._local_tensor = local
    return host


def _memory_like(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return host memory for tensors, pinned for those on a GPU.

    Pinned tensors are cut from a few pieces. Each still has its own storage, since PyTorch would
    save a copy of a tensor that shares its storage.
    """
    host = [torch.empty(0)] * len(tensors)
    pinned = [n for n, t in enumerate(tensors) if _on_gpu(t) and t.numel()]
    sizes, places = _pieces([tensors[n].nbytes for n in pinned])
    pieces = [_pin(size).numpy() for size in sizes]
    for number, (piece, begin) in zip(pinned, places, strict=True):
        tensor = tensors[number]
        memory = torch.from_numpy(pieces[piece][begin : begin + tensor.nbytes]).view(tensor.dtype)
        strides = torch.empty_like(tensor, device="meta").stride()
        host[number] = memory.as_strided(tensor.shape, strides)
    for number in set(range(len(tensors))) - set(pinned):
        host[number] = torch.empty_like(tensors[number], device="cpu")
    return host


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _pin(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _pieces(sizes: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Plan how to cut blocks of `sizes` bytes (none is 0) from pieces with powers of two as sizes.

    CUDA's allocator rounds each pinned piece up to such a size, and keeps it.

    Returns:
        The sizes of the pieces, and for each of `sizes` the index of its piece and its offset.
    """
    sizes = [_ALIGNMENT * -(-size // _ALIGNMENT) for size in sizes]
    pieces: list[int] = []
    used: list[int] = []
    places = [(0, 0)] * len(sizes)
    left = sum(sizes)
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):  # small ones fill the gaps
        size = sizes[number]
        piece = next((p for p, all_ in enumerate(pieces) if all_ - used[p] >= size), len(pieces))
        if piece == len(pieces):
            half = 1 << (left.bit_length() - 1)  # more than half of the remaining bytes
            pieces.append(max(half, 1 << (size - 1).bit_length()))
            used.append(0)
        places[number] = piece, used[piece]
        used[piece] += size
        left -= size
    return pieces, places
