import pytest
import torch
from tiny_models import tiny_model

from torchtitan.models.gemma3.model.model import ZeroCenteredRMSNorm


@torch.no_grad()
def test_each_kind_of_layer_has_its_own_rotation():
    model = tiny_model("gemma3", full_attention_every=2, rope_factor=8.0)
    inputs = model.attention_inputs(torch.tensor([[3]]), None)
    window, full, again = (inputs[str(i)][0].cos.flatten() for i in range(3))
    pairs = torch.arange(0, 24, 2) / 24
    for rotated, angles in ((window, 3 / 1e4**pairs), (full, 3 / 1e6**pairs / 8)):
        torch.testing.assert_close(rotated, angles.cos().repeat(2))
    assert torch.equal(window, again)


@pytest.mark.parametrize("tied", [False, True])
def test_all_layers_start_with_weights_of_one_size(tied):
    model = tiny_model("gemma3", tie_word_embeddings=tied)
    for name, param in model.layers.named_parameters():
        assert param.std().item() == pytest.approx(0 if "norm" in name else 0.02, rel=0.1), name


def test_the_weight_of_a_norm_is_added_to_one_in_float32():
    torch.manual_seed(0)
    norm, x = ZeroCenteredRMSNorm(8, eps=1e-6), torch.randn(2, 3, 8)
    torch.nn.init.normal_(norm.weight, std=1e-3)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight)
    torch.testing.assert_close(norm(x), expected)

    norm.bfloat16()  # where 1 + 1e-3 would be 1
    rounded = x.bfloat16().float()
    expected = rounded / (rounded.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    expected = expected * (1 + norm.weight.float())
    assert torch.equal(norm(x.bfloat16()), expected.bfloat16())


def test_a_norm_starts_at_one():
    norm = ZeroCenteredRMSNorm(8, eps=0)
    norm.reset_parameters()
    torch.testing.assert_close(norm(2 * torch.ones(8)), torch.ones(8))
