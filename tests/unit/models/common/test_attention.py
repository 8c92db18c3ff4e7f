from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.models.common import attention
from torchtitan.models.common.attention import (
    CausalMask,
    ScaledDotProductAttention,
    dense_mask,
    flash_of_last,
    flex_mask,
    mask_of_last,
)

BATCH, SEQ, HEAD_DIM = 2, 160, 16
CPU = torch.device("cpu")


class Seen(TorchDispatchMode):
    """Notes the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


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


RULES = {
    "causal": (CausalMask(), None),
    "document": (CausalMask(), documents()),
    "window": (CausalMask(window=20), None),
    "document window": (CausalMask(window=20), documents()),
    "chunk": (CausalMask(chunk=30), None),
    "document chunk": (CausalMask(chunk=30), documents()),
}


def masks(rule: str) -> tuple[torch.Tensor, BlockMask]:
    """The mask of a rule, dense and for flex attention."""
    mask, document_ids = RULES[rule]
    batch = 1 if document_ids is None else BATCH
    shape = (batch, SEQ, SEQ, CPU)
    may_look = mask.rule(document_ids, None)
    return dense_mask(may_look, *shape), flex_mask(may_look, *shape)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("mask", ["causal", "document"])
def test_sdpa_equals_attention_written_out(kv_heads, mask):
    attend = ScaledDotProductAttention()
    inputs = [x.requires_grad_() for x in heads(4, kv_heads)]
    allowed = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    built = None
    if mask == "document":
        allowed = built = CausalMask()(SEQ, documents(), CPU)

    out, expected = attend(*inputs, built), written_out(*inputs, allowed)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(grads, expected_grads, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["plain", "fewer queries", "dense", "flex"])
def test_every_kernel_takes_the_scale(kernel):
    q, k, v = heads(4, 2)
    scaled, plain = ScaledDotProductAttention(scale=0.5), ScaledDotProductAttention()
    dense, block = masks("window")
    mask = {"dense": dense, "flex": block}.get(kernel)
    if kernel == "fewer queries":
        q = q[:, :, 100:]
    expected = plain(q * 0.5 * HEAD_DIM**0.5, k, v, mask)
    torch.testing.assert_close(scaled(q, k, v, mask), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_fewer_queries_than_keys_are_the_last(kv_heads):
    attend = ScaledDotProductAttention()
    q, k, v = heads(4, kv_heads)
    torch.testing.assert_close(
        attend(q[:, :, 100:], k, v), attend(q, k, v)[:, :, 100:], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fewer_queries_on_cuda(dtype):
    with FakeTensorMode():  # no GPU needed: checks arguments and shapes
        q = torch.empty(BATCH, 4, 60, HEAD_DIM, device="cuda", dtype=dtype)
        k = torch.empty(BATCH, 2, SEQ, HEAD_DIM, device="cuda", dtype=dtype)
        out = ScaledDotProductAttention()(q, k, k)
    assert out.shape == q.shape
    assert out.dtype == dtype


def test_fewer_queries_on_cuda_with_small_values():
    """DeepSeek's under context parallelism: the flash kernel, not a mask of all pairs."""
    with FakeTensorMode(), Seen() as seen:
        q = torch.empty(BATCH, 4, 60, 24, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(BATCH, 4, SEQ, 24, device="cuda", dtype=torch.bfloat16)
        v = torch.empty(BATCH, 4, SEQ, 16, device="cuda", dtype=torch.bfloat16)
        out = ScaledDotProductAttention()(q, k, v)
    assert out.shape == (BATCH, 4, 60, 16)
    assert {"_scaled_dot_product_flash_attention", "constant_pad_nd"} <= seen.names
    assert "tril" not in seen.names


@pytest.mark.parametrize(("size", "of_values"), [(20, 20), (264, 264), (16, 24)])
def test_fewer_queries_on_cuda_whose_heads_no_flash_kernel_takes_have_a_mask(size, of_values):
    with FakeTensorMode(), Seen() as seen:
        q = torch.empty(BATCH, 4, 60, size, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(BATCH, 4, SEQ, size, device="cuda", dtype=torch.bfloat16)
        v = torch.empty(BATCH, 4, SEQ, of_values, device="cuda", dtype=torch.bfloat16)
        out = ScaledDotProductAttention()(q, k, v)
    assert out.shape == (BATCH, 4, 60, of_values)
    assert "tril" in seen.names


def test_the_flash_kernel_passes_on_gradients_of_small_values():
    with FakeTensorMode(), Seen() as seen:  # not of CUDA, whose backward passes need the driver
        q = torch.empty(BATCH, 4, 60, 24, dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(BATCH, 4, SEQ, 24, dtype=torch.bfloat16, requires_grad=True)
        v = torch.empty(BATCH, 4, SEQ, 16, dtype=torch.bfloat16, requires_grad=True)
        flash_of_last(q, k, v, None).sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [q.shape, k.shape, v.shape]
    assert "_scaled_dot_product_flash_attention_backward" in seen.names


def flash(q, k, v, dropout, causal, *, scale):
    """As CUDA's flash kernel: heads of one size, and a triangle that ends at the last key."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and causal and not dropout
    mask = mask_of_last(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None


@pytest.mark.parametrize("scale", [None, 0.5])
def test_padded_values_give_what_plain_ones_do(monkeypatch, scale):
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    inputs = [x.requires_grad_() for x in (heads(4, 4)[0][:, :, 100:], *heads(4, 4)[1:])]
    small = inputs[2].detach()[..., :10].clone().requires_grad_()
    q, k, v = *inputs[:2], small
    padded = flash_of_last(q, k, v, scale)
    plain = ScaledDotProductAttention(scale)(q, k, v)  # on a CPU by a mask
    torch.testing.assert_close(padded, plain)
    weights = torch.randn_like(plain)
    grads = [torch.autograd.grad((out * weights).sum(), [q, k, v]) for out in (padded, plain)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("queries", [SEQ, 1])
@pytest.mark.parametrize(
    ("dtype", "autocast", "repeated"),
    [(torch.bfloat16, False, False), (torch.float32, False, True), (torch.float32, True, False)],
)
def test_grouped_heads_on_cuda_take_a_fused_kernel(monkeypatch, dtype, autocast, repeated, queries):
    """The one for float32 knows no grouped heads."""
    calls = []

    def attend(q, k, v, enable_gqa, **others):
        calls.append((k.shape[1], v.shape[1], enable_gqa))
        return torch.empty_like(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: autocast)
    with FakeTensorMode():
        q = torch.empty(BATCH, 4, queries, HEAD_DIM, device="cuda", dtype=dtype)
        k = torch.empty(BATCH, 2, SEQ, HEAD_DIM, device="cuda", dtype=dtype)
        ScaledDotProductAttention()(q, k, k)
    assert calls == [(4, 4, False) if repeated else (2, 2, True)]


@pytest.mark.parametrize("mask", [None, "document"])
def test_repeated_heads_give_what_grouped_ones_do(monkeypatch, mask):
    inputs = [x.requires_grad_() for x in heads(4, 2)]
    built = None if mask is None else masks(mask)[0]
    grouped = ScaledDotProductAttention()(*inputs, built)
    monkeypatch.setattr(attention, "_knows_grouped_heads", lambda q, mask: False)
    repeated = ScaledDotProductAttention()(*inputs, built)
    torch.testing.assert_close(repeated, grouped)
    weights = torch.randn_like(grouped)
    grads = [torch.autograd.grad((o * weights).sum(), inputs) for o in (repeated, grouped)]
    torch.testing.assert_close(*grads)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rule", RULES)
def test_flex_equals_sdpa(kv_heads, rule):
    attend = ScaledDotProductAttention()
    inputs = heads(4, kv_heads)
    dense, block = masks(rule)
    torch.testing.assert_close(attend(*inputs, block), attend(*inputs, dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mask", "document_ids", "expected"),
    [
        (CausalMask(), [0, 0, 1, 1], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]),
        (CausalMask(window=2), None, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        (CausalMask(chunk=3), None, [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]),
        (
            CausalMask(window=2),
            [0, 0, 0, 1],
            [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
        ),
        (
            CausalMask(chunk=2),  # counted from the beginning of each document
            [0, 1, 1, 1],
            [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]],
        ),
    ],
    ids=["document", "window", "chunk", "window and document", "chunk and document"],
)
def test_mask_says_where_a_query_may_look(mask, document_ids, expected):
    if document_ids is not None:
        document_ids = torch.tensor([document_ids])
    built = mask(4, document_ids, CPU)
    assert torch.equal(built, torch.tensor(expected, dtype=torch.bool)[None, None])


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "causal"])
def test_mask_of_some_queries_is_their_rows(rule):
    mask, document_ids = RULES[rule]
    queries = torch.tensor([3, 0, 150, 60])
    some = mask(SEQ, document_ids, CPU, queries)
    assert torch.equal(some, mask(SEQ, document_ids, CPU)[:, :, queries])


def test_a_mask_of_documents_is_as_long_as_they_are():
    """A later stage counts its hidden states, of which tensor parallelism leaves a part."""
    document_ids = torch.tensor([[0, 0, 1, 1]])
    assert torch.equal(CausalMask()(2, document_ids, CPU), CausalMask()(4, document_ids, CPU))


@pytest.mark.parametrize("limit", ["window", "chunk"])
def test_limit_as_long_as_the_sequence_is_plain_causal(limit):
    assert CausalMask(**{limit: SEQ})(SEQ, None, CPU) is None
    assert CausalMask(**{limit: SEQ - 1})(SEQ, None, CPU) is not None


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
    for kind in ("flex", "dense"):
        monkeypatch.setattr(
            f"torchtitan.models.common.attention.{kind}_mask", lambda *_, kind=kind: kind
        )
    built = CausalMask(kernel)(SEQ, document_ids, torch.device("cuda"))
    sdpa = None if document_ids is None else "dense"
    assert built == ("flex" if flex else sdpa)


def test_flex_skips_blocks_of_other_documents():
    ids = (torch.arange(1024) // 256)[None]
    causal, document = (
        flex_mask(CausalMask().rule(i, None), 1, 1024, 1024, CPU) for i in (None, ids)
    )
    assert isinstance(document, BlockMask)
    assert document.sparsity() > causal.sparsity()


def test_the_mask_of_docs_model_code_shows_whole_documents():
    page = (Path(__file__).parents[4] / "docs" / "model_code.md").read_text()
    names = {"CausalMask": CausalMask}
    exec(page.partition("# model/model.py, for documents\n")[2].partition("```")[0], names)
    mask, ids, last = names["DocumentMask"](), documents(), torch.arange(SEQ - 9, SEQ)
    same = (ids[:, None] == ids[..., None])[:, None]
    assert torch.equal(mask(SEQ, ids, CPU), same)
    assert torch.equal(mask(SEQ, ids, CPU, last), same[:, :, last])
    assert mask(SEQ, None, CPU) is None
    assert dense_mask(mask.rule(None, None), 1, SEQ, SEQ, CPU).all()
    flex_mask(mask.rule(None, None), 1, SEQ, SEQ, CPU)


def test_compiled_it_takes_sequences_of_other_lengths() -> None:
    """As those of a validation; the compiler then computes with the length as a symbol."""
    attend = ScaledDotProductAttention()
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    for seq_len in 8, 4, 6:
        q = torch.randn(1, 2, seq_len, 8)
        torch.testing.assert_close(compiled(q, q, q), attend(q, q, q))
