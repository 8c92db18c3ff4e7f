"""`tiny_llama` with a part of its author's, by the model's name:

own_loss            a plain function
own_loss_tells      one that wraps ours, and tells of it
own_loss_forgets    one that wraps ours, and does not hand attach on
own_loader_steps    a loader whose state is a number, not rows
own_loader_noise    a loader that gives more than the model gets
own_loader_uneven   a loader that gives document ids on rank 1 alone
own_loader_ends     a loader that ends after two batches
own_validator       a validator whose tokens the model does not know
own_tokenizer       a tokenizer that is neither bytes nor Hugging Face's
own_adapters        exports leave out the adapters of the converter `adapters`
own_frozen          its embedding, norms and queries are frozen
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import tiny_llama
import torch
import torch.nn as nn

from torchtitan.components.loss import build_loss, count_labels, cross_entropy
from torchtitan.models.llama3.model import Llama3Model, Llama3StateDictAdapter
from torchtitan.protocols import TrainSpec, register_model_converter, register_train_spec
from torchtitan.protocols.model import layers_of

MODEL_CONFIGS = tiny_llama.MODEL_CONFIGS


class Loader:
    def __init__(self, job_config, state, **more):
        self.shape = job_config.training.local_batch_size, job_config.training.seq_len
        self.state, self.more = state, more

    def __next__(self):
        ones = torch.ones(self.shape, dtype=torch.int64)
        return {"tokens": ones, "labels": ones, **self.more}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        pass

    def close(self):
        pass


def get_own_loss(flavor: str) -> TrainSpec:
    spec = tiny_llama.get_train_spec(flavor)
    return replace(spec, build_loss_fn=lambda job_config: partial(cross_entropy, z_loss_weight=0.0))


class Telling:
    def __init__(self, job_config):
        self.main = build_loss(job_config)
        self.attach = self.main.attach
        self.sum, self.count = 0.0, 0

    def __call__(self, pred, labels):
        loss = self.main(pred, labels)
        if torch.is_grad_enabled():
            self.sum, self.count = self.sum + loss.detach(), self.count + count_labels(labels)
        return loss

    def metrics(self):
        told = {"loss_main": (self.sum, self.count)}
        self.sum, self.count = 0.0, 0
        return told


def get_own_loss_forgets(flavor: str) -> TrainSpec:
    spec = tiny_llama.get_train_spec(flavor)
    return replace(spec, build_loss_fn=lambda job_config: build_loss(job_config).__call__)


def get_own_loss_tells(flavor: str) -> TrainSpec:
    return replace(tiny_llama.get_train_spec(flavor), build_loss_fn=Telling)


def get_own_loader_steps(flavor: str) -> TrainSpec:
    spec = tiny_llama.get_train_spec(flavor)
    return replace(spec, build_dataloader_fn=lambda config, *_: Loader(config, {"step": 0}))


def get_own_loader_noise(flavor: str) -> TrainSpec:
    state = {"rows": torch.tensor([[0]])}
    return replace(
        tiny_llama.get_train_spec(flavor),
        build_dataloader_fn=lambda config, *_: Loader(config, state, noise=torch.rand(4)),
    )


def build_uneven(config, tokenizer, dp_rank, dp_world_size):
    loader = Loader(config, {"rows": torch.tensor([[0]])})
    if dp_rank:
        loader.more = {"document_ids": torch.zeros(loader.shape, dtype=torch.int64)}
    return loader


def get_own_loader_uneven(flavor: str) -> TrainSpec:
    return replace(tiny_llama.get_train_spec(flavor), build_dataloader_fn=build_uneven)


class Ending(Loader):
    left = 2

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        return super().__next__()


def get_own_loader_ends(flavor: str) -> TrainSpec:
    state = {"rows": torch.tensor([[0]])}
    return replace(
        tiny_llama.get_train_spec(flavor),
        build_dataloader_fn=lambda config, *_: Ending(config, state),
    )


class UnknownTokens:
    def validate(self, model_parts, evaluate):
        tokens = torch.full((3, 8), 10_000)
        return evaluate({"tokens": tokens, "labels": tokens}).item()

    def close(self):
        pass


def get_own_validator(flavor: str) -> TrainSpec:
    spec = tiny_llama.get_train_spec(flavor)
    return replace(spec, build_validator_fn=lambda *_: UnknownTokens())


class Frozen(Llama3Model):
    """Of each kind of tensor-parallel style one: ours, and two of PyTorch's."""

    def __init__(self, args):
        super().__init__(args)
        for name, param in self.named_parameters():
            param.requires_grad_(not re.search("tok_embeddings|norm|wq", name))


def get_own_frozen(flavor: str) -> TrainSpec:
    return replace(tiny_llama.get_train_spec(flavor), model_cls=Frozen)


class Letters:
    """Of `model.tokenizer_path`, a file: the letters that there are."""

    vocab_size, bos_id, eos_id = 40, None, 0

    def __init__(self, letters: str = "etaoin") -> None:
        self.fingerprint = letters

    def encode(self, text):
        return [self.fingerprint.find(letter) + 2 for letter in text]

    def decode(self, ids):
        return "".join(self.fingerprint[i - 2] for i in ids if i > 1)


def get_own_tokenizer(flavor: str) -> TrainSpec:
    return replace(
        tiny_llama.get_train_spec(flavor),
        build_tokenizer_fn=lambda config: Letters(Path(config.model.tokenizer_path).read_text()),
    )


class Adapted(nn.Linear):
    """A linear layer, frozen, with one of rank 2 beside it that learns, and is 0 at first."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(2, linear.in_features, device="meta"))
        self.up = nn.Parameter(torch.empty(linear.out_features, 2, device="meta"))

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "down"):
            nn.init.normal_(self.down)
            nn.init.zeros_(self.up)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Adapters:
    changes_parameters = True

    def __init__(self, job_config, parallel_dims):
        pass

    def convert(self, model):
        model.requires_grad_(False)
        for layer in layers_of(model).values():
            layer.attention.wq = Adapted(layer.attention.wq)

    def post_optimizer_hook(self, model_parts):
        pass


class Merging(Llama3StateDictAdapter):
    """Adds each adapter to the matrix that it is beside."""

    def to_hf(self, state_dict):
        merged = dict(state_dict)
        for up in [key for key in merged if key.endswith(".wq.up")]:
            weight, down = (up.removesuffix("up") + name for name in ("weight", "down"))
            merged[weight] = merged[weight] + merged.pop(up) @ merged.pop(down)
        return super().to_hf(merged)


class ForAdapters(Llama3Model):
    """A class of its own, by which its adapter to Hugging Face is found."""


def get_own_adapters(flavor: str) -> TrainSpec:
    return replace(
        tiny_llama.get_train_spec(flavor),
        model_cls=ForAdapters,
        state_dict_adapter=Merging,
    )


register_model_converter(Adapters, "adapters")
register_train_spec("own_adapters", get_own_adapters)
register_train_spec("own_tokenizer", get_own_tokenizer)
register_train_spec("own_frozen", get_own_frozen)
register_train_spec("own_loss", get_own_loss)
register_train_spec("own_loss_tells", get_own_loss_tells)
register_train_spec("own_loss_forgets", get_own_loss_forgets)
register_train_spec("own_validator", get_own_validator)
register_train_spec("own_loader_steps", get_own_loader_steps)
register_train_spec("own_loader_noise", get_own_loader_noise)
register_train_spec("own_loader_uneven", get_own_loader_uneven)
register_train_spec("own_loader_ends", get_own_loader_ends)
