import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.gpt_oss import MODEL_CONFIGS, GptOssModel, GptOssModelArgs
from torchtitan.models.gpt_oss.model.experts import GptOssExperts

WINDOW = 8
ARGS = GptOssModelArgs(
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    sliding_window=WINDOW,
    moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=32, gate_bias=True),
    vocab_size=80,
)


def build(**changes) -> GptOssModel:
    model = GptOssModel(dataclasses.replace(ARGS, **changes))
    torch.manual_seed(0)
    model.init_weights()
    return model


def tokens(batch: int, seq: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(ARGS.vocab_size, (batch, seq), generator=generator)


@torch.no_grad()
def test_a_token_does_not_see_later_ones():
    model, text = build(), tokens(1, 20)
    changed = text.clone()
    changed[0, 12] += 1
    logits, changed_logits = model(text), model(changed % ARGS.vocab_size)
    torch.testing.assert_close(logits[:, :12], changed_logits[:, :12])
    assert not torch.allclose(logits[:, 12:], changed_logits[:, 12:])


@torch.no_grad()
@pytest.mark.parametrize(("n_layers", "reach"), [(1, WINDOW), (2, 30)])
def test_the_first_layer_sees_a_window_the_second_all(n_layers, reach):
    model, text = build(n_layers=n_layers), tokens(1, 30)
    changed = text.clone()
    changed[0, 0] = (text[0, 0] + 1) % ARGS.vocab_size
    differs = (model(text) != model(changed)).any(dim=-1)[0]
    assert differs[:reach].all()
    assert not differs[reach:].any()


@torch.no_grad()
@pytest.mark.parametrize("positions_given", [True, False])
def test_packed_documents_are_as_if_alone(positions_given):
    model, lengths = build(), [7, 20, 5]
    text = tokens(2, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)

    packed = model(text, positions if positions_given else None, document_ids)
    alone = torch.cat([model(part) for part in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stages_made_by_deleting_parts_equal_the_whole():
    model, text = build(), tokens(2, 12)
    positions = torch.arange(12)[None]
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    del first.layers["1"], first.layers["2"], last.layers["0"]
    first.norm = first.output = last.tok_embeddings = None

    hidden = first(text, positions)
    assert hidden.shape == (2, 12, ARGS.dim)
    torch.testing.assert_close(last(hidden, positions), model(text))
    assert set(first.state_dict()) | set(last.state_dict()) == set(model.state_dict())
    for stage in (first, last):
        stage.init_weights()


@torch.no_grad()
def test_the_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    args = MODEL_CONFIGS["debugmodel"]
    model = GptOssModel(args)
    model.init_weights()
    text = torch.randint(args.vocab_size, (1, 129))
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert abs(loss.item() - math.log(args.vocab_size)) < 0.25


@pytest.mark.parametrize("tied", [False, True])
def test_init_weights_sets_everything_after_meta_construction(tied):
    args = dataclasses.replace(ARGS, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = GptOssModel(args)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()

    expected = build(tie_word_embeddings=tied)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert model(tokens(1, 8)).isfinite().all()


def test_weights_that_write_to_the_stream_shrink_with_depth():
    model = GptOssModel(dataclasses.replace(MODEL_CONFIGS["debugmodel"], n_layers=6))
    model.init_weights()
    for number, block in enumerate(model.layers.values()):
        expected = 0.02 / math.sqrt(2 * (number + 1))
        for weight in (block.attention.wo.weight, block.moe.experts.down):
            assert weight.std().item() == pytest.approx(expected, rel=0.03)


def test_attention_compiles_to_one_graph():
    torch.compiler.reset()
    model, text = build(), tokens(2, 12)
    expected = model(text)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers.values():
        attention = layer.attention
        attention.forward = torch.compile(attention.forward, backend=counter, fullgraph=True)
    torch.testing.assert_close(model(text), expected)
    assert counter.frame_count == 2  # with a mask and without


def test_experts_written_out():
    torch.manual_seed(0)
    experts = GptOssExperts(num_experts=3, dim=8, hidden_dim=16, limit=0.5)
    for param in experts.parameters():
        torch.nn.init.normal_(param)
    counts = torch.tensor([2, 0, 5])
    rows = torch.randn(7, 8)
    expected = []
    for row, expert in zip(rows, [0, 0, 2, 2, 2, 2, 2], strict=True):
        gate_up = row @ experts.gate_up[expert] + experts.gate_up_bias[expert]
        gate, up = gate_up[::2].clamp(max=0.5), gate_up[1::2].clamp(-0.5, 0.5)
        hidden = gate * (1.702 * gate).sigmoid() * (up + 1)
        expected.append(hidden @ experts.down[expert] + experts.down_bias[expert])
    torch.testing.assert_close(experts(rows, counts), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_gradients_of_biases_in_bfloat16_add_up_in_float32():
    """2,000 rows of 1: a running sum in bfloat16 would stay at 256."""
    experts = GptOssExperts(num_experts=2, dim=8, hidden_dim=16, limit=7.0).bfloat16()
    experts.init_weights(0.02, 0.02)
    counts = torch.tensor([2000, 48])
    out = experts(torch.randn(2048, 8, dtype=torch.bfloat16), counts)
    out.backward(torch.ones_like(out))
    expected = counts[:, None].expand(2, 8).to(torch.bfloat16)
    torch.testing.assert_close(experts.down_bias.grad, expected)
