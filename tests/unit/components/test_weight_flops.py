"""The FLOPs that are counted for weights are those that PyTorch counts."""

from __future__ import annotations

import own_parts_llama
import pytest
import tiny_llama
import torch
import torch.nn as nn
from tiny_models import TINY, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.components.weight_flops import flops_of_weights
from torchtitan.models.llama3.model import Llama3Model


@pytest.mark.parametrize("name", TINY)
def test_trained_weights_count_as_in_the_args(name: str) -> None:
    model = tiny_model(name)
    once, twice = (model.args.get_nparams_and_flops(seq_len)[1] for seq_len in (1, 2))
    assert flops_of_weights(model) == pytest.approx(2 * once - twice, abs=1)


def flops_per_token(model: nn.Module) -> float:
    tokens = torch.randint(model.args.vocab_size, (2, 8))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens).sum().backward()
    return counter.get_total_flops() / tokens.numel()


def tiny() -> nn.Module:
    model = Llama3Model(tiny_llama.TINY)
    model.init_weights()
    return model


def test_adapters_and_the_frozen_weights_beside_them() -> None:
    model, adapted = tiny(), tiny()
    own_parts_llama.Adapters(None, None).convert(adapted)
    adapted = adapted.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(name.endswith(("up", "down", "embeddings.weight")))
    expected = flops_per_token(adapted) - flops_per_token(model)
    assert flops_of_weights(adapted) - flops_of_weights(model) == expected < 0


def test_no_gradient_flows_into_frozen_layers_before_all_trained_ones() -> None:
    model, frozen = tiny(), tiny()
    for module in (frozen.tok_embeddings, frozen.layers["0"], frozen.layers["1"]):
        module.requires_grad_(False)
    of_attention = 2 * 8 * tiny_llama.TINY.dim * 8  # two layers, whose args' count stays
    expected = flops_per_token(frozen) - flops_per_token(model) + of_attention
    assert flops_of_weights(frozen) - flops_of_weights(model) == expected
