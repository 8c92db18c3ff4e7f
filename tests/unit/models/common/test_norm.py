import torch

from torchtitan.models.common.norm import RMSNorm, ZeroCenteredRMSNorm


def test_the_weight_is_added_to_one_in_float32():
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


def test_it_starts_at_one():
    norm = ZeroCenteredRMSNorm(8, eps=0)
    norm.reset_parameters()
    torch.testing.assert_close(norm(2 * torch.ones(8)), torch.ones(8))


def test_a_weight_of_another_dtype_changes_no_bit():
    torch.manual_seed(0)
    x, gradient = torch.randn(2, 64, 5, 33).bfloat16()
    of_both = []
    for cls in RMSNorm, torch.nn.RMSNorm:
        norm, own_x = cls(33, eps=1e-6), x.clone().requires_grad_()
        norm.weight.data = torch.linspace(0.5, 2, 33)
        y = norm(own_x)
        y.backward(gradient)
        of_both.append((y, own_x.grad, norm.weight.grad))
    for own, of_torch in zip(*of_both, strict=True):
        assert own.dtype == of_torch.dtype and torch.equal(own, of_torch)
