"""The first dropout of a DTensor on the null GPU leaves each rank its own random state."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

from torchtitan.config import load_config
from torchtitan.distributed.determinism import seed_step
from torchtitan.train import Trainer


def seed_of_state() -> int:
    return int(torch.cuda.get_rng_state()[:8].view(torch.int64))


def main() -> None:
    trainer = Trainer(load_config(sys.argv[1:]))
    seed_step(trainer.job_config.debug.seed, 1, trainer.random_rank)
    own = seed_of_state()
    mesh = trainer.parallel_dims.world_mesh["dp"]
    F.dropout(DTensor.from_local(torch.ones(2, 4, device="cuda"), mesh, [Shard(0)]))
    assert seed_of_state() == own, "it has the state of rank 0"
    trainer.close()


if __name__ == "__main__":
    main()
