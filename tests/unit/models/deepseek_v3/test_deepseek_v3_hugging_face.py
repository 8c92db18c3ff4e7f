"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
)

from torchtitan.errors import CheckpointError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    DeepSeekV3ModelArgs,
    DeepSeekV3StateDictAdapter,
)

MOE_V3 = MoEArgs(
    num_experts=8,
    top_k=3,
    hidden_dim=40,
    num_shared_experts=2,
    score_func="sigmoid",
    route_scale=2.5,
    n_groups=4,
    top_groups=2,
    use_bias=True,
)
MOE_V2 = MoEArgs(
    num_experts=8,
    top_k=3,
    hidden_dim=40,
    num_shared_experts=2,
    normalize_weights=False,
    route_scale=16.0,
    n_groups=4,
    top_groups=2,
    group_score_experts=1,
)
SIZES = {
    "dim": 64,
    "n_layers": 3,
    "n_dense_layers": 1,
    "n_heads": 4,
    "q_rank": 48,
    "kv_rank": 32,
    "qk_nope_dim": 24,
    "qk_rope_dim": 16,
    "v_dim": 20,
    "ffn_dim": 96,
    "vocab_size": 96,
}
V3 = DeepSeekV3ModelArgs(moe=MOE_V3, **SIZES)
YARN = YarnScaling(factor=4.0, original_max_seq_len=64, mscale=1.0, mscale_all_dim=0.7)
VARIANTS = {
    "V3": V3,
    "V3, yarn": dataclasses.replace(V3, yarn=YARN),
    "V3, yarn as in the paper": dataclasses.replace(
        V3, yarn=YarnScaling(factor=8.0, original_max_seq_len=32, beta_fast=8.0, beta_slow=2.0)
    ),
    "V3, one group, queries made directly, tied": dataclasses.replace(
        V3,
        q_rank=None,
        n_dense_layers=0,
        norm_eps=1e-5,
        tie_word_embeddings=True,
        moe=dataclasses.replace(
            MOE_V3, n_groups=1, top_groups=1, normalize_weights=False, num_shared_experts=1
        ),
    ),
    "V2": dataclasses.replace(V3, moe=MOE_V2, yarn=YARN, rope_theta=5000.0),
    "V2 Lite": dataclasses.replace(
        V3,
        q_rank=None,
        moe=dataclasses.replace(MOE_V2, n_groups=1, top_groups=1, route_scale=1.0),
    ),
}


def hf_config(args: DeepSeekV3ModelArgs) -> dict:
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": args.yarn.factor,
            "original_max_position_embeddings": args.yarn.original_max_seq_len,
            "beta_fast": args.yarn.beta_fast,
            "beta_slow": args.yarn.beta_slow,
        }
        if args.yarn.mscale_all_dim:
            rope |= {"mscale": args.yarn.mscale, "mscale_all_dim": args.yarn.mscale_all_dim}
    return {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "first_k_dense_replace": args.n_dense_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_heads,
        "q_lora_rank": args.q_rank,
        "kv_lora_rank": args.kv_rank,
        "qk_nope_head_dim": args.qk_nope_dim,
        "qk_rope_head_dim": args.qk_rope_dim,
        "v_head_dim": args.v_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_word_embeddings,
        "n_routed_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.top_k,
        "moe_intermediate_size": args.moe.hidden_dim,
        "n_shared_experts": args.moe.num_shared_experts,
        "norm_topk_prob": args.moe.normalize_weights,
        "routed_scaling_factor": args.moe.route_scale,
        "n_group": args.moe.n_groups,
        "topk_group": args.moe.top_groups,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,  # far from zero, so that a difference would show
        "rope_parameters": rope,
    }


def hf_model(args: DeepSeekV3ModelArgs) -> DeepseekV2ForCausalLM | DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    if args.moe.score_func == "softmax":
        method = "greedy" if args.moe.n_groups == 1 else "group_limited_greedy"
        config = DeepseekV2Config(**hf_config(args), topk_method=method)
        return DeepseekV2ForCausalLM(config).eval()
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(**hf_config(args), num_nextn_predict_layers=args.mtp_layers)
    )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.1)
    return model.eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, and the folder they were saved in."""
    hf = hf_model(request.param)
    hf.save_pretrained(tmp_path)
    return hf, DeepSeekV3Model(request.param).load_checkpoint(tmp_path), tmp_path


@torch.no_grad()
@pytest.mark.parametrize("seq_len", [128, 512])
def test_logits(models, seq_len):
    hf, ours, _ = models
    input_ids = torch.randint(ours.args.vocab_size, (2, seq_len))
    torch.testing.assert_close(ours(input_ids), hf(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_gradients(models):
    hf, ours, folder = models
    text = torch.randint(ours.args.vocab_size, (2, 129))
    for logits_of in (ours, lambda ids: hf(ids).logits):
        F.cross_entropy(logits_of(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()

    adapter = DeepSeekV3StateDictAdapter(ours.args)
    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf.requires_grad_(False)
    for param in hf.parameters():
        param.copy_(param.grad)
    hf.save_pretrained(folder / "grads")  # takes experts apart as a checkpoint has them
    hf_grads = load_file(folder / "grads" / "model.safetensors")
    hf_grads = {name: g for name, g in hf_grads.items() if not name.endswith("correction_bias")}
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        difference = (ours_grads[name] - expected).norm() / expected.norm()
        assert difference < 1e-4, name


def test_to_hf_restores_every_tensor(models):
    _, ours, folder = models
    back = DeepSeekV3StateDictAdapter(ours.args).to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_the_args_come_from_the_config(models):
    _, ours, folder = models
    config = json.loads((folder / "config.json").read_text())
    assert DeepSeekV3ModelArgs.from_hf_config(config) == ours.args


@pytest.fixture
def published(tmp_path):
    """A folder of V3's names, with the layer that predicts more tokens."""
    hf_model(V3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
    tensors["model.layers.3.mlp.experts.0.up_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_layer_that_predicts_more_tokens_is_left_out(published):
    DeepSeekV3Model(dataclasses.replace(V3, mtp_layers=1)).load_checkpoint(published)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight"):
        DeepSeekV3Model(V3).load_checkpoint(published)


def test_scales_of_fp8_weights_are_refused(tmp_path):
    hf_model(V3).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, tmp_path / "model.safetensors")
    message = r"layers\.0\.mlp\.up_proj\.weight_scale_inv.* FP8 .*to bfloat16"
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3Model(V3).load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        DeepSeekV3StateDictAdapter(V3).from_hf(tensors)
