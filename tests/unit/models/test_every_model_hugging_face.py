"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from model_cases import CASES
from safetensors.torch import load_file

from torchtitan.protocols.train_spec import get_train_spec, model_flavors


@pytest.fixture(
    params=[
        pytest.param((name, args), id=f"{name}-{variant}")
        for name, case in CASES.items()
        for variant, args in case.variants.items()
    ]
)
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, the adapter between them, and the folder
    they were saved in."""
    name, args = request.param
    spec = get_train_spec(name, model_flavors(name)[0])
    hf = CASES[name].hf_model(args)
    hf.save_pretrained(tmp_path)
    ours = spec.model_cls(args).load_checkpoint(tmp_path)
    return hf, ours, spec.state_dict_adapter(args), tmp_path


@torch.no_grad()
def test_logits(models):
    hf, ours, _, _ = models
    for seq_len in (20, 128, 512):
        input_ids = torch.randint(ours.args.vocab_size, (2, seq_len))
        torch.testing.assert_close(
            ours(input_ids),
            hf(input_ids).logits,
            atol=1e-4,
            rtol=1e-4,
            msg=lambda message, seq_len=seq_len: f"{seq_len} tokens: {message}",
        )


def test_gradients(models):
    hf, ours, adapter, folder = models
    text = torch.randint(ours.args.vocab_size, (2, 129))
    for logits_of in (ours, lambda ids: hf(ids).logits):
        F.cross_entropy(logits_of(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()

    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf.requires_grad_(False)
    for param in hf.parameters():
        param.copy_(param.grad)
    hf.save_pretrained(folder / "grads")  # takes experts apart as a checkpoint has them
    hf_grads = load_file(folder / "grads" / "model.safetensors")
    for name, _ in hf.named_buffers():  # which have none
        hf_grads.pop(name, None)
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        # An expert without tokens has zeros.
        assert (ours_grads[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_to_hf_restores_every_tensor(models):
    _, ours, adapter, folder = models
    back = adapter.to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_the_args_come_from_the_config(models):
    _, ours, _, folder = models
    args = type(ours.args).from_hf_config(json.loads((folder / "config.json").read_text()))
    if args.num_experts:  # the file says nothing of the router's losses
        assert not args.moe.has_losses
        weights = {
            name: getattr(ours.args.moe, name) for name in ("aux_loss_weight", "z_loss_weight")
        }
        args = dataclasses.replace(args, moe=dataclasses.replace(args.moe, **weights))
    assert args == ours.args
