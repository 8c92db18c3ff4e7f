"""The same weights give the same numbers as `transformers`, and travel there and back unchanged."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from torchtitan.errors import CheckpointError
from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.llama3 import Llama3Model, Llama3ModelArgs, Llama3StateDictAdapter

VARIANTS = {
    "llama-3": Llama3ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=160, vocab_size=96
    ),
    "llama-3.1, grouped": Llama3ModelArgs(
        dim=64,
        n_layers=3,
        n_heads=8,
        n_kv_heads=2,
        ffn_dim=96,
        vocab_size=96,
        rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=64),
    ),
    "llama-3.2, tied": Llama3ModelArgs(
        dim=96,
        n_layers=2,
        n_heads=6,
        n_kv_heads=3,
        ffn_dim=128,
        vocab_size=120,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(
            factor=32.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_seq_len=128
        ),
        tie_word_embeddings=True,
    ),
}


def hf_model(args: Llama3ModelArgs) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": args.rope_scaling.factor,
            "low_freq_factor": args.rope_scaling.low_freq_factor,
            "high_freq_factor": args.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": args.rope_scaling.original_max_seq_len,
        }
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        tie_word_embeddings=args.tie_word_embeddings,
        max_position_embeddings=1024,
        initializer_range=0.1,  # far from zero, so that a difference would show
        rope_parameters=rope,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def models(request, tmp_path):
    """The model of `transformers`, ours with its weights, and the folder they were saved in."""
    hf = hf_model(request.param)
    hf.save_pretrained(tmp_path)
    return hf, Llama3Model(request.param).load_checkpoint(tmp_path), tmp_path


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

    adapter = Llama3StateDictAdapter(ours.args)
    ours_grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    hf_grads = {name: p.grad for name, p in hf.named_parameters()}
    assert ours_grads.keys() == hf_grads.keys()
    for name, expected in hf_grads.items():
        difference = (ours_grads[name] - expected).norm() / expected.norm()
        assert difference < 1e-4, name


def test_to_hf_restores_every_tensor(models):
    _, ours, folder = models
    back = Llama3StateDictAdapter(ours.args).to_hf(ours.state_dict())
    saved = load_file(folder / "model.safetensors")
    assert back.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(back[name], tensor), name


def test_older_files_with_rotary_frequencies_and_a_tied_head_load():
    args = VARIANTS["llama-3.2, tied"]
    embedding = torch.randn(args.vocab_size, args.dim)
    converted = Llama3StateDictAdapter(args).from_hf(
        {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": embedding.clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        }
    )
    assert converted.keys() == {"tok_embeddings.weight", "output.weight"}
    assert converted["output.weight"] is converted["tok_embeddings.weight"]


def test_a_tensor_of_another_architecture_is_refused():
    adapter = Llama3StateDictAdapter(VARIANTS["llama-3"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        adapter.from_hf({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
