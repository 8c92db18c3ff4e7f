"""Gemma 3, the text models. See README.md."""

from typing import Any

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_gemma3
from .infra.pipeline import pipeline_gemma3
from .model import Gemma3Model, Gemma3ModelArgs, Gemma3StateDictAdapter

# The two smallest models were made for text only, with shorter contexts.
SMALL: dict[str, Any] = {"n_heads": 4, "n_kv_heads": 1, "sliding_window": 512, "rope_factor": 1.0}

MODEL_CONFIGS = {
    # Learns on a laptop's CPU in a minute or two. The vocabulary is that of the tokenizer `bytes`
    # (258), rounded up to a multiple of 8, like the heads.
    "debugmodel": Gemma3ModelArgs(
        dim=256,
        n_layers=6,
        n_heads=16,
        n_kv_heads=8,
        head_dim=32,
        query_pre_attn_scalar=32,
        ffn_dim=768,
        sliding_window=32,
        vocab_size=264,
        rope_factor=1.0,
    ),
    "270M": Gemma3ModelArgs(dim=640, n_layers=18, ffn_dim=2048, vocab_size=262144, **SMALL),
    "1B": Gemma3ModelArgs(dim=1152, n_layers=26, ffn_dim=6912, vocab_size=262144, **SMALL),
    "4B": Gemma3ModelArgs(dim=2560, n_layers=34, n_heads=8, n_kv_heads=4, ffn_dim=10240),
    "12B": Gemma3ModelArgs(dim=3840, n_layers=48, n_heads=16, n_kv_heads=8, ffn_dim=15360),
    "27B": Gemma3ModelArgs(
        dim=5376,
        n_layers=62,
        n_heads=32,
        n_kv_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
        ffn_dim=21504,
    ),
}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=Gemma3Model,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_gemma3,
        pipeline_fn=pipeline_gemma3,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=Gemma3StateDictAdapter,
    )


register_train_spec("gemma3", get_train_spec)
