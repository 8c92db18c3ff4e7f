import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.deepseek_v3 import MODEL_CONFIGS, DeepSeekV3Model, DeepSeekV3ModelArgs

ARGS = DeepSeekV3ModelArgs(
    dim=64,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    q_rank=48,
    kv_rank=32,
    qk_nope_dim=24,
    qk_rope_dim=16,
    v_dim=20,
    ffn_dim=96,
    moe=MoEArgs(
        num_experts=8,
        top_k=3,
        hidden_dim=40,
        num_shared_experts=1,
        score_func="sigmoid",
        n_groups=4,
        top_groups=2,
        use_bias=True,
    ),
    vocab_size=80,
    yarn=YarnScaling(factor=4.0, original_max_seq_len=32),
)


def build(**changes) -> DeepSeekV3Model:
    model = DeepSeekV3Model(dataclasses.replace(ARGS, **changes))
    torch.manual_seed(0)
    model.init_weights()
    return model


def tokens(batch: int, seq: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(ARGS.vocab_size, (batch, seq), generator=generator)


@torch.no_grad()
def test_packed_documents_are_as_if_alone():
    model, lengths = build(), [7, 20, 5]
    text = tokens(2, sum(lengths))
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    packed = model(text, positions, document_ids)
    alone = torch.cat([model(part) for part in text.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_matter_by_their_distance_alone():
    model, text = build(), tokens(1, 16)
    counted = torch.arange(16)[None]
    torch.testing.assert_close(model(text, counted + 5), model(text), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(text, counted * 2), model(text), atol=1e-5)


@torch.no_grad()
def test_stages_made_by_deleting_parts_equal_the_whole():
    model, text = build(), tokens(2, 12)
    positions = torch.arange(12)[None]
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    del first.layers["1"], first.layers["2"], last.layers["0"]
    first.norm = first.output = last.tok_embeddings = None
    torch.testing.assert_close(last(first(text, positions), positions), model(text))
    assert set(first.state_dict()) | set(last.state_dict()) == set(model.state_dict())
    for stage in (first, last):
        stage.init_weights()


@torch.no_grad()
def test_the_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    args = MODEL_CONFIGS["debugmodel"]
    model = DeepSeekV3Model(args)
    model.init_weights()
    text = torch.randint(args.vocab_size, (1, 129))
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert abs(loss.item() - math.log(args.vocab_size)) < 0.25


@pytest.mark.parametrize("q_rank", [48, None])
def test_init_weights_sets_everything_after_meta_construction(q_rank):
    with torch.device("meta"):
        model = DeepSeekV3Model(dataclasses.replace(ARGS, q_rank=q_rank))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    expected = build(q_rank=q_rank)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert model(tokens(1, 8)).isfinite().all()


def test_weights_that_write_to_the_stream_shrink_with_depth():
    model = DeepSeekV3Model(MODEL_CONFIGS["debugmodel"])
    model.init_weights()
    for number, block in enumerate(model.layers.values()):
        expected = 0.02 / math.sqrt(2 * (number + 1))
        written = [block.attention.wo.weight]
        if block.moe is None:
            written.append(block.feed_forward.w2.weight)
        else:
            written += [block.moe.experts.w2, block.moe.shared_experts.w2.weight]
        for weight in written:
            assert weight.std().item() == pytest.approx(expected, rel=0.03)
