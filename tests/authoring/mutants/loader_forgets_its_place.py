"""The data loader begins at the same place after a resume, and on every rank."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.dataloader",)
SAYS = r"resumes from a checkpoint gives a different 'tokens'"


class Loader:
    def __init__(self, job_config):
        training = job_config.training
        self.shape, self.step = (training.local_batch_size, training.seq_len + 1), 0

    def __next__(self):
        self.step += 1
        tokens = torch.randint(264, self.shape, generator=torch.Generator().manual_seed(self.step))
        return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def state_dict(self):
        return {"rows": torch.tensor([[self.step]])}

    def load_state_dict(self, state_dict):
        pass

    def close(self):
        pass


base.register(__name__, build_dataloader_fn=lambda job_config, *args: Loader(job_config))
