import dataclasses

import torch
from model_cases.gemma3 import VARIANTS, hf_model

from torchtitan.models.gemma3 import Gemma3Model


@torch.no_grad()
def test_embeddings_in_bfloat16_are_scaled_as_in_transformers():
    args = dataclasses.replace(VARIANTS["small"], dim=72, n_layers=1)  # sqrt(72) gets rounded
    hf, ours = hf_model(args).bfloat16(), Gemma3Model(args).bfloat16()
    ours.tok_embeddings.weight.copy_(hf.model.embed_tokens.weight)
    input_ids = torch.randint(args.vocab_size, (2, 16))
    assert torch.equal(ours.embed(input_ids), hf.model.embed_tokens(input_ids))
