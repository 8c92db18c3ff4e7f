import pytest
import torch
from model_cases.llama3 import VARIANTS

from torchtitan.errors import CheckpointError
from torchtitan.models.llama3 import Llama3StateDictAdapter


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
