"""Llama 4, text. See README.md."""

from dataclasses import replace

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.models.common.rope import RopeScaling
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_llama4
from .infra.pipeline import pipeline_llama4
from .model import Llama4Model, Llama4ModelArgs, Llama4StateDictAdapter
from .model.args import MOE

MODEL_CONFIGS = {
    # Learns on a laptop's CPU in a minute or two. The vocabulary is that of the tokenizer `bytes`
    # (258), rounded up to a multiple of 8, like the heads.
    "debugmodel": Llama4ModelArgs(
        dim=128,
        n_layers=4,
        n_heads=8,
        n_kv_heads=4,
        head_dim=32,
        ffn_dim=384,
        moe=replace(MOE, num_experts=8, hidden_dim=128, aux_loss_weight=1e-2),
        moe_interval=2,
        chunk=64,
        temperature_floor=64,
        vocab_size=264,
    ),
    # Scout
    "109B-A17B": Llama4ModelArgs(
        moe=replace(MOE, aux_loss_weight=1e-3),
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    ),
    # Maverick
    "400B-A17B": Llama4ModelArgs(
        moe=replace(MOE, num_experts=128, aux_loss_weight=1e-3), moe_interval=2, qk_norm=False
    ),
}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=Llama4Model,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_llama4,
        pipeline_fn=pipeline_llama4,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=Llama4StateDictAdapter,
    )


register_train_spec("llama4", get_train_spec)
