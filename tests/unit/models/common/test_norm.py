import torch

from torchtitan.models.common.norm import RMSNorm


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
