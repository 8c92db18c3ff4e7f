import torch
from tiny_models import tiny_model, tiny_tokens
from torch._dynamo.testing import CompileCounterWithBackend

from torchtitan.models.gpt_oss.model.experts import GptOssExperts


def test_attention_compiles_to_one_graph():
    torch.compiler.reset()
    model, text = tiny_model("gpt_oss"), tiny_tokens(2, 12)
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
