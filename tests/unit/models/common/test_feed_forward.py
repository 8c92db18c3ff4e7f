import torch
import torch.nn.functional as F

from torchtitan.models.common.feed_forward import FeedForward


def test_swiglu_written_out():
    torch.manual_seed(0)
    layer, x = FeedForward(8, 24), torch.randn(2, 3, 8)
    gate = x @ layer.w1.weight.T
    expected = (gate * gate.sigmoid() * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_another_activation_makes_geglu():
    torch.manual_seed(0)
    layer, x = FeedForward(8, 24, activation=F.gelu), torch.randn(2, 3, 8)
    gate = x @ layer.w1.weight.T
    normal = torch.distributions.Normal(0, 1)
    expected = (gate * normal.cdf(gate) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_init_sets_the_output_matrix_apart():
    layer = FeedForward(256, 512)
    layer.init_weights(std=0.02, output_std=0.001)
    stds = [w.weight.std().item() for w in (layer.w1, layer.w3, layer.w2)]
    torch.testing.assert_close(stds, [0.02, 0.02, 0.001], rtol=0.02, atol=0)
