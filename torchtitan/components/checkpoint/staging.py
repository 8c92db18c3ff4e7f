"""Copies of the state on the host, from which a save in the background is written."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from torchtitan.distributed.utils import local_tensor


class HostCopy(AsyncStager):
    """Copies the state in a thread, into memory that it keeps for the next save.

    New memory would have to be mapped page by page (and pinned, with CUDA) at each save, which
    takes longer than to copy. The thread computes nothing in Python while it copies, so that
    training goes on beside it; torch's `DefaultStager` holds the interpreter's lock meanwhile.
    """

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, ...], torch.Tensor] = {}
        # A thread begins with GPU 0, where a context of each rank of the host would take memory.
        on_gpu = torch.cuda.is_available()
        begin = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_gpu else None
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="checkpoint-staging", initializer=begin
        )
        self._done: Future[dict[str, Any]] | None = None
        self._stream = torch.cuda.Stream() if on_gpu else None

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Begin to copy nested dicts of tensors, DTensors and plain values."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        staged = self._on_host(state_dict, (), pairs)
        self._done = self._thread.submit(self._copy, pairs, staged)
        return self._done

    def synchronize_staging(self) -> None:
        """Wait until the state that `stage` was given may change."""
        if self._done is not None:
            self._done.result()

    def close(self) -> None:
        self._thread.shutdown()
        self._tensors.clear()

    def _on_host(
        self, value: Any, path: tuple[str, ...], pairs: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> Any:
        if isinstance(value, dict):
            return {key: self._on_host(item, (*path, key), pairs) for key, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        host = self._tensors.get(path)
        if host is None or host.shape != value.shape or host.dtype != value.dtype:
            host = self._tensors[path] = _like(value.detach())
        pairs.append((local_tensor(host), local_tensor(value.detach())))
        return host

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


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory on the host, pinned where it is to be filled from a GPU."""
    if isinstance(tensor, DTensor):
        host: Any = tensor.to("cpu") if tensor.device.type != "cpu" else copy.deepcopy(tensor)
        host._local_tensor = _like(tensor.to_local())
        return host
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
