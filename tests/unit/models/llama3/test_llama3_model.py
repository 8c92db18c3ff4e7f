import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.llama3 import MODEL_CONFIGS, Llama3Model, Llama3ModelArgs

ARGS = Llama3ModelArgs(
    dim=64,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    ffn_dim=96,
    vocab_size=80,
    rope_scaling=RopeScaling(original_max_seq_len=32),
)


def build(**changes) -> Llama3Model:
    model = Llama3Model(dataclasses.replace(ARGS, **changes))
    torch.manual_seed(0)
    model.init_weights()
    return model


@pytest.fixture
def one_rank_mesh():
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


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
def test_positions_are_used_when_given():
    model, text = build(), tokens(1, 16)
    counted = torch.arange(16)[None]
    torch.testing.assert_close(model(text, counted), model(text))
    torch.testing.assert_close(model(text, counted + 5), model(text), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(text, counted * 2), model(text), atol=1e-5)


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
    names = set(first.state_dict()) | set(last.state_dict())
    assert names == set(model.state_dict())
    for stage in (first, last):
        stage.init_weights()


@torch.no_grad()
@pytest.mark.parametrize("flavor", ["debugmodel", "150M"])
def test_the_first_loss_is_that_of_guessing(flavor):
    torch.manual_seed(0)
    args = dataclasses.replace(MODEL_CONFIGS[flavor], n_layers=4)
    model = Llama3Model(args)
    model.init_weights()
    text = torch.randint(args.vocab_size, (1, 129))
    loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert abs(loss.item() - math.log(args.vocab_size)) < 0.25


@pytest.mark.parametrize("tied", [False, True])
def test_init_weights_sets_everything_after_meta_construction(tied):
    args = dataclasses.replace(ARGS, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = Llama3Model(args)
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
    model = Llama3Model(dataclasses.replace(MODEL_CONFIGS["debugmodel"], n_layers=8))
    model.init_weights()
    for number, block in enumerate(model.layers.values()):
        expected = 0.02 / math.sqrt(2 * (number + 1))
        for linear in (block.attention.wo, block.feed_forward.w2):
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.03)


def test_tied_weights_survive_a_distributed_checkpoint(tmp_path):
    model = build(tie_word_embeddings=True)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)

    with torch.device("meta"):
        loaded = Llama3Model(model.args)
    loaded.to_empty(device="cpu")
    state = get_model_state_dict(loaded)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(loaded, state)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert torch.equal(loaded(tokens(1, 8)), model(tokens(1, 8)))


def test_tied_weights_receive_both_gradients():
    text = tokens(2, 8)
    tied, untied = build(tie_word_embeddings=True), build()
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(text).square().sum().backward()
    both = untied.output.weight.grad + untied.tok_embeddings.weight.grad
    torch.testing.assert_close(tied.output.weight.grad, both)


def test_blocks_compile_to_one_graph():
    torch.compiler.reset()
    model, text = build(), tokens(2, 12)
    expected = model(text)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers.values():
        layer.forward = torch.compile(layer.forward, backend=counter, fullgraph=True)
    torch.testing.assert_close(model(text), expected)
    assert counter.frame_count == 1


@torch.no_grad()
def test_cast_to_bfloat16_it_stays_close_far_into_a_document():
    model, text = build(), tokens(1, 16)
    positions = torch.arange(100_000, 100_016)[None]
    expected = model(text, positions)
    logits = model.bfloat16()(text, positions)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.02, rtol=0.05)


@torch.no_grad()
def test_mixed_precision_leaves_the_angles_in_float32(one_rank_mesh):
    model = build()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in [*model.layers.values(), model]:
        fully_shard(module, mesh=one_rank_mesh, mp_policy=policy)
    seen = []
    inner = model.layers["1"].attention
    inner.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].dtype, inputs[1].cos.dtype))
    )
    model(tokens(1, 8))
    assert seen == [(torch.bfloat16, torch.float32)]
