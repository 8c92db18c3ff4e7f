"""Divide among the replicas of HSDP or DDP what they all have, so that each byte is read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from torchtitan.distributed.dtensor import replicas_of


class SharedReading:
    """The tensors of a state that one of several replicas reads, and then sends to the others.

    Replicas have the same state, so they come to the same division by themselves.

    Args:
        state: name -> tensor or other value. Tensors that this rank alone reads are left out.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._shared: list[tuple[torch.Tensor, dist.ProcessGroup, int]] = []
        self.of_others: set[str] = set()
        """Names of the tensors that another rank reads."""
        found = []
        for name, value in state.items():
            if (group := replicas_of(value)) is not None:
                tensor = value.to_local().detach()
                # Offloaded to the host, it may be where the group cannot send.
                can_send = tensor.device.type == value.device_mesh.device_type
                if can_send and tensor.numel() and tensor.is_contiguous():
                    found.append((name, tensor, group))
        found.sort(key=lambda item: (-item[1].nbytes, item[0]))
        bytes_of: dict[dist.ProcessGroup, list[int]] = {}
        for name, tensor, group in found:
            loads = bytes_of.setdefault(group, [0] * group.size())
            reader = loads.index(min(loads))
            loads[reader] += tensor.nbytes
            self._shared.append((tensor, group, reader))
            if reader != group.rank():
                self.of_others.add(name)

    def send(self) -> None:
        """Send the tensors from their readers to the other replicas, which call this too."""
        sent = [
            dist.broadcast(tensor, group=group, group_src=reader, async_op=True)
            for tensor, group, reader in self._shared
        ]
        for work in sent:
            work.wait()
