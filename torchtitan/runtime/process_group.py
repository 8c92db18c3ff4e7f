"""The connection of this process to the others."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from torchtitan.errors import ConfigError, OutageError
from torchtitan.runtime.device import check_devices, device, device_type
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.runtime.open_files import allow_open_files
from torchtitan.runtime.own_address import listen_for_other_hosts
from torchtitan.runtime.world import check_environment, has_agent_store, rank, world_size

JOB_STORE = "TORCHTITAN_JOB_STORE"
"""Environment variable: HOST:PORT of the store that outlives restarts."""


def init_distributed(timeout_seconds: int) -> None:
    """Join the process group; without torchrun, a group of one.

    On CUDA the group also has gloo, so that host tensors can be exchanged without the GPU.

    Raises:
        ConfigError: variables of torchrun are missing, or no numbers; GPUs cannot be used, are
            fewer than the processes of this host, or exist on only some of the hosts.
    """
    check_environment()
    check_devices()
    backend = "gloo"
    if device_type() == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device())
    # Otherwise gloo connects each rank with all others in each new group: with 10,000 ranks and two
    # groups of them all, a process has 20,000 sockets before the first step. Collectives need a few
    # neighbours, which this connects at their first use.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    allow_open_files()
    timeout = timedelta(seconds=timeout_seconds)
    # Also for later groups: those of a mesh would have PyTorch's default, half an hour.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    store: dist.Store | None = None  # PyTorch makes one at MASTER_ADDR
    if has_agent_store():
        store = _store(timeout)
        listen_for_other_hosts(store)
    elif "RANK" not in os.environ:
        store = dist.HashStore()
    dist.init_process_group(
        backend, timeout=timeout, rank=rank(), world_size=world_size(), store=store
    )
    _require_same_device(distributed_c10d._get_default_store(), rank(), device_type())


def _require_same_device(store: dist.Store, rank: int, device_type: str) -> None:
    """Raise `ConfigError` on a rank that has no GPU while rank 0 has one, or the other way round.

    Such ranks would wait for each other in vain.
    """
    key = "torchtitan/device_type"
    if rank == 0:
        store.set(key, device_type)
    elif (first := store.get(key).decode()) != device_type:
        raise ConfigError(
            f"rank {rank} ({socket.gethostname()}) computes on {device_type}, but rank 0 on "
            f"{first}: all must have GPUs, or none (an empty CUDA_VISIBLE_DEVICES hides them)"
        )


def patient_group(patience: timedelta) -> dist.ProcessGroup:
    """Return a gloo group of all ranks, in which they wait `patience` for the slowest one.

    They meet and connect here within the timeout of training, since nothing slow happens yet.

    Raises:
        OutageError: they did not connect in time.
    """
    sum_over_ranks(torch.zeros(1))
    group = dist.new_group(backend="gloo", timeout=patience)
    limit = distributed_c10d.default_pg_timeout
    # A group's own timeout holds for connecting, too, which it does at its first collective.
    connecting = dist.broadcast(torch.zeros(1), src=0, group=group, async_op=True)
    try:
        connecting.wait(limit)
    except RuntimeError as error:
        if connecting.is_completed():  # another rank is gone
            raise
        raise OutageError(
            "ranks could not connect to each other within comm.timeout_seconds = "
            f"{limit.total_seconds():g}. Start the run again"
        ) from error
    return group


def exit_may_hang() -> bool:
    """Return whether a normal exit may never end, once a collective has failed.

    NCCL waits for pending collectives. The thread of a gloo group spins on a message for a buffer
    that is gone, and the group's destructor waits for that thread (torch 2.11 to 2.13).
    """
    return dist.is_initialized() and (device_type() == "cuda" or dist.get_world_size() > 1)


def _store(timeout: timedelta) -> dist.Store:
    """Return torchrun's store, through which ranks find each other.

    It outlives them, so the ranks of each start have their own keys: with the same keys they might
    find addresses of ranks that are gone, and fail at once.
    """
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(f"torchtitan/start-{start}", _agent_store(timeout))


def job_store() -> dist.Store | None:
    """Return the store that outlives restarts of a job's ranks; None without torchrun."""
    if not has_agent_store():
        return None
    timeout = distributed_c10d.default_pg_timeout
    # Our torchrun makes a new store at MASTER_PORT each time, so JOB_STORE names the lasting one.
    host, _, port = os.environ.get(JOB_STORE, "").rpartition(":")
    store: dist.Store
    if port:
        store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
    else:
        store = _agent_store(timeout)
    return dist.PrefixStore("torchtitan/job", store)


def _agent_store(timeout: timedelta) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)
