"""Tiny args of all six models of text, each with what is special about it: `TINY[name]`."""

from dataclasses import replace

import torch

from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.rope import RopeScaling
from torchtitan.models.common.yarn import YarnScaling
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs
from torchtitan.models.gemma3 import Gemma3ModelArgs
from torchtitan.models.gpt_oss import GptOssModelArgs
from torchtitan.models.llama3 import Llama3ModelArgs
from torchtitan.models.llama4 import Llama4ModelArgs
from torchtitan.models.llama4.model.args import MOE as LLAMA4_MOE
from torchtitan.models.qwen3 import Qwen3ModelArgs
from torchtitan.protocols import BaseModelArgs, ModelProtocol
from torchtitan.protocols.train_spec import MODEL_REGISTRY, TrainSpec, model_flavors

VOCABULARY = 264  # the tokenizer `bytes`, rounded up
_HEADS = {"n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCABULARY}
_DEEPSEEK = DeepSeekV3ModelArgs(
    dim=64,
    n_layers=3,
    n_dense_layers=1,
    n_heads=4,
    q_rank=48,
    kv_rank=32,
    qk_nope_dim=24,
    qk_rope_dim=16,
    v_dim=24,
    ffn_dim=96,
    vocab_size=VOCABULARY,
    moe=MoEArgs(
        num_experts=8,
        top_k=3,
        hidden_dim=40,
        num_shared_experts=2,
        score_func="sigmoid",
        route_scale=2.5,
        n_groups=4,
        top_groups=2,
        use_bias=True,
    ),
)

TINY: dict[str, BaseModelArgs] = {
    "llama3": Llama3ModelArgs(
        dim=64,
        n_layers=4,
        ffn_dim=192,
        rope_scaling=RopeScaling(factor=8.0, original_max_seq_len=64),
        **_HEADS,
    ),
    "llama3, tied": Llama3ModelArgs(
        dim=64, n_layers=2, ffn_dim=96, tie_word_embeddings=True, **_HEADS
    ),
    "qwen3": Qwen3ModelArgs(dim=64, n_layers=2, head_dim=24, ffn_dim=96, **_HEADS),
    "qwen3, experts": Qwen3ModelArgs(
        dim=64,
        n_layers=2,
        head_dim=24,
        moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=32, aux_loss_weight=0.01),
        **_HEADS,
    ),
    "gemma3": Gemma3ModelArgs(
        dim=64,
        n_layers=6,
        head_dim=24,
        query_pre_attn_scalar=32,
        ffn_dim=96,
        sliding_window=8,
        full_attention_every=3,
        **_HEADS,
    ),
    "deepseek_v3": replace(
        _DEEPSEEK,
        yarn=YarnScaling(factor=4.0, original_max_seq_len=64, mscale=1.0, mscale_all_dim=0.7),
    ),
    "deepseek_v3, V2": replace(
        _DEEPSEEK,
        q_rank=None,  # as in V2 Lite
        moe=replace(
            _DEEPSEEK.moe,
            score_func="softmax",
            normalize_weights=False,
            group_score_experts=1,
            use_bias=False,
        ),
    ),
    "gpt_oss": GptOssModelArgs(
        dim=64,
        n_layers=4,
        head_dim=24,
        sliding_window=8,
        moe=MoEArgs(num_experts=4, top_k=2, hidden_dim=40, gate_bias=True),
        rope_scaling=YarnScaling(factor=4.0, original_max_seq_len=32, truncate=False),
        **_HEADS,
    ),
    "llama4": Llama4ModelArgs(
        dim=64,
        n_layers=4,
        head_dim=24,
        ffn_dim=96,
        moe=replace(LLAMA4_MOE, num_experts=4, hidden_dim=40),
        moe_interval=2,
        chunk=16,
        temperature_floor=16,
        temperature_scale=0.3,
        rope_scaling=RopeScaling(factor=16.0, high_freq_factor=1.0, original_max_seq_len=64),
        **_HEADS,
    ),
}


def tiny_spec(name: str) -> TrainSpec:
    """The `TrainSpec` of `TINY[name]`."""
    model = name.split(",")[0]
    return replace(MODEL_REGISTRY[model](model_flavors(model)[0]), model_args=TINY[name])


def tiny_model(name: str, **changes: object) -> ModelProtocol:
    """The model of `TINY[name]` with `changes`; the same weights each time."""
    model = tiny_spec(name).model_cls(replace(TINY[name], **changes))
    torch.manual_seed(0)
    model.init_weights()
    return model


def tiny_tokens(batch: int, seq: int) -> torch.Tensor:
    """`[batch, seq]` random tokens, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (batch, seq), generator=generator)
