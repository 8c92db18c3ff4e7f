"""How every model behaves."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from model_cases import CASES
from tiny_models import TINY, tiny_model, tiny_spec, tiny_tokens
from torch._dynamo.testing import CompileCounterWithBackend

from torchtitan.distributed.tying import preserve_tying
from torchtitan.protocols.train_spec import get_train_spec

RELATIVE = [name for name in TINY if name != "llama4"]
"""Models in which only the distance of tokens matters: Llama 4's chunks and the growth of its
queries depend on their places."""
WRITERS = {
    "llama3": {"attention.wo.weight", "feed_forward.w2.weight"},
    "qwen3": {"attention.wo.weight", "feed_forward.w2.weight"},
    "deepseek_v3": {
        "attention.wo.weight",
        "feed_forward.w2.weight",
        "moe.experts.w2",
        "moe.shared_experts.w2.weight",
    },
    "gpt_oss": {"attention.wo.weight", "moe.experts.down"},
    "llama4": {
        "attention.wo.weight",
        "feed_forward.w2.weight",
        "moe.experts.down",
        "moe.shared_experts.w2.weight",
    },
}
"""Of the layers, matrices that write to the residual stream. Gemma 3 normalises what they write."""


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_a_token_does_not_see_later_ones(name):
    model, text = tiny_model(name), tiny_tokens(1, 20)
    changed = text.clone()
    changed[0, 12] += 1
    logits, changed_logits = model(text), model(changed % model.args.vocab_size)
    torch.testing.assert_close(logits[:, :12], changed_logits[:, :12])
    assert not torch.allclose(logits[:, 12:], changed_logits[:, 12:])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
@pytest.mark.parametrize(("n_layers", "reach"), [(1, 8), (2, 30)])
def test_the_first_layer_sees_a_window_the_second_all(name, n_layers, reach):
    changes = {"full_attention_every": 2} if name == "gemma3" else {}
    model, text = tiny_model(name, n_layers=n_layers, **changes), tiny_tokens(1, 30)
    changed = text.clone()
    changed[0, 0] = (text[0, 0] + 1) % model.args.vocab_size
    differs = (model(text) != model(changed)).any(dim=-1)[0]
    assert differs[:reach].all()
    assert not differs[reach:].any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "positions_given"),
    [(name, True) for name in TINY] + [(name, False) for name in RELATIVE],
)
def test_packed_documents_are_as_if_alone(name, positions_given):
    model, lengths = tiny_model(name), [7, 20, 5]
    text = tiny_tokens(2, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)

    packed = model(text, positions if positions_given else None, document_ids)
    alone = torch.cat([model(part) for part in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", RELATIVE)
def test_positions_matter_by_their_distance_alone(name):
    model, text = tiny_model(name), tiny_tokens(1, 16)
    counted = torch.arange(16)[None]
    torch.testing.assert_close(model(text, counted), model(text))
    torch.testing.assert_close(model(text, counted + 5), model(text), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(text, counted * 2), model(text), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_stages_made_by_deleting_parts_equal_the_whole(name):
    model, text = tiny_model(name, tie_word_embeddings=False), tiny_tokens(2, 12)
    positions = torch.arange(12)[None]
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    for number in range(1, len(model.layers)):
        del first.layers[str(number)]
    del last.layers["0"]
    first.norm = first.output = last.tok_embeddings = None

    hidden = first(text, positions)
    assert hidden.shape == (2, 12, model.args.dim)
    torch.testing.assert_close(last(hidden, positions), model(text))
    assert set(first.state_dict()) | set(last.state_dict()) == set(model.state_dict())
    for stage in (first, last):
        stage.init_weights()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "flavor"), [(name, "debugmodel") for name in CASES] + [("llama3", "150M")]
)
def test_the_first_loss_is_that_of_guessing_with_logits_of_unit_variance(name, flavor):
    torch.manual_seed(0)
    spec = get_train_spec(name, flavor)
    args = spec.model_args
    if flavor != "debugmodel":
        args = dataclasses.replace(args, n_layers=4)  # to be quick
    model = spec.model_cls(args)
    model.init_weights()
    text = torch.randint(args.vocab_size, (1, 129))
    logits = model(text[:, :-1]).flatten(0, 1)
    assert logits.std().item() == pytest.approx(1, rel=0.1)
    loss = F.cross_entropy(logits, text[:, 1:].flatten())
    # Logits of normal distribution raise the log-partition by half their variance.
    expected = math.log(args.vocab_size) + logits.var().item() / 2
    assert loss.item() == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tied", [False, True])
def test_init_weights_sets_everything_after_meta_construction(name, tied):
    expected = tiny_model(name, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = tiny_spec(name).model_cls(expected.args)
    with preserve_tying(model):
        model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()

    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert model(tiny_tokens(1, 8)).isfinite().all()


@pytest.mark.parametrize("name", WRITERS)
def test_weights_that_write_to_the_stream_shrink_with_depth(name):
    spec = get_train_spec(name, "debugmodel")
    model = spec.model_cls(dataclasses.replace(spec.model_args, n_layers=8))
    model.init_weights()
    seen = set()
    for number, block in enumerate(model.layers.values()):
        expected = 0.02 / math.sqrt(2 * (number + 1))
        for writer, weight in block.named_parameters():
            if writer in WRITERS[name]:
                assert weight.std().item() == pytest.approx(expected, rel=0.03)
                seen.add(writer)
    assert seen == WRITERS[name]


@pytest.mark.parametrize(("name", "graphs"), [("llama3", 1), ("qwen3", 1), ("gemma3", 2)])
def test_blocks_compile_to_one_graph_a_kind(name, graphs):
    torch.compiler.reset()
    model, text = tiny_model(name), tiny_tokens(2, 12)
    expected = model(text)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    torch.testing.assert_close(model(text), expected)
    assert counter.frame_count == graphs  # of Gemma 3: layers with a window and without


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
def test_no_norm_has_two_dtypes_under_autocast(name, monkeypatch):
    """As on one GPU. CUDA has no kernel for two, and does each operation of the norm by itself."""
    dtypes, rms_norm = [], F.rms_norm

    def norm(x, shape, weight=None, eps=None):
        dtypes.append((x.dtype, x.dtype if weight is None else weight.dtype))
        return rms_norm(x, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", norm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tiny_model(name)(tiny_tokens(1, 20))
    assert dtypes and all(x == weight for x, weight in dtypes)
