"""Writing the `config.json` of a Hugging Face model."""

from __future__ import annotations

from typing import Any


def hf_fields(args: Any, model_type: str, architecture: str) -> dict[str, Any]:
    """The fields that all our models have.

    Rotary positions are written as published files have them, `rope_theta` and `rope_scaling`:
    transformers 4 and 5 and other programs read these.

    Args:
        args: of a decoder, with our usual names.
        model_type: what transformers calls the kind of model.
        architecture: its class in transformers.
    """
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "attention_dropout": 0.0,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "tie_word_embeddings": args.tie_word_embeddings,
        "use_cache": True,
    }
