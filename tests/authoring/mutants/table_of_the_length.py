"""A table of positions is as long as the job's sequences, and is saved with the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from mutants import base

from torchtitan.config import JobConfig

CAUGHT_BY = ("contract.state_dict",)
SAYS = r"table is \[64, 64\] in a checkpoint of training\.seq_len = 64, but \[32, 64\]"


@dataclass
class Args(base.Args):
    max_seq_len: int = 4096

    def update_from_config(self, job_config: JobConfig) -> Args:
        return replace(self, max_seq_len=job_config.training.seq_len)


class Model(base.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.register_buffer("table", torch.zeros(args.max_seq_len, args.dim))

    def init_weights(self) -> None:
        super().init_weights()
        self.table.zero_()


base.register(__name__, model_cls=Model, model_args=Args())
