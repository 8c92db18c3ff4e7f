"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Llama4ForCausalLM, Llama4TextConfig

from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.llama4 import Llama4Model, Llama4ModelArgs, Llama4StateDictAdapter
from torchtitan.models.llama4.model.args import MOE

MAVERICK = Llama4ModelArgs(
    dim=64,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=24,
    ffn_dim=96,
    moe=dataclasses.replace(MOE, num_experts=8, hidden_dim=40),
    moe_interval=2,
    chunk=48,
    qk_norm=False,
    temperature_floor=32,
    temperature_scale=0.3,
    vocab_size=96,
)
VARIANTS = {
    "interleaved, as Maverick": MAVERICK,
    "all experts, as Scout": dataclasses.replace(
        MAVERICK,
        moe_interval=1,
        qk_norm=True,
        moe=dataclasses.replace(MOE, num_experts=4, hidden_dim=40),
        rope_scaling=RopeScaling(
            factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_seq_len=64
        ),
    ),
    "two experts, no temperature, tied": dataclasses.replace(
        MAVERICK,
        n_kv_heads=4,
        nope_interval=2,
        norm_eps=1e-6,
        rope_theta=10000.0,
        moe=dataclasses.replace(MOE, num_experts=8, top_k=2, hidden_dim=40),
        temperature_scale=0.0,
        tie_word_embeddings=True,
    ),
}


def hf_config(args: Llama4ModelArgs) -> Llama4TextConfig:
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    return Llama4TextConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        intermediate_size_mlp=args.ffn_dim,
        intermediate_size=args.moe.hidden_dim,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.top_k,
        interleave_moe_layer_step=args.moe_interval,
        no_rope_layer_interval=args.nope_interval,
        attention_chunk_size=args.chunk,
        use_qk_norm=args.qk_norm,
        attn_temperature_tuning=args.temperature_scale > 0,
        floor_scale=args.temperature_floor,
        attn_scale=args.temperature_scale or 0.1,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        initializer_range=0.1,  # far from zero, so that a difference would show
        rope_parameters=rope,
    )


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, and the folder they were saved in."""
    torch.manual_seed(0)
    hf = Llama4ForCausalLM(hf_config(request.param)).eval()
    hf.save_pretrained(tmp_path)
    return hf, Llama4Model(request.param).load_checkpoint(tmp_path), tmp_path


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [128, 512])
def test_logits(models, seq_len):
    hf, ours, _ = models
    input_ids = torch.randint(ours.args.vocab_size, (2, seq_len))
    torch.testing.assert_close(ours(input_ids), hf(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients(models):
    hf, ours, _ = models
    text = torch.randint(ours.args.vocab_size, (2, 129))
    for logits_of in (ours, lambda ids: hf(ids).logits):
        F.cross_entropy(logits_of(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()

    adapter = Llama4StateDictAdapter(ours.args)
    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf_grads = {name: p.grad for name, p in hf.named_parameters()}
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        difference = (ours_grads[name] - expected).norm() / expected.norm()
        assert difference < 1e-4, name


def test_to_hf_restores_every_tensor(models):
    _, ours, folder = models
    back = Llama4StateDictAdapter(ours.args).to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_the_args_come_from_the_config(models):
    _, ours, folder = models
    config = json.loads((folder / "config.json").read_text())
    assert Llama4ModelArgs.from_hf_config(config) == ours.args
