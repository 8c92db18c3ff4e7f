import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.llama4 import MODEL_CONFIGS, Llama4Model, Llama4ModelArgs
from torchtitan.models.llama4.model.args import MOE
from torchtitan.models.llama4.model.model import Temperature

ARGS = Llama4ModelArgs(
    dim=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=24,
    ffn_dim=96,
    moe=dataclasses.replace(MOE, num_experts=8, hidden_dim=40),
    moe_interval=2,
    chunk=8,
    temperature_floor=8,
    vocab_size=80,
    rope_scaling=RopeScaling(original_max_seq_len=32),
)


def build(**changes) -> Llama4Model:
    model = Llama4Model(dataclasses.replace(ARGS, **changes))
    torch.manual_seed(0)
    model.init_weights()
    return model


def tokens(batch: int, seq: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(ARGS.vocab_size, (batch, seq), generator=generator)


@torch.no_grad()
@pytest.mark.parametrize(("n_layers", "sees_all"), [(3, False), (4, True)])
def test_only_every_fourth_layer_sees_beyond_a_chunk(n_layers, sees_all):
    model, text = build(n_layers=n_layers), tokens(1, 24)
    changed = text.clone()
    changed[0, 5] = (changed[0, 5] + 1) % ARGS.vocab_size
    differs = (model(text) - model(changed)).abs().amax(-1)[0] > 1e-4
    assert not differs[:5].any()
    assert differs[5:8].all()
    assert differs[8:].all() == sees_all
    assert differs[8:].any() == sees_all


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    model, lengths = build(), [7, 20, 5]
    text = tokens(2, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = model(text, positions, document_ids)
    alone = torch.cat([model(part) for part in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_queries_grow_by_the_logarithm_of_their_place():
    temper = Temperature(torch.tensor([[0, 6, 7, 15, 23]]), floor=8, scale=0.5)
    expected = 1 + 0.5 * torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0]).log()
    q = torch.ones(1, 5, 2, 4, dtype=torch.bfloat16)
    assert temper(q).dtype == torch.bfloat16
    torch.testing.assert_close(temper(q.float())[0, :, 0, 0], expected)


@torch.no_grad()
def test_stages_made_by_deleting_parts_equal_the_whole():
    model, text = build(), tokens(2, 12)
    positions = torch.arange(12)[None]
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    del first.layers["2"], first.layers["3"], last.layers["0"], last.layers["1"]
    first.norm = first.output = last.tok_embeddings = None
    torch.testing.assert_close(last(first(text, positions), positions), model(text))
    assert set(first.state_dict()) | set(last.state_dict()) == set(model.state_dict())
    for stage in (first, last):
        stage.init_weights()


@torch.no_grad()
def test_the_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    args = MODEL_CONFIGS["debugmodel"]
    model = Llama4Model(args)
    model.init_weights()
    text = torch.randint(args.vocab_size, (1, 129))
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert abs(loss.item() - math.log(args.vocab_size)) < 0.25


def test_init_weights_sets_everything_after_meta_construction():
    with torch.device("meta"):
        model = Llama4Model(ARGS)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    torch.testing.assert_close(model.state_dict(), build().state_dict(), rtol=0, atol=0)
    assert model(tokens(1, 8)).isfinite().all()


def test_weights_that_write_to_the_stream_shrink_with_depth():
    model = Llama4Model(MODEL_CONFIGS["debugmodel"])
    model.init_weights()
    for number, block in enumerate(model.layers.values()):
        expected = 0.02 / math.sqrt(2 * (number + 1))
        written = [block.attention.wo.weight]
        if block.moe is None:
            written.append(block.feed_forward.w2.weight)
        else:
            written += [block.moe.experts.down, block.moe.shared_experts.w2.weight]
        for weight in written:
            assert weight.std().item() == pytest.approx(expected, rel=0.03)
