"""A right model that predicts noise, of which one step has more than the others; its weights are
set by whether the first stage is there.
"""

from __future__ import annotations

from dataclasses import replace

import tiny_diffusion
import torch
import torch.nn as nn

from torchtitan.protocols import TrainSpec, register_train_spec


class Model(tiny_diffusion.Diffusion):
    def init_weights(self) -> None:
        super().init_weights()
        if self.patches is not None:
            nn.init.zeros_(self.classes.weight)


class Loader(tiny_diffusion.NoisyImages):
    def sample(self, step: int, row: int) -> dict[str, torch.Tensor]:
        sample = super().sample(step, row)
        return sample if step != 19 else sample | {"labels": 3 * sample["labels"]}


def get_train_spec(flavor: str) -> TrainSpec:
    def build_loader(job_config, tokenizer, dp_rank, dp_world_size):
        return Loader(tiny_diffusion.MODEL_CONFIGS["tiny"], job_config, dp_rank, dp_world_size)

    spec = tiny_diffusion.get_train_spec("tiny")
    return replace(spec, model_cls=Model, build_dataloader_fn=build_loader)


register_train_spec("uneven_noise", get_train_spec)
