"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from torchtitan.errors import CheckpointError
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3Model, Qwen3ModelArgs, Qwen3StateDictAdapter

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "head_dim": 24, "vocab_size": 96}
VARIANTS = {
    "dense, grouped": Qwen3ModelArgs(n_kv_heads=2, ffn_dim=160, **SIZES),
    "dense, tied": Qwen3ModelArgs(
        n_kv_heads=4, ffn_dim=96, rope_theta=10000.0, norm_eps=1e-5, tie_word_embeddings=True, **SIZES
    ),
    "experts": Qwen3ModelArgs(
        n_kv_heads=2, ffn_dim=96, moe=MoEArgs(num_experts=8, top_k=3, hidden_dim=40), **SIZES
    ),
    "experts, weights as they are": Qwen3ModelArgs(
        n_kv_heads=2,
        ffn_dim=96,
        moe=MoEArgs(
            num_experts=4, top_k=2, hidden_dim=40, normalize_weights=False, aux_loss_weight=0.1
        ),
        **SIZES,
    ),
}


def hf_model(args: Qwen3ModelArgs) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    options = {
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "tie_word_embeddings": args.tie_word_embeddings,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,  # far from zero, so that a difference would show
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
    }
    if args.moe is None:
        return Qwen3ForCausalLM(Qwen3Config(**options)).eval()
    options |= {
        "num_experts": args.moe.num_experts,
        "num_experts_per_tok": args.moe.top_k,
        "moe_intermediate_size": args.moe.hidden_dim,
        "norm_topk_prob": args.moe.normalize_weights,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**options)).eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, and the folder they were saved in."""
    hf = hf_model(request.param)
    hf.save_pretrained(tmp_path)
    return hf, Qwen3Model(request.param).load_checkpoint(tmp_path), tmp_path


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

    adapter = Qwen3StateDictAdapter(ours.args)
    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf.requires_grad_(False)
    for param in hf.parameters():
        param.copy_(param.grad)
    hf.save_pretrained(folder / "grads")  # takes experts apart as a checkpoint has them
    hf_grads = load_file(folder / "grads" / "model.safetensors")
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        difference = (ours_grads[name] - expected).norm() / expected.norm()
        assert difference < 1e-4, name


def test_to_hf_restores_every_tensor(models):
    _, ours, folder = models
    back = Qwen3StateDictAdapter(ours.args).to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_the_args_come_from_the_config(models):
    _, ours, folder = models
    config = json.loads((folder / "config.json").read_text())
    args = Qwen3ModelArgs.from_hf_config(config)
    if args.moe is not None:
        assert args.moe.aux_loss_weight == 0
        args.moe = MoEArgs(**vars(args.moe) | {"aux_loss_weight": ours.args.moe.aux_loss_weight})
    assert args == ours.args


def test_a_missing_expert_is_named():
    args = VARIANTS["experts"]
    adapter = Qwen3StateDictAdapter(args)
    state = adapter.to_hf(Qwen3Model(args).state_dict())
    del state["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.5\.up_proj.* is missing"):
        adapter.from_hf(state)


def test_a_checkpoint_with_more_experts_is_refused(tmp_path):
    args = VARIANTS["experts"]
    hf_model(args).save_pretrained(tmp_path)
    fewer = Qwen3ModelArgs(**vars(args) | {"moe": MoEArgs(num_experts=4, top_k=3, hidden_dim=40)})
    with pytest.raises(CheckpointError):
        Qwen3Model(fewer).load_checkpoint(tmp_path)
    hf_state = Qwen3StateDictAdapter(args).to_hf(Qwen3Model(args).state_dict())
    hf_state = {k: v for k, v in hf_state.items() if "experts" in k}
    with pytest.raises(CheckpointError, match=r"expert 7 of .* has only 4 experts"):
        Qwen3StateDictAdapter(fewer).from_hf(hf_state)
