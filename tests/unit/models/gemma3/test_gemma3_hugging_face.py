"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from torchtitan.models.gemma3 import Gemma3Model, Gemma3ModelArgs, Gemma3StateDictAdapter

SIZES = {"dim": 64, "n_heads": 4, "ffn_dim": 160, "vocab_size": 96}
VARIANTS = {
    "small": Gemma3ModelArgs(
        n_layers=7,
        n_kv_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=32,
        rope_factor=1.0,
        **SIZES,
    ),
    "stretched": Gemma3ModelArgs(
        n_layers=4,
        n_kv_heads=2,
        head_dim=24,
        query_pre_attn_scalar=42,
        sliding_window=100,
        full_attention_every=3,
        norm_eps=1e-5,
        rope_theta=50000.0,
        rope_factor=8.0,
        window_rope_theta=1000.0,
        **SIZES,
    ),
    "untied": Gemma3ModelArgs(
        n_layers=2,
        n_kv_heads=4,
        head_dim=24,
        query_pre_attn_scalar=24,
        sliding_window=64,
        full_attention_every=2,
        tie_word_embeddings=False,
        **SIZES,
    ),
}


def hf_model(args: Gemma3ModelArgs) -> Gemma3ForCausalLM:
    full = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_factor != 1:
        full |= {"rope_type": "linear", "factor": args.rope_factor}
    config = Gemma3TextConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        query_pre_attn_scalar=args.query_pre_attn_scalar,
        intermediate_size=args.ffn_dim,
        sliding_window=args.sliding_window,
        sliding_window_pattern=args.full_attention_every,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        pad_token_id=None,  # whose embedding would get no gradient
        initializer_range=0.1,  # far from zero, so that a difference would show
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": args.window_rope_theta,
            },
        },
    )
    torch.manual_seed(0)
    hf = Gemma3ForCausalLM(config).eval()
    for name, param in hf.named_parameters():
        if "norm" in name:  # which start alike
            param.data += 0.5 * torch.randn_like(param)
    return hf


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, and the folder they were saved in."""
    hf = hf_model(request.param)
    hf.save_pretrained(tmp_path)
    return hf, Gemma3Model(request.param).load_checkpoint(tmp_path), tmp_path


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [20, 128, 512])
def test_logits(models, seq_len):
    hf, ours, _ = models
    input_ids = torch.randint(ours.args.vocab_size, (2, seq_len))
    torch.testing.assert_close(ours(input_ids), hf(input_ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_embeddings_in_bfloat16_are_scaled_as_in_transformers():
    args = dataclasses.replace(VARIANTS["small"], dim=72, n_layers=1)  # sqrt(72) gets rounded
    hf, ours = hf_model(args).bfloat16(), Gemma3Model(args).bfloat16()
    ours.tok_embeddings.weight.copy_(hf.model.embed_tokens.weight)
    input_ids = torch.randint(args.vocab_size, (2, 16))
    assert torch.equal(ours.embed(input_ids), hf.model.embed_tokens(input_ids))


def test_gradients(models):
    hf, ours, _ = models
    text = torch.randint(ours.args.vocab_size, (2, 129))
    for logits_of in (ours, lambda ids: hf(ids).logits):
        F.cross_entropy(logits_of(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()

    adapter = Gemma3StateDictAdapter(ours.args)
    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf_grads = {name: p.grad for name, p in hf.named_parameters()}
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        difference = (ours_grads[name] - expected).norm() / expected.norm()
        assert difference < 1e-4, name


def test_to_hf_restores_every_tensor(models):
    _, ours, folder = models
    back = Gemma3StateDictAdapter(ours.args).to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_the_args_come_from_the_config(models):
    _, ours, folder = models
    config = json.loads((folder / "config.json").read_text())
    assert Gemma3ModelArgs.from_hf_config(config) == ours.args
