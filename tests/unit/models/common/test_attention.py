import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from torchtitan.models.common.attention import (
    CausalMask,
    ScaledDotProductAttention,
    flex_mask,
    sdpa_mask,
)

BATCH, SEQ, HEAD_DIM = 2, 160, 16
CPU = torch.device("cpu")


def heads(q_heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(BATCH, n, SEQ, HEAD_DIM, generator=generator)
        for n in (q_heads, kv_heads, kv_heads)
    )


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """Attention by its definition."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-2, -1) / HEAD_DIM**0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1) @ v


def documents() -> torch.Tensor:
    """Each row packs documents of other lengths."""
    first = torch.arange(SEQ) // 50
    second = (torch.arange(SEQ) > 70).long()
    return torch.stack([first, second])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_sdpa_equals_attention_written_out(kv_heads, mask):
    attend = ScaledDotProductAttention()
    inputs = [x.requires_grad_() for x in heads(4, kv_heads)]
    allowed = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    built = None
    if mask == "document":
        allowed = built = sdpa_mask(documents())

    out, expected = attend(*inputs, built), written_out(*inputs, allowed)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("document_ids", [None, documents()], ids=["causal", "document"])
def test_flex_equals_sdpa(kv_heads, document_ids):
    attend = ScaledDotProductAttention()
    inputs = heads(4, kv_heads)
    block_mask = flex_mask(SEQ, document_ids, CPU)
    dense_mask = None if document_ids is None else sdpa_mask(document_ids)
    torch.testing.assert_close(
        attend(*inputs, block_mask), attend(*inputs, dense_mask), atol=1e-5, rtol=1e-5
    )


def test_sdpa_mask_is_causal_within_documents():
    mask = sdpa_mask(torch.tensor([[0, 0, 1, 1]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert torch.equal(mask, torch.tensor(expected, dtype=torch.bool)[None, None])


@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex"])
def test_cpu_uses_sdpa_whatever_is_asked(kernel):
    assert CausalMask(kernel)(SEQ, None, CPU) is None
    assert isinstance(CausalMask(kernel)(SEQ, documents(), CPU), torch.Tensor)


@pytest.mark.parametrize(
    ("kernel", "document_ids", "flex"),
    [
        ("auto", None, False),
        ("auto", documents(), True),
        ("sdpa", None, False),
        ("sdpa", documents(), False),
        ("flex", None, True),
        ("flex", documents(), True),
    ],
)
def test_cuda_uses_flex_for_documents_or_when_asked(kernel, document_ids, flex, monkeypatch):
    built = object()
    monkeypatch.setattr("torchtitan.models.common.attention.flex_mask", lambda *arguments: built)
    mask = CausalMask(kernel)(SEQ, document_ids, torch.device("cuda"))
    assert (mask is built) == flex
    if not flex:
        assert (mask is None) == (document_ids is None)


def test_flex_skips_blocks_of_other_documents():
    ids = (torch.arange(1024) // 256)[None]
    causal, document = flex_mask(1024, None, CPU), flex_mask(1024, ids, CPU)
    assert isinstance(document, BlockMask)
    assert document.sparsity() > causal.sparsity()
