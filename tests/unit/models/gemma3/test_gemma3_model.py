import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from torchtitan.models.gemma3 import MODEL_CONFIGS, Gemma3Model, Gemma3ModelArgs

WINDOW = 8
ARGS = Gemma3ModelArgs(
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    query_pre_attn_scalar=16,
    ffn_dim=96,
    sliding_window=WINDOW,
    full_attention_every=2,
    vocab_size=80,
    rope_factor=1.0,
)


def build(**changes) -> Gemma3Model:
    model = Gemma3Model(dataclasses.replace(ARGS, **changes))
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
def test_each_kind_of_layer_has_its_own_rotation():
    model = build(rope_factor=8.0)
    inputs = model.attention_inputs(torch.tensor([[3]]), None)
    window, full, again = (inputs[str(i)][0].cos.flatten() for i in range(3))
    pairs = torch.arange(0, 16, 2) / 16
    for rotated, angles in ((window, 3 / 1e4**pairs), (full, 3 / 1e6**pairs / 8)):
        torch.testing.assert_close(rotated, angles.cos().repeat(2))
    assert torch.equal(window, again)


@torch.no_grad()
def test_stages_made_by_deleting_parts_equal_the_whole():
    model, text = build(tie_word_embeddings=False), tokens(2, 12)
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
    model = Gemma3Model(args)
    model.init_weights()
    text = torch.randint(args.vocab_size, (1, 129))
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert abs(loss.item() - math.log(args.vocab_size)) < 0.25


@pytest.mark.parametrize("tied", [False, True])
def test_init_weights_sets_everything_after_meta_construction(tied):
    args = dataclasses.replace(ARGS, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Gemma3Model(args)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()

    expected = build(tie_word_embeddings=tied)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert model(tokens(1, 8)).isfinite().all()
    for name, param in model.named_parameters():
        assert param.std().item() == pytest.approx(0 if "norm" in name else 0.02, rel=0.1), name


def test_blocks_compile_to_one_graph_a_kind():
    torch.compiler.reset()
    model, text = build(), tokens(2, 12)
    expected = model(text)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    torch.testing.assert_close(model(text), expected)
    assert counter.frame_count == 2  # with a mask and without
