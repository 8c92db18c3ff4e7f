"""The data ranks read the same tokens, though fewer the more there are."""

from __future__ import annotations

import torch
from mutants import base

CAUGHT_BY = ("contract.dataloader",)
SAYS = r"the data ranks 0 and 1 get the same tokens"


class Loader:
    def __init__(self, job_config, dp_rank, dp_world_size):
        training = job_config.training
        self.ranks = dp_world_size
        self.shape, self.step = (training.local_batch_size, training.seq_len + 1), 0

    def __next__(self):
        self.step += 1
        tokens = torch.randint(
            264, self.shape, generator=torch.Generator().manual_seed(self.step * self.ranks)
        )
        return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}

    def state_dict(self):
        return {"rows": torch.tensor([[self.step]])}

    def load_state_dict(self, state_dict):
        self.step = int(state_dict["rows"][0, 0])

    def close(self):
        pass


base.register(
    __name__, build_dataloader_fn=lambda job_config, tokenizer, *ranks: Loader(job_config, *ranks)
)
