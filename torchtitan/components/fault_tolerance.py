"""Train in replica groups that may fail and rejoin while the others keep training, with `torchft`.

A replica group is a whole job: it holds the model, in any layout, which is that of all groups.
Before each step the groups agree on the participants (the quorum); a late one first gets the state
of another. After the backward pass they sum their gradients; if a group failed meanwhile, none
takes the optimizer step. Or they do all this only every so many steps, for their weights: see
`SemiSync`.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from torchtitan.components.run_folder import lines_of_differing
from torchtitan.config import JobConfig
from torchtitan.distributed.dtensor import local_tensor
from torchtitan.errors import ConfigError, OutageError
from torchtitan.runtime.collective_calls import on_rank_zero
from torchtitan.runtime.device import device
from torchtitan.runtime.host_sum import sum_over_ranks
from torchtitan.runtime.stop_request import StopRequest
from torchtitan.runtime.world import world_size
from torchtitan.tools.logging import logger, rank0
from torchtitan.tools.text import few

_BUCKET_BYTES = 256 * 2**20
_PATIENCE = timedelta(hours=2)
_CONNECT = timedelta(minutes=1)
"""How long to try to reach the lighthouse."""
_SECONDS_BETWEEN_QUORUMS = 1.0
_ALIKE = ("model", "optimizer", "lr_scheduler", "loss", "parallelism", "fault_tolerance")
_ALIKE_KEYS = (
    "training.global_batch_size",
    "training.batch_size_ramp",
    "training.seq_len",
    "training.max_norm",
    "debug.seed",
)
"""Sections and keys of the config in which groups must not differ, but for those of `_OWN`: the
sums would be of other parts of the weights, or the groups' weights become different."""
_OWN = ("model.tokenizer_path", "model.attention", "fault_tolerance.replica_id")
_OTHERWISE = "Start all replica groups with the same options and number of processes"


def with_own_folder(job_config: JobConfig) -> JobConfig:
    """Set the config's dump folder to this replica group's, `job.dump_folder`/replica-N."""
    fault_tolerance, job = job_config.fault_tolerance, job_config.job
    name = fault_tolerance.replica
    if fault_tolerance.enable and Path(job.dump_folder).name != name:
        job.dump_folder = str(Path(job.dump_folder, name))
    return job_config


class Replicas:
    """Communicate with the other replica groups; without `fault_tolerance.enable`, do nothing.

    All ranks of a replica group call each method together. Rank r of one group communicates with
    the ranks r of the others.
    """

    def __init__(self, job_config: JobConfig) -> None:
        config = job_config.fault_tolerance
        self.enabled = config.enable
        self.semi_sync = config.enable and config.semi_sync_method != "none"
        """Whether the groups train apart, and `SemiSync` lets them meet."""
        self.lost_step = False
        self._config = config
        self._options = _options_of_all_groups(job_config)
        texts = map(repr, self._options.values())
        hashes = torch.tensor([zlib.crc32(text.encode()) % 2**20 for text in texts])
        self._digests = torch.stack([torch.ones_like(hashes), hashes, hashes**2])
        self._are_alike = False
        self._differences = ""
        """Options in which the group whose state this one was to take over differs, a line each."""
        self._timeout = timedelta(seconds=job_config.comm.timeout_seconds)
        # Groups that train apart may come to their meeting at different times.
        self._quorum_timeout = max(self._timeout, _PATIENCE) if self.semi_sync else self._timeout
        self._manager: Any = None
        self._took_over = False

    @property
    def _in_steps(self) -> bool:
        """Whether the groups communicate in each step."""
        return self._manager is not None and not self.semi_sync

    def data_share(self, dp_rank: int, dp_world_size: int) -> tuple[int, int]:
        """Return `(data rank, data ranks)` over all replica groups, including missing ones."""
        if not self.enabled:
            return dp_rank, dp_world_size
        first = self._config.replica_id * dp_world_size
        return first + dp_rank, self._config.group_size * dp_world_size

    def start(
        self, step: int, state: Callable[[], dict[str, Any]], load: Callable[[dict], None]
    ) -> None:
        """Connect to the lighthouse. Call it after `step` steps, from a checkpoint or 0.

        Args:
            state: returns all state that a joining group needs to compute what the others do:
                nested dicts of tensors and plain values.
            load: loads such a state.

        Raises:
            OutageError: on all ranks: the lighthouse cannot be reached.
        """
        if not self.enabled:
            return
        import torchft

        def load_local(received: dict[str, Any]) -> None:
            # Told by `refuse_others`: the others wait long for a group that leaves before gloo has
            # connected to it (five times `comm.timeout_seconds`).
            self._differences = lines_of_differing(self._options, received["options"], "there")
            if self._differences:
                return
            load(_take_over(state(), received["state"]))
            self._took_over = True
            logger.info("took over the state of another replica group")

        on_cuda = torch.cuda.is_available()
        group = (torchft.ProcessGroupNCCL if on_cuda else torchft.ProcessGroupGloo)(self._timeout)

        def connect() -> None:
            try:
                self._manager = torchft.Manager(
                    pg=group,
                    load_state_dict=load_local,
                    state_dict=lambda: {
                        "state": tree_map(local_tensor, state()),
                        "options": self._options,
                    },
                    min_replica_size=self._config.min_replica_size,
                    use_async_quorum=False,
                    timeout=self._timeout,
                    quorum_timeout=self._quorum_timeout,
                    connect_timeout=min(_CONNECT, self._timeout / 2),  # the other ranks wait
                    replica_id=self._config.replica,
                    init_sync=False,  # all groups initialize the same weights from the seed
                )
            except RuntimeError as error:
                raise OutageError(
                    f"torchft: {error}. The lighthouse is TORCHFT_LIGHTHOUSE = "
                    f"{os.environ['TORCHFT_LIGHTHOUSE']}"
                ) from error

        # Rank 0 first: the others find its address in torchrun's store, where there may still be
        # that of an earlier start, whose server is gone.
        on_rank_zero(connect, dist.group.WORLD)
        if dist.get_rank() != 0:
            connect()
        self._manager.load_state_dict({"step": step, "batches_committed": step})

    def begin_step(self, stop: StopRequest) -> bool:
        """Agree on the participants. A group that is behind receives the state of another here.

        Returns:
            Whether any rank was asked to stop while there were too few groups, equal on all ranks.
        """
        if not self._in_steps:
            return False
        self.agree(stop=stop)
        if self.too_few:
            return True
        self.refuse_others()
        return False

    @property
    def too_few(self) -> bool:
        """Whether the last `agree` was given up, with too few groups there; equal on all ranks."""
        return self._manager.num_participants() < self._config.min_replica_size

    def sum(self, number: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor of any shape over the groups, of the same shape.

        It is on the device used for communication.
        """
        return self.total(number) if self._in_steps else number

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Sum the gradients over all groups, in place."""
        if self._in_steps:
            self.add_up([local_tensor(p.grad) for p in parameters if p.grad is not None])

    def commit(self) -> bool:
        """Return whether no group failed, so that the optimizer may step.

        Otherwise the step is lost: it counts as not done, and its batch is not trained on.
        """
        self.lost_step = self._in_steps and not self.agreed()
        if self.lost_step:
            rank0.warning("a step is lost, because a replica group left during it")
        return not self.lost_step

    def agree(self, progress: int | None = None, stop: StopRequest | None = None) -> bool:
        """Agree on who takes part in what follows, and let a group that is behind catch up.

        Waits while there are fewer than `fault_tolerance.min_replica_size` groups.

        Args:
            progress: a group with less of it is behind; None: the steps that were agreed on.
            stop: once any rank is asked to stop, wait no longer; None: wait in any case.

        Returns:
            Whether this group was behind, and took over the state of another.

        Raises:
            OutageError: the lighthouse brought no groups together in time.
        """
        self._took_over = False
        if progress is not None:
            self._manager.load_state_dict({"step": progress, "batches_committed": progress})
        self._start_quorum()
        waiting = False
        while self.too_few and not (stop and _asked_to_stop(stop)):
            if not waiting:
                rank0.warning(
                    "waiting for other replica groups: there are %d of at least %d "
                    "(fault_tolerance.min_replica_size)",
                    *(self._manager.num_participants(), self._config.min_replica_size),
                )
            waiting = True
            time.sleep(_SECONDS_BETWEEN_QUORUMS)
            self._start_quorum()
        return self._took_over

    def refuse_others(self) -> None:
        """Refuse to train with groups that were started otherwise; call it after `agree`.

        Of groups that start together, all end; later only the one that joins, and the others lose a
        step.

        Raises:
            ConfigError: this group joins others that were started with other options.
        """
        total = self.total(self._digests)
        if self._differences:
            raise ConfigError(
                f"{self._config.replica} differs from another replica group:{self._differences}\n"
                f"{_OTHERWISE}"
            )
        if self._are_alike:
            return
        groups, sums, squares = total.cpu()  # which waits for the device, so not in each step
        if self._manager.errored() is not None:
            return
        varies = (groups * squares != sums**2).tolist()
        if unlike := [key for key, differs in zip(self._options, varies, strict=True) if differs]:
            raise ConfigError(
                f"{self._config.replica} differs from another replica group in {few(unlike)}. "
                f"{_OTHERWISE}"
            )
        self._are_alike = True

    def _start_quorum(self) -> None:
        try:
            self._manager.start_quorum()
        except TimeoutError as error:
            raise OutageError(
                "the replica groups did not agree within "
                f"{self._quorum_timeout.total_seconds():g} s on who takes part: the lighthouse "
                f"({os.environ['TORCHFT_LIGHTHOUSE']}) is away, or has fewer groups than its "
                "--min_replicas"
            ) from error

    def total(self, number: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the groups that take part."""
        total = number.to(device(), copy=True)
        self._all_reduce(total)
        return total

    def add_up(self, tensors: list[torch.Tensor]) -> None:
        """Sum tensors over the groups that take part, in place."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket]).to(device())
            self._all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def agreed(self) -> bool:
        """Return whether no group failed since `agree`, so that the sums are right."""
        return bool(self._manager.should_commit())

    def present(self, tokens: int) -> int:
        """Return the participating groups' share of the tokens of a full step."""
        if self._manager is None:
            return tokens
        return tokens * self._participants() // self._config.group_size

    def metrics(self) -> dict[str, int]:
        """Return `replica_groups`, the participants of the step; empty without fault tolerance."""
        return {} if self._manager is None else {"replica_groups": self._participants()}

    def _participants(self) -> int:
        """Return how many took part in the last step or meeting; all, before the first meeting."""
        return self._manager.num_participants() or self._config.group_size

    def close(self) -> None:
        if self._manager is not None:
            self._manager.shutdown(wait=False)

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM).wait()


def _options_of_all_groups(job_config: JobConfig) -> dict[str, Any]:
    """Return what no replica group may have otherwise, by key."""
    options = {
        f"{section}.{key}": value
        for section, values in asdict(job_config).items()
        for key, value in values.items()
    }
    wanted = {
        key: value
        for key, value in options.items()
        if (key.partition(".")[0] in _ALIKE or key in _ALIKE_KEYS) and key not in _OWN
    }
    return wanted | {"processes": world_size()}


def _asked_to_stop(stop: StopRequest) -> bool:
    """Return whether any rank of this group was asked to stop."""
    stops = torch.tensor(int(stop.received))
    sum_over_ranks(stops)
    return bool(stops)


def _buckets(grads: list[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Yield consecutive gradients of one dtype, in buckets of at most about `_BUCKET_BYTES`."""
    bucket: list[torch.Tensor] = []
    size = 0
    for grad in grads:
        full = size + grad.nbytes > _BUCKET_BYTES
        if bucket and (full or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def _take_over(own: Any, received: Any) -> Any:
    """Return `own` with the values of `received` (local tensors); fill tensors in place."""
    if isinstance(own, dict):
        return {key: _take_over(value, received[key]) for key, value in own.items()}
    if not isinstance(own, torch.Tensor):
        return received
    local_tensor(own).copy_(received)
    return own
