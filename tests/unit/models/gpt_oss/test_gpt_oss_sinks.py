import pytest
import torch

from torchtitan.models.common.attention import CausalMask, dense_mask, flex_mask
from torchtitan.models.gpt_oss.model.sink_attention import SinkAttention, Sinks

BATCH, HEADS, SEQ, HEAD_DIM = 2, 4, 160, 16
CPU = torch.device("cpu")
MASKS = {"causal": CausalMask(), "window": CausalMask(window=20)}


def inputs(kv_heads: int, dtype: torch.dtype = torch.float32) -> tuple[Sinks, list[torch.Tensor]]:
    """Sinks, and queries, keys and values `[batch, seq, heads, head_dim]`."""
    torch.manual_seed(0)
    sinks = Sinks(HEADS, HEAD_DIM).to(dtype)
    torch.nn.init.normal_(sinks.weight, std=3.0)
    qkv = [torch.randn(BATCH, SEQ, n, HEAD_DIM, dtype=dtype) for n in (HEADS, kv_heads, kv_heads)]
    return sinks, qkv


def attend(sinks: Sinks, qkv: list[torch.Tensor], mask) -> torch.Tensor:
    q, k, v = qkv
    return SinkAttention(HEAD_DIM)(*(x.transpose(1, 2) for x in (sinks(q), k, v)), mask)


def written_out(sinks: Sinks, qkv: list[torch.Tensor], allowed: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in qkv)
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / HEAD_DIM**0.5).masked_fill(~allowed, -torch.inf)
    sink = sinks.weight.view(1, -1, 1, 1).expand(BATCH, -1, SEQ, 1)
    return torch.cat([sink, scores], dim=-1).softmax(dim=-1)[..., 1:] @ v


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_it_equals_attention_written_out(kv_heads, name):
    sinks, qkv = inputs(kv_heads)
    qkv = [x.requires_grad_() for x in qkv]
    allowed = dense_mask(MASKS[name].rule(None, None), 1, SEQ, SEQ, CPU)
    out = attend(sinks, qkv, MASKS[name](SEQ, None, CPU))
    expected = written_out(sinks, qkv, allowed)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)

    weights, leaves = torch.randn_like(out), [*qkv, sinks.weight]
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum(), leaves)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", MASKS)
def test_flex_equals_sdpa(kv_heads, name):
    sinks, qkv = inputs(kv_heads)
    rule = MASKS[name].rule(None, None)
    dense, block = (build(rule, 1, SEQ, SEQ, CPU) for build in (dense_mask, flex_mask))
    torch.testing.assert_close(
        attend(sinks, qkv, block), attend(sinks, qkv, dense), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_fewer_queries_than_keys_are_the_last():
    sinks, (q, k, v) = inputs(2)
    whole = attend(sinks, [q, k, v], None)
    torch.testing.assert_close(
        attend(sinks, [q[:, 100:], k, v], None), whole[:, :, 100:], atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_a_high_sink_takes_all_and_a_low_one_nothing():
    sinks, qkv = inputs(4)
    sinks.weight.fill_(50.0)
    assert attend(sinks, qkv, None).abs().max() < 1e-6
    sinks.weight.fill_(-50.0)
    q, k, v = (x.transpose(1, 2) for x in qkv)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(sinks, qkv, None), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sinks_are_exact_in_bfloat16():
    """Head sizes of 16 and 64 multiply by powers of two."""
    sinks, (q, _, _) = inputs(4, torch.bfloat16)
    assert torch.equal(sinks(q)[..., HEAD_DIM] * HEAD_DIM**-0.5, sinks.weight.expand(BATCH, SEQ, 4))
