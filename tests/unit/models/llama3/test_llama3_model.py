"""What Llama 3 alone shows of the parts that it shares; see test_every_model.py for the rest."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_models import tiny_model, tiny_tokens
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from torchtitan.distributed.tying import preserve_tying
from torchtitan.models.llama3 import Llama3Model


@pytest.fixture
def one_rank_mesh():
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_tied_weights_survive_a_distributed_checkpoint(tmp_path):
    model = tiny_model("llama3", tie_word_embeddings=True)
    dcp.save(get_model_state_dict(model), checkpoint_id=tmp_path, no_dist=True)

    with torch.device("meta"):
        loaded = Llama3Model(model.args)
    with preserve_tying(loaded):
        loaded.to_empty(device="cpu")
    state = get_model_state_dict(loaded)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(loaded, state)
    assert loaded.output.weight is loaded.tok_embeddings.weight
    assert torch.equal(loaded(tiny_tokens(1, 8)), model(tiny_tokens(1, 8)))


def test_tied_weights_receive_both_gradients():
    text = tiny_tokens(2, 8)
    tied, untied = tiny_model("llama3", tie_word_embeddings=True), tiny_model("llama3")
    untied.load_state_dict(tied.state_dict())
    for model in (tied, untied):
        model(text).square().sum().backward()
    both = untied.output.weight.grad + untied.tok_embeddings.weight.grad
    torch.testing.assert_close(tied.output.weight.grad, both)


@torch.no_grad()
def test_cast_to_bfloat16_it_stays_close_far_into_a_document():
    model, text = tiny_model("llama3"), tiny_tokens(1, 16)
    positions = torch.arange(100_000, 100_016)[None]
    expected = model(text, positions)
    logits = model.bfloat16()(text, positions)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.02, rtol=0.05)


@torch.no_grad()
def test_mixed_precision_leaves_the_angles_in_float32(one_rank_mesh):
    model = tiny_model("llama3")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in [*model.layers.values(), model]:
        fully_shard(module, mesh=one_rank_mesh, mp_policy=policy)
    seen = []
    inner = model.layers["1"].attention
    inner.register_forward_pre_hook(
        lambda _, inputs: seen.append((inputs[0].dtype, inputs[1].cos.dtype))
    )
    model(tiny_tokens(1, 8))
    assert seen == [(torch.bfloat16, torch.float32)]
