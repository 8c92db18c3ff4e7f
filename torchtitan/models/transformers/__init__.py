"""Causal language models of the library transformers. See README.md."""

from __future__ import annotations

from pathlib import Path

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_transformers
from .infra.pipeline import pipeline_transformers
from .model import (
    TransformersArgs,
    TransformersModel,
    TransformersStateDictAdapter,
    config_of,
    smaller,
)

MODEL_CONFIGS = {
    "debugmodel": TransformersArgs(
        config={
            "model_type": "llama",
            "vocab_size": 264,
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
        }
    ),
}


def configs(folder: str | Path) -> dict[str, TransformersArgs]:
    """Return flavors of the architecture in a Hugging Face folder, for a model of your own.

    Returns:
        `full`, as in its `config.json`, and `debugmodel`, the same with small sizes.
    """
    config = config_of(folder)
    small = TransformersArgs(config=smaller(config))
    return {"debugmodel": small, "full": TransformersArgs(config=config)}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=TransformersModel,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_transformers,
        pipeline_fn=pipeline_transformers,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=TransformersStateDictAdapter,
    )


register_train_spec("transformers", get_train_spec)
