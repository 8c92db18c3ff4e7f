import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.router import TopKRouter

ARGS = MoEArgs(num_experts=8, top_k=2)
LOAD = torch.tensor([10.0, 40, 5, 5, 20, 10, 5, 5])  # of 50 tokens
LOSSES = {"aux_loss_weight": 1.0, "z_loss_weight": 0.5}


def build(**changes) -> TopKRouter:
    torch.manual_seed(0)
    router = TopKRouter(16, dataclasses.replace(ARGS, **changes))
    router.init_weights(std=0.5)
    return router


def tokens(number: int = 50) -> torch.Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_those_of_the_best_experts(score_func, normalize):
    router = build(score_func=score_func, normalize_weights=normalize, route_scale=2.5)
    weights, experts, counts = router(tokens())
    logits = router.gate(tokens())
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    for own_weights, own_experts, own_scores in zip(weights, experts, scores, strict=True):
        best, expected = own_scores.sort(descending=True)
        assert own_experts.tolist() == expected[:2].tolist()
        factor = 2.5 / best[:2].sum() if normalize else 2.5
        torch.testing.assert_close(own_weights, best[:2] * factor)
    assert torch.equal(counts, torch.bincount(experts.flatten(), minlength=8))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_weights_of_a_bfloat16_model_are_computed_in_float32(score_func):
    router = build(score_func=score_func).bfloat16()
    x = tokens().bfloat16()
    weights, experts, _ = router(x)
    logits = router.gate(x).float()
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    best = scores.gather(1, experts)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, best / best.sum(1, keepdim=True))


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_logits_choose_where_their_scores_are_equal(score_func):
    """As in Llama 4: in float32 a sigmoid is 1 from a logit of about 17 on."""
    router = build(score_func=score_func, top_k=1)
    router.init_weights(std=10.0)
    weights, experts, _ = router(tokens())
    logits = router.gate(tokens())
    assert ((logits > 17).sum(-1) > 1).any()
    assert torch.equal(experts[:, 0], logits.argmax(-1))
    assert weights.isfinite().all()


def test_only_the_best_groups_are_chosen_from():
    router = build(n_groups=4, top_groups=2, top_k=3, use_bias=True)
    router.selection_bias.copy_(torch.randn(8))
    _, experts, _ = router(tokens())
    ranking = router.gate(tokens()).softmax(-1) + router.selection_bias
    quality = ranking.view(-1, 4, 2).sum(-1)  # both experts of a group count
    allowed = quality.topk(2).indices
    for own_experts, own_groups in zip(experts, allowed, strict=True):
        assert {e // 2 for e in own_experts.tolist()} == set(own_groups.tolist())


def test_the_bias_chooses_but_does_not_weigh():
    router = build(use_bias=True, normalize_weights=False)
    router.selection_bias[5] = 10.0
    weights, experts, _ = router(tokens())
    assert (experts[:, 0] == 5).all()
    scores = router.gate(tokens()).softmax(-1)
    torch.testing.assert_close(weights[:, 0], scores[:, 5])


def test_the_bias_moves_against_the_load():
    router = build(use_bias=True, bias_update_rate=0.25)
    router.end_step(torch.tensor([4.0, 8.0, 0.0, 4.0, 4.0, 4.0, 4.0, 4.0]))
    assert router.selection_bias.tolist() == [0, -0.25, 0.25, 0, 0, 0, 0, 0]
    assert router.load[1] == 8


def test_the_bias_of_a_frozen_router_stays():
    router = build(use_bias=True, bias_update_rate=0.25)
    router.gate.requires_grad_(False)
    router.end_step(torch.arange(8.0))
    assert router.selection_bias.tolist() == [0] * 8
    assert router.load[1] == 1


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("aux", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_the_losses_add_their_gradient(score_func, aux, z):
    """As terms of the training loss would, with the load of the last step (Switch, GShard)."""
    router = build(score_func=score_func, aux_loss_weight=aux, z_loss_weight=z, gate_bias=True)
    x = tokens().requires_grad_()
    router.end_step(LOAD)

    weights, _, _ = router(x)
    (2 * weights.sin().sum()).backward()
    grads = [tensor.grad.clone() for tensor in (x, *router.parameters())]

    x.grad = None
    router.zero_grad()
    router.eval()
    weights, _, _ = router(x)
    logits = router.gate(x)
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    mean_probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
    aux_loss = aux * 8 * (LOAD / LOAD.sum() * mean_probability).sum()
    z_loss = z * logits.exp().sum(-1).log().square().mean()  # ST-MoE, equation 5
    (2 * weights.sin().sum() + aux_loss + z_loss).backward()
    for grad, tensor in zip(grads, (x, *router.parameters()), strict=True):
        torch.testing.assert_close(grad, tensor.grad)
        assert grad.any()
    torch.testing.assert_close(router.loss_tally, torch.stack([aux_loss, z_loss]))


def test_the_first_step_has_no_losses():
    """The number of its tokens is not known yet."""
    router, plain = build(**LOSSES), build()
    for each in (router, plain):
        each(tokens())[0].sin().sum().backward()
    assert router.loss_tally.tolist() == [0, 0]
    assert torch.equal(router.gate.weight.grad, plain.gate.weight.grad)
    router.end_step(*router.tallies)
    router(tokens())[0].sum().backward()
    assert (router.loss_tally > 0).all() and not router.losses.any()
    router.end_step(*(tally.clone() for tally in router.tallies))
    assert router.losses.all() and not router.loss_tally.any()
    router.reset_parameters()
    assert not any(buffer.any() for buffer in router.buffers())


def test_micro_batches_share_the_losses():
    whole, parts = build(**LOSSES), build(**LOSSES)
    for router in (whole, parts):
        router.end_step(LOAD)
    whole(tokens())[0].sum().backward()
    for part in tokens().split([10, 25, 15]):
        parts(part)[0].sum().backward()
    torch.testing.assert_close(whole.gate.weight.grad, parts.gate.weight.grad)
    assert torch.equal(whole.tally, parts.tally)
    torch.testing.assert_close(whole.loss_tally, parts.loss_tally)


def sequence_loss(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Of one sequence's scores `[tokens, experts]`; DeepSeek-V3, equations 17 to 20."""
    n_tokens, n_experts = scores.shape
    total = torch.zeros(())
    for i in range(n_experts):
        chosen = [bool((token > token[i]).sum() < top_k) for token in scores]
        f = n_experts / (top_k * n_tokens) * sum(chosen)
        total = total + f * (scores[:, i] / scores.sum(dim=1)).sum() / n_tokens
    return total


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
def test_the_loss_of_each_sequence_adds_its_gradient(score_func):
    """Whatever the bias chooses, and however the sequences are divided among micro-batches."""
    balance = {"aux_loss_weight": 0.3, "aux_loss_per_sequence": True, "use_bias": True}
    router = build(score_func=score_func, **balance)
    router.end_step(LOAD)
    router.selection_bias.copy_(torch.linspace(-1, 1, 8))
    x = tokens().requires_grad_()
    outputs = [router(part, len(part) // 10)[0] for part in x.split([10, 40])]
    torch.cat(outputs).sin().sum().backward()
    grads = [x.grad.clone(), router.gate.weight.grad.clone()]

    x.grad = None
    router.zero_grad()
    logits = router.gate(x)
    scores = logits.softmax(-1) if score_func == "softmax" else logits.sigmoid()
    loss = 0.3 * torch.stack([sequence_loss(part, 2) for part in scores.split(10)]).mean()
    router.eval()
    (router(x)[0].sin().sum() + loss).backward()
    torch.testing.assert_close(grads, [x.grad, router.gate.weight.grad])
    torch.testing.assert_close(router.loss_tally, torch.stack([loss, torch.zeros(())]))


def test_each_token_is_counted_once_a_backward_pass():
    router = build(**LOSSES)
    router.end_step(LOAD)
    _, _, counts = router(tokens())
    assert router.tally.sum() == 0, "a forward pass alone does not train"
    weights, _, _ = checkpoint(router, tokens().requires_grad_(), use_reentrant=False)
    weights.sum().backward()  # runs the forward pass once more
    assert torch.equal(router.tally, counts.float())
    losses = router.loss_tally.clone()
    router.eval()
    router(tokens())[0].sum().backward()
    assert torch.equal(router.tally, counts.float()) and torch.equal(router.loss_tally, losses)
    router.end_step(router.tally)
    assert torch.equal(router.load, counts.float())
    assert router.tally.sum() == 0

    router.end_step(LOAD)
    router.train()
    router(tokens())[0].sum().backward()
    assert torch.equal(router.loss_tally, losses) and losses.all()


def test_micro_batches_in_flight_are_all_counted_when_compiled():
    """As in a pipeline. The compiler may move what does not depend on a gradient."""
    router, eager = build(**LOSSES), build(**LOSSES)
    for each in (router, eager):
        each.end_step(LOAD)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    results = [compiled(tokens()) for _ in range(3)]
    for weights, *_ in results:
        weights.sum().backward()
    assert torch.equal(router.tally, sum(counts for *_, counts in results))
    for _ in results:
        eager(tokens())[0].sum().backward()
    torch.testing.assert_close(router.loss_tally, eager.loss_tally)
    torch.testing.assert_close(router.gate.weight.grad, eager.gate.weight.grad)


def test_state_that_training_goes_on_from_is_in_checkpoints():
    assert build().state_dict().keys() == {"gate.weight"}
    state = build(aux_loss_weight=0.1, use_bias=True).state_dict()
    assert state.keys() == {"gate.weight", "load", "selection_bias"}
    assert build(z_loss_weight=0.1).state_dict().keys() == {"gate.weight", "load"}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float32_gate_does_not_round_its_product(autocast):
    torch.manual_seed(0)
    router = TopKRouter(16, dataclasses.replace(ARGS, gate_bias=True), float32_gate=True)
    router.init_weights(std=0.5)
    gate = router.gate if autocast else router.gate.bfloat16()
    x = tokens().bfloat16().requires_grad_()
    with torch.autocast("cpu", enabled=autocast):
        out = gate(x)
    out.square().sum().backward()

    wide = tokens().bfloat16().float().requires_grad_()
    weight = gate.weight.detach().float().requires_grad_()
    expected = wide @ weight.T + gate.bias.float()
    expected.square().sum().backward()
    assert out.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)
    assert torch.equal(x.grad, wide.grad.bfloat16())
    torch.testing.assert_close(gate.weight.grad, weight.grad.to(gate.weight.dtype))


@pytest.mark.parametrize("options", [{}, {"n_groups": 4, "top_groups": 2, "use_bias": True}])
def test_experts_that_take_turns_have_the_same_load(options):
    """The weights are still those of the router, so it gets its gradient."""
    router = build(top_k=3, **options)
    router.places = torch.arange
    weights, experts, counts = router(tokens(16), sequences=2)
    assert counts.tolist() == [6] * 8
    assert torch.equal(experts[:8], experts[8:])
    assert all(len(set(own)) == 3 for own in experts.tolist())
    scores = router.gate(tokens(16)).softmax(-1).gather(-1, experts)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))
