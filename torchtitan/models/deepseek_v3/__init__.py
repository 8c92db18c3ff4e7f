"""DeepSeek-V3 and V2. See README.md."""

from dataclasses import replace
from functools import partial

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_deepseek_v3
from .infra.pipeline import pipeline_deepseek_v3
from .loss import build_multi_token_loss
from .model import DeepSeekV3Model, DeepSeekV3ModelArgs, DeepSeekV3StateDictAdapter
from .model.args import MOE_V3

YARN_V2 = YarnScaling(mscale=0.707, mscale_all_dim=0.707)
YARN_V3 = YarnScaling(mscale=1.0, mscale_all_dim=1.0)

MODEL_CONFIGS = {
    # Learns on a laptop's CPU in a minute or two. The vocabulary is that of the tokenizer `bytes`
    # (258), rounded up to a multiple of 8, like the heads.
    "debugmodel": DeepSeekV3ModelArgs(
        dim=128,
        n_layers=4,
        n_dense_layers=1,
        n_heads=8,
        q_rank=64,
        kv_rank=32,
        qk_nope_dim=16,
        qk_rope_dim=16,
        v_dim=16,
        ffn_dim=384,
        moe=MoEArgs(
            num_experts=8,
            top_k=2,
            hidden_dim=128,
            num_shared_experts=1,
            score_func="sigmoid",
            route_scale=2.5,
            n_groups=4,
            top_groups=2,
            use_bias=True,
        ),
        vocab_size=264,
    ),
    # DeepSeek-V2-Lite
    "16B": DeepSeekV3ModelArgs(
        dim=2048,
        n_layers=27,
        n_dense_layers=1,
        n_heads=16,
        q_rank=None,
        ffn_dim=10944,
        moe=MoEArgs(
            num_experts=64,
            top_k=6,
            hidden_dim=1408,
            num_shared_experts=2,
            normalize_weights=False,
            group_score_experts=1,
            aux_loss_weight=1e-3,
        ),
        vocab_size=102400,
        yarn=YARN_V2,
    ),
    # DeepSeek-V2
    "236B": DeepSeekV3ModelArgs(
        dim=5120,
        n_layers=60,
        n_dense_layers=1,
        ffn_dim=12288,
        moe=MoEArgs(
            num_experts=160,
            top_k=6,
            hidden_dim=1536,
            num_shared_experts=2,
            normalize_weights=False,
            route_scale=16.0,
            n_groups=8,
            top_groups=3,
            group_score_experts=1,
            aux_loss_weight=1e-3,
        ),
        vocab_size=102400,
        yarn=YARN_V2,
    ),
    "671B": DeepSeekV3ModelArgs(
        moe=replace(MOE_V3, aux_loss_weight=1e-4, aux_loss_per_sequence=True),
        yarn=YARN_V3,
        mtp_layers=1,
    ),
}
# Predicts also the token after the next.
MODEL_CONFIGS["debugmodel_mtp"] = replace(MODEL_CONFIGS["debugmodel"], mtp_depth=1)


def get_train_spec(flavor: str) -> TrainSpec:
    args = MODEL_CONFIGS[flavor]
    spec = TrainSpec(
        model_cls=DeepSeekV3Model,
        model_args=args,
        parallelize_fn=parallelize_deepseek_v3,
        pipeline_fn=pipeline_deepseek_v3,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=DeepSeekV3StateDictAdapter,
    )
    if args.mtp_depth == 0:
        return spec
    return replace(
        spec,
        build_dataloader_fn=partial(build_dataloader, later_tokens=args.mtp_depth),
        build_loss_fn=partial(build_multi_token_loss, weight=args.mtp_loss_weight),
    )


register_train_spec("deepseek_v3", get_train_spec)
