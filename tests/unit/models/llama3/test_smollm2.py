"""Checkpoints of the SmolLM2 family: LlamaForCausalLM with tied weights and other constants."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchtitan.errors import CheckpointError
from torchtitan.models.from_hf import train_spec_of_hf_folder
from torchtitan.models.llama3 import Llama3ModelArgs

# HuggingFaceTB/SmolLM2-135M, with fewer and smaller layers.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 72,
    "initializer_range": 0.1,
    "intermediate_size": 160,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 120,
}


def save(folder, fields: dict) -> LlamaForCausalLM:
    """A folder whose `config.json` has these fields as they are in the published files."""
    torch.manual_seed(0)
    known = {k: v for k, v in fields.items() if k not in ("torch_dtype", "transformers_version")}
    hf = LlamaForCausalLM(LlamaConfig(**known)).eval()
    hf.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(fields))
    return hf


@torch.no_grad()
@pytest.mark.parametrize("head_dim", ["absent", None, 8])
def test_logits(head_dim, tmp_path):
    fields = dict(SMOLLM2) if head_dim == "absent" else SMOLLM2 | {"head_dim": head_dim}
    hf = save(tmp_path, fields)
    name, spec = train_spec_of_hf_folder(tmp_path)
    assert name == "llama3"
    assert spec.model_args == Llama3ModelArgs(
        dim=72,
        n_layers=3,
        n_heads=9,
        n_kv_heads=3,
        ffn_dim=160,
        vocab_size=120,
        norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    )
    ours = spec.model_cls(spec.model_args).load_checkpoint(tmp_path)
    assert ours.output.weight is ours.tok_embeddings.weight
    tokens = torch.randint(120, (2, 128))
    torch.testing.assert_close(ours(tokens), hf(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 16), ("attention_bias", True), ("rope_interleaved", True), ("new_field", 1)],
)
def test_what_is_not_supported_is_refused(field, value, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2 | {field: value}))
    with pytest.raises(CheckpointError, match=field):
        train_spec_of_hf_folder(tmp_path)
