import pytest
import torch
from tiny_models import tiny_model


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
