"""Qwen3, dense and with mixtures of experts. See README.md."""

from typing import Any

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.models.common.moe import MoEArgs
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_qwen3
from .infra.pipeline import pipeline_qwen3
from .model import Qwen3Model, Qwen3ModelArgs, Qwen3StateDictAdapter

# As in the published 30B-A3B and 235B-A22B, except for the size of an expert.
PUBLISHED_MOE: dict[str, Any] = {"num_experts": 128, "top_k": 8, "aux_loss_weight": 1e-3}

MODEL_CONFIGS = {
    # Learn on a laptop's CPU in a minute or two. The vocabulary is that of the tokenizer `bytes`
    # (258), rounded up to a multiple of 8, like the heads.
    "debugmodel": Qwen3ModelArgs(
        dim=256, n_layers=4, n_heads=16, n_kv_heads=8, head_dim=32, ffn_dim=768, vocab_size=264
    ),
    "debugmodel_moe": Qwen3ModelArgs(
        dim=128,
        n_layers=4,
        n_heads=8,
        n_kv_heads=4,
        head_dim=32,
        moe=MoEArgs(num_experts=8, top_k=2, hidden_dim=128, aux_loss_weight=1e-2),
        vocab_size=264,
    ),
    "0.6B": Qwen3ModelArgs(
        dim=1024, n_layers=28, n_heads=16, ffn_dim=3072, tie_word_embeddings=True
    ),
    "1.7B": Qwen3ModelArgs(
        dim=2048, n_layers=28, n_heads=16, ffn_dim=6144, tie_word_embeddings=True
    ),
    "4B": Qwen3ModelArgs(dim=2560, n_layers=36, n_heads=32, ffn_dim=9728, tie_word_embeddings=True),
    "8B": Qwen3ModelArgs(dim=4096, n_layers=36, n_heads=32, ffn_dim=12288),
    "14B": Qwen3ModelArgs(dim=5120, n_layers=40, n_heads=40, ffn_dim=17408),
    "32B": Qwen3ModelArgs(dim=5120, n_layers=64, n_heads=64, ffn_dim=25600),
    "30B-A3B": Qwen3ModelArgs(
        dim=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        ffn_dim=6144,  # used by no layer, but in its config.json
        moe=MoEArgs(hidden_dim=768, **PUBLISHED_MOE),
    ),
    "235B-A22B": Qwen3ModelArgs(
        dim=4096,
        n_layers=94,
        n_heads=64,
        n_kv_heads=4,
        moe=MoEArgs(hidden_dim=1536, **PUBLISHED_MOE),
    ),
}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=Qwen3Model,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_qwen3,
        pipeline_fn=pipeline_qwen3,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=Qwen3StateDictAdapter,
    )


register_train_spec("qwen3", get_train_spec)
