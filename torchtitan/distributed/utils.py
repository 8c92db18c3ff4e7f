"""The process's device, its part of tensors, and its connection to the other processes."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from torchtitan.errors import ConfigError
from torchtitan.tools.open_files import allow_open_files

JOB_STORE = "TORCHTITAN_JOB_STORE"
"""Environment variable: HOST:PORT of the store that outlives restarts."""


def device_type() -> str:
    """Return `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device() -> torch.device:
    """Return the device of this process; torchrun gives each process of a host its own."""
    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def device_name() -> str:
    """Return this process's device for display: `NVIDIA H100 80GB HBM3`, `CPU`."""
    return torch.cuda.get_device_name(device()) if device_type() == "cuda" else "CPU"


def check_devices() -> None:
    """Raise `ConfigError` if there are GPUs that PyTorch cannot use, or too few of them.

    An empty CUDA_VISIBLE_DEVICES means that none is wanted.
    """
    if device_type() == "cuda":
        processes, gpus = max(local_world_size(), local_rank() + 1), torch.cuda.device_count()
        if processes > gpus:
            chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
            by = "" if chosen is None else f" (CUDA_VISIBLE_DEVICES is {chosen!r})"
            raise ConfigError(
                f"{processes} processes on {socket.gethostname()}, which has only {gpus} GPUs for "
                f"them{by}: each process needs its own GPU. Start at most {gpus} on this host "
                "(--nproc-per-node of torchrun)"
            )
    elif torch.version.cuda and _gpu_files() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ConfigError(
            f"{socket.gethostname()} has a GPU ({_gpu_files()[0]}), but PyTorch {torch.__version__}"
            f" cannot use it: {_why_not()}. To run on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
        )


def _gpu_files() -> list[Path]:
    """Return the device files of the NVIDIA GPUs given to this machine or container."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def _why_not() -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"it finds no device of CUDA {torch.version.cuda}"


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


def world_size() -> int:
    """Return the number of processes by torchrun's environment, known before they connect."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Return the number of this process, known before the processes connect."""
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        problem = "not a number. torchrun sets it; without torchrun, unset it"
        raise ConfigError(f"the environment variable {name} is {value!r}, {problem}")
    return int(value)


def _check_environment() -> None:
    """Raise `ConfigError` if torchrun's variables are set only in part, as by another job."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if "RANK" in missing and world_size() == 1:
        return
    if missing:
        known = ", ".join(f"{n} is {os.environ[n]!r}" for n in needed[:2] if n in os.environ)
        raise ConfigError(
            f"the environment variable {known}, but {' and '.join(missing)} are not set, so this "
            "process cannot find the others. Start all with torchrun; for a single process, unset "
            f"{' and '.join(name for name in needed[:2] if name in os.environ)}"
        )
    _number("MASTER_PORT", 0)


def local_rank() -> int:
    """Return the number of this process among those of its host."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Return the number of processes on this host."""
    return _number("LOCAL_WORLD_SIZE", 1)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_offsets(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the index in the whole tensor at which this rank's part begins, per dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim
    return shard_offsets(tensor.shape, tensor.device_mesh, tensor.placements)


def shard_offsets(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[int, ...]:
    """Return `local_offsets` of tensors of this shape, sharded like this."""
    _, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(offsets)


def refuse_separate_tasks() -> None:
    """Raise `ConfigError` for one of several processes that srun has started without torchrun.

    Each would be a run of its own, and all would write into one folder. Other Slurm variables are
    set in a batch script, too, which is one process.
    """
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks.isdecimal() and int(tasks) > 1:
        raise ConfigError(
            f"srun has started {tasks} processes (SLURM_STEP_NUM_TASKS) that do not know of each "
            "other: each would train alone, and all would write to one job.dump_folder. Let srun "
            "start one torchrun per host, as the script of `torchtitan launch --slurm` does. If "
            "they should be separate runs, with a job.dump_folder each, unset SLURM_STEP_NUM_TASKS"
        )


def init_distributed(timeout_seconds: int) -> None:
    """Join the process group; without torchrun, a group of one.

    On CUDA the group also has gloo, so that host tensors can be exchanged without the GPU.

    Raises:
        ConfigError: variables of torchrun are missing, or no numbers; GPUs cannot be used, are
            fewer than the processes of this host, or exist on only some of the hosts.
    """
    _check_environment()
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
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        dist.init_process_group(
            backend, timeout=timeout, rank=rank(), world_size=world_size(), store=_store(timeout)
        )
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(
            backend, timeout=timeout, rank=0, world_size=1, store=dist.HashStore()
        )
    _require_same_device(distributed_c10d._get_default_store(), rank(), device_type())


def in_cuda_group() -> bool:
    """Return whether CUDA processes are connected: on a normal exit, NCCL may wait for them all."""
    return device_type() == "cuda" and dist.is_initialized()


def _store(timeout: timedelta) -> dist.Store:
    """Return torchrun's store, through which ranks find each other.

    It outlives them, so the ranks of each start have their own keys: with the same keys they might
    find addresses of ranks that are gone, and fail at once.
    """
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(f"torchtitan/start-{start}", _agent_store(timeout))


def job_store() -> dist.Store | None:
    """Return the store that outlives restarts of a job's ranks; None without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
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
