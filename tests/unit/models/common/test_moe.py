"""The layer, against a loop over experts; see test_router.py for the router."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from torchtitan.distributed.select_rows import inverse_permutation, select_rows
from torchtitan.models.common.moe import GroupedExperts, MoE, MoEArgs

ARGS = MoEArgs(num_experts=6, top_k=2, hidden_dim=24)
DIM = 16


def build(**changes) -> MoE:
    torch.manual_seed(0)
    moe = MoE(DIM, dataclasses.replace(ARGS, **changes))
    moe.init_weights(std=0.5, output_std=0.5)
    return moe


def loop_over_experts(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, token by token."""
    tokens = x.flatten(0, 1)
    weights, experts, _ = moe.router(tokens)
    rows = []
    for token, own_weights, own_experts in zip(tokens, weights, experts, strict=True):
        parts = []
        for weight, e in zip(own_weights, own_experts, strict=True):
            w1, w2, w3 = moe.experts.w1[e], moe.experts.w2[e], moe.experts.w3[e]
            weight, row = weight.to(x.dtype), token
            if moe.args.weight_inputs:
                weight, row = 1, weight * token
            parts.append(weight * (w2 @ (F.silu(w1 @ row) * (w3 @ row))))
        rows.append(torch.stack(parts).sum(0))
    out = torch.stack(rows).view_as(x)
    return out if moe.shared_experts is None else out + moe.shared_experts(x)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(
    "changes", [{}, {"num_shared_experts": 2}, {"weight_inputs": True}], ids=str
)
def test_output_and_gradients_equal_a_loop_over_experts(dtype, tolerance, changes):
    moe = build(**changes)
    for part in (moe.experts, moe.shared_experts or moe.experts):
        part.to(dtype)
    moe.router.gate.to(dtype)
    x = torch.randn(2, 9, DIM).to(dtype)
    weight = torch.randn(2, 9, DIM).to(dtype)
    results = []
    for forward in (moe, lambda x: loop_over_experts(moe, x)):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        (out * weight).sum().backward()
        results.append([out, leaf.grad, *[p.grad.clone() for p in moe.parameters()]])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        difference = (ours.float() - expected.float()).norm() / expected.float().norm()
        assert difference < tolerance


def test_only_what_writes_to_the_residual_stream_begins_with_output_std():
    torch.manual_seed(0)
    moe = MoE(256, MoEArgs(hidden_dim=256, num_shared_experts=1))
    moe.init_weights(std=0.02, output_std=0.005)
    for name, param in moe.named_parameters():
        expected = 0.005 if ".w2" in name else 0.02
        assert param.std().item() == pytest.approx(expected, rel=0.1), name


def test_experts_without_rows_get_no_gradient_and_harm_nobody():
    experts = GroupedExperts(4, DIM, 24)
    experts.init_weights(0.5, 0.5)
    for counts in ([0, 5, 0, 2], [0, 0, 0, 0]):
        experts.zero_grad()
        rows = torch.randn(sum(counts), DIM, requires_grad=True)
        experts(rows, torch.tensor(counts)).square().sum().backward()
        assert rows.grad.shape == rows.shape
        for param in experts.parameters():
            for grad, count in zip(param.grad, counts, strict=True):
                assert bool(grad.any()) == (count > 0)


def test_autocast_covers_the_experts():
    moe = build(num_shared_experts=1)
    x = torch.randn(1, 8, DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
        counts = torch.bincount(torch.arange(8) % moe.args.num_experts)
        assert moe.experts(x[0], counts).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), moe(x), atol=0.5, rtol=0.1)


def test_it_compiles_to_one_graph_in_bfloat16():
    torch.compiler.reset()
    moe, x = (
        build(aux_loss_weight=0.1, z_loss_weight=0.1).bfloat16(),
        torch.randn(1, 8, DIM).bfloat16(),
    )
    moe.router.load += torch.arange(6)
    eager = copy.deepcopy(moe)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe.forward, backend=counter, fullgraph=True)
    for forward in (compiled, eager):
        forward(x).square().sum().backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(moe.experts.w1.grad, eager.experts.w1.grad)
    torch.testing.assert_close(moe.router.gate.weight.grad, eager.router.gate.weight.grad)
    torch.testing.assert_close(moe.router.loss_tally, eager.router.loss_tally)
    assert moe.router.loss_tally.all()
    assert torch.equal(moe.router.tally, eager.router.tally)
    assert moe.router.tally.sum() == 8 * ARGS.top_k


def test_rows_go_there_and_back():
    order = torch.randperm(12)
    place = inverse_permutation(order)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    rows = select_rows(x, order, place, copies=2)
    assert torch.equal(rows, x[order // 2])
    assert torch.equal(select_rows(rows, place, order), x.repeat_interleave(2, dim=0))
    assert torch.autograd.gradcheck(lambda x: select_rows(x, order, place, 2), x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 7}, r"top_k \(7\) must be from 1 to num_experts \(6\)"),
        ({"hidden_dim": 20}, r"hidden_dim \(20\) must be a multiple of 8"),
        ({"hidden_dim": 0}, r"hidden_dim \(0\) must be a multiple of 8, at least 8"),
        ({"n_groups": 4}, r"n_groups \(4\) must divide num_experts \(6\)"),
        (
            {"n_groups": 3, "top_groups": 1, "top_k": 3},
            r"top_groups \(1\) groups together at least",
        ),
        ({"n_groups": 6, "top_groups": 3}, r"groups of 1 experts are too small"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ARGS, **changes)


def test_experts_need_aligned_rows():
    with pytest.raises(ValueError, match=r"dim \(12\) must be a multiple of 8"):
        MoE(12, ARGS)


def test_a_router_of_ones_own_takes_tokens_alone():
    """As docs/own_modules.md describes it: it lacks the attributes of `TopKRouter`."""

    class Router(torch.nn.Module):
        def forward(self, x):
            experts = torch.arange(2 * len(x)).remainder(6).view(-1, 2)
            return torch.full((len(x), 2), 0.5), experts, torch.bincount(experts.flatten())

    moe, x = build(), torch.randn(2, 9, DIM)
    moe.router = Router()
    torch.testing.assert_close(moe(x), loop_over_experts(moe, x))
