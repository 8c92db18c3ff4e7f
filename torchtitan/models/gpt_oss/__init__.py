"""gpt-oss, mixtures of experts with attention sinks. See README.md."""

from typing import Any

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_gpt_oss
from .infra.pipeline import pipeline_gpt_oss
from .model import GptOssModel, GptOssModelArgs, GptOssStateDictAdapter

# As in both published models, except for the number of experts.
PUBLISHED_MOE: dict[str, Any] = {
    "top_k": 4,
    "hidden_dim": 2880,
    "gate_bias": True,
    "aux_loss_weight": 1e-3,
}

MODEL_CONFIGS = {
    # Learns on a laptop's CPU in a minute or two. The vocabulary is that of the tokenizer `bytes`
    # (258), rounded up to a multiple of 8, like the heads.
    "debugmodel": GptOssModelArgs(
        dim=256,
        n_layers=4,
        n_heads=16,
        n_kv_heads=8,
        head_dim=32,
        sliding_window=32,
        moe=MoEArgs(num_experts=8, top_k=2, hidden_dim=256, gate_bias=True, aux_loss_weight=1e-2),
        vocab_size=264,
        rope_scaling=YarnScaling(factor=8.0, original_max_seq_len=128, truncate=False),
    ),
    "20B": GptOssModelArgs(n_layers=24, moe=MoEArgs(num_experts=32, **PUBLISHED_MOE)),
    "120B": GptOssModelArgs(n_layers=36, moe=MoEArgs(num_experts=128, **PUBLISHED_MOE)),
}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=GptOssModel,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_gpt_oss,
        pipeline_fn=pipeline_gpt_oss,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=GptOssStateDictAdapter,
    )


register_train_spec("gpt_oss", get_train_spec)
