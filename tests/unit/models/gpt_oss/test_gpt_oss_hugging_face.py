"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from torchtitan.errors import CheckpointError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.gpt_oss import GptOssModel, GptOssModelArgs, GptOssStateDictAdapter

SIZES = {"dim": 64, "n_heads": 8, "head_dim": 24, "vocab_size": 96}
VARIANTS = {
    "grouped": GptOssModelArgs(
        n_layers=3,
        n_kv_heads=2,
        sliding_window=32,
        moe=MoEArgs(num_experts=8, top_k=3, hidden_dim=40, gate_bias=True),
        swiglu_limit=0.7,  # so low that many features reach it
        rope_scaling=YarnScaling(factor=8.0, original_max_seq_len=64, truncate=False),
        **SIZES,
    ),
    "tied": GptOssModelArgs(
        n_layers=2,
        n_kv_heads=8,
        sliding_window=100,
        moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=64, gate_bias=True, aux_loss_weight=0.1),
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=YarnScaling(
            factor=32.0, beta_fast=16.0, beta_slow=2.0, original_max_seq_len=256, truncate=True
        ),
        tie_word_embeddings=True,
        **SIZES,
    ),
}


def hf_model(args: GptOssModelArgs) -> GptOssForCausalLM:
    config = GptOssConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        sliding_window=args.sliding_window,
        num_local_experts=args.moe.num_experts,
        num_experts_per_tok=args.moe.top_k,
        intermediate_size=args.moe.hidden_dim,
        swiglu_limit=args.swiglu_limit,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        initializer_range=0.1,  # far from zero, so that a difference would show
        attn_implementation="eager",
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": args.rope_theta,
            "factor": args.rope_scaling.factor,
            "beta_fast": args.rope_scaling.beta_fast,
            "beta_slow": args.rope_scaling.beta_slow,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
            "truncate": args.rope_scaling.truncate,
        },
    )
    torch.manual_seed(0)
    hf = GptOssForCausalLM(config).eval()
    for name, param in hf.named_parameters():
        if "bias" in name or "sinks" in name or "norm" in name:  # which start alike
            param.data += 0.5 * torch.randn_like(param)
    return hf


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, and the folder they were saved in."""
    hf = hf_model(request.param)
    hf.save_pretrained(tmp_path)
    return hf, GptOssModel(request.param).load_checkpoint(tmp_path), tmp_path


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [20, 128, 512])
def test_logits(models, seq_len):
    hf, ours, _ = models
    input_ids = torch.randint(ours.args.vocab_size, (2, seq_len))
    torch.testing.assert_close(ours(input_ids), hf(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients(models):
    hf, ours, _ = models
    text = torch.randint(ours.args.vocab_size, (2, 129))
    for logits_of in (ours, lambda ids: hf(ids).logits):
        F.cross_entropy(logits_of(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()

    adapter = GptOssStateDictAdapter(ours.args)
    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf_grads = {name: p.grad for name, p in hf.named_parameters()}
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        difference = (ours_grads[name] - expected).norm() / expected.norm()
        assert difference < 1e-4, name


def test_to_hf_restores_every_tensor(models):
    _, ours, folder = models
    back = GptOssStateDictAdapter(ours.args).to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_the_args_come_from_the_config(models):
    _, ours, folder = models
    args = GptOssModelArgs.from_hf_config(json.loads((folder / "config.json").read_text()))
    assert args.moe.aux_loss_weight == 0
    args.moe = dataclasses.replace(args.moe, aux_loss_weight=ours.args.moe.aux_loss_weight)
    assert args == ours.args


def test_weights_in_mxfp4_are_refused(tmp_path):
    args = VARIANTS["grouped"]
    state = GptOssStateDictAdapter(args).to_hf(GptOssModel(args).state_dict())
    name = "model.layers.1.mlp.experts.gate_up_proj"
    state[f"{name}_blocks"] = state.pop(name).to(torch.uint8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{name}_blocks' is of weights in MXFP4"):
        GptOssModel(args).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"'{name}_scales' is of weights in MXFP4"):
        GptOssStateDictAdapter(args).from_hf({f"{name}_scales": torch.ones(1)})


def test_a_checkpoint_with_more_experts_is_refused(tmp_path):
    args = VARIANTS["grouped"]
    hf_model(args).save_pretrained(tmp_path)
    fewer = dataclasses.replace(args, moe=dataclasses.replace(args.moe, num_experts=4))
    with pytest.raises(CheckpointError, match="experts"):
        GptOssModel(fewer).load_checkpoint(tmp_path)
