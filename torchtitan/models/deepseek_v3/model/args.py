"""Hyperparameters of DeepSeek-V3 and V2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from torchtitan.config import JobConfig
from torchtitan.config.load import fail
from torchtitan.distributed.pipeline_split import splits_backward
from torchtitan.models.common.decoder_args import DecoderArgs
from torchtitan.models.common.divisibility import require_splittable_experts
from torchtitan.models.common.hf_config import HuggingFaceConfig, hf_fields, unsupported
from torchtitan.models.common.moe import MoEArgs
from torchtitan.models.common.ranges import Count, NonNegativeFloat, PositiveFloat, Size
from torchtitan.models.common.scaled_rope import scaling_from_hf, scaling_to_hf
from torchtitan.models.common.yarn import YarnScaling

MOE_V3 = MoEArgs(
    num_experts=256,
    top_k=8,
    hidden_dim=2048,
    num_shared_experts=1,
    score_func="sigmoid",
    route_scale=2.5,
    n_groups=8,
    top_groups=4,
    use_bias=True,
)
_HAS_BIAS = "moe_router_enable_expert_bias"
"""Field of a `config.json`, in files of V3 whose experts are chosen without a bias."""


@dataclass
class DeepSeekV3ModelArgs(DecoderArgs):
    """Sizes and choices; the defaults are those of DeepSeek-V3, 671B."""

    dim: Size = 7168
    n_layers: Size = 61
    n_dense_layers: Count = 3
    """Number of first layers that have a feed-forward layer instead of a mixture of experts."""
    n_heads: Size = 128
    q_rank: Size | None = 1536
    """Features of the vector from which a token's queries are computed; None: there is none."""
    kv_rank: Size = 512
    """Features of the vector from which a token's keys and values are computed (the latent)."""
    qk_nope_dim: Size = 128
    """Features of a head's queries and keys without positions."""
    qk_rope_dim: Size = 64
    """Features of a head's queries and keys that are rotated."""
    v_dim: Size = 128
    """Features of a head's values."""
    ffn_dim: Size = 18432
    """Hidden features of the feed-forward layers of `n_dense_layers`."""
    moe: MoEArgs = field(default_factory=lambda: MOE_V3)
    vocab_size: Size = 129280
    norm_eps: NonNegativeFloat = 1e-6
    yarn: YarnScaling | None = None
    """For contexts longer than those trained on; None: no scaling."""
    mtp_layers: Count = 0
    """Layers for multi-token prediction in Hugging Face files, of which `mtp_depth` are read."""
    mtp_depth: Count = 0
    """Number of tokens after the next that the model is trained to predict, too, each by a further
    layer (DeepSeek-V3: 1)."""
    mtp_loss_weight: NonNegativeFloat = 0.3
    """Weight of the mean of their losses (DeepSeek-V3: 0.3, and 0.1 in the last third)."""

    def __post_init__(self) -> None:
        self.mtp_layers = max(self.mtp_layers, self.mtp_depth)
        if self.n_dense_layers > self.n_layers:
            raise ValueError(
                f"n_dense_layers ({self.n_dense_layers}) must be at most n_layers ({self.n_layers})"
            )

    @property
    def num_experts(self) -> int:
        has_experts = self.n_dense_layers < self.n_layers + self.mtp_depth
        return self.moe.num_experts if has_experts else 0

    @property
    def qk_dim(self) -> int:
        """Return the number of features of a head's queries and keys."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def rotated_dim(self) -> int:
        return self.qk_rope_dim

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Count as Llama 3 does; of experts, only those that a token uses cost FLOPs.

        Each layer of `mtp_depth` costs FLOPs of the output layer, too.
        """
        q_dim, o_dim = self.n_heads * self.qk_dim, self.n_heads * self.v_dim
        q_rank = self.q_rank or 0
        queries = self.dim * q_dim if self.q_rank is None else q_rank * (self.dim + q_dim)
        attention = queries + self.dim * (self.kv_rank + self.qk_rope_dim)
        attention += self.kv_rank * self.n_heads * (self.qk_nope_dim + self.v_dim)
        attention += o_dim * self.dim
        held, used = self.moe.count_parameters(self.dim)
        n_layers = self.n_layers + self.mtp_depth
        dense, n_moe = 3 * self.dim * self.ffn_dim, n_layers - self.n_dense_layers
        norms = n_layers * (2 * self.dim + q_rank + self.kv_rank)
        norms += self.dim + self.mtp_depth * 3 * self.dim
        vocabulary = self.vocab_size * self.dim
        embeddings = vocabulary if self.tie_word_embeddings else 2 * vocabulary

        everywhere = n_layers * attention + self.n_dense_layers * dense
        everywhere += self.mtp_depth * 2 * self.dim * self.dim
        nparams = everywhere + n_moe * held + norms + embeddings
        matrices = everywhere + n_moe * used + (1 + self.mtp_depth) * vocabulary
        return nparams, 6 * matrices + 6 * n_layers * (q_dim + o_dim) * seq_len

    def to_hf_config(self) -> dict[str, Any]:
        """Return the `config.json` of `DeepseekV3ForCausalLM`, or of V2's; see `BaseModelArgs`.

        The two differ in how experts are chosen.
        """
        moe, v3 = self.moe, self.moe.score_func == "sigmoid"
        kind = ("deepseek_v3", "DeepseekV3ForCausalLM")
        method = "noaux_tc"
        if not v3:
            kind = ("deepseek_v2", "DeepseekV2ForCausalLM")
            method = "greedy" if moe.n_groups == 1 else "group_limited_greedy"
        # Not known to transformers, where a bias that is not in the file is zero.
        without_bias = {} if moe.use_bias or not v3 else {_HAS_BIAS: False}
        return hf_fields(self, *kind) | {
            "num_key_value_heads": self.n_heads,
            "q_lora_rank": self.q_rank,
            "kv_lora_rank": self.kv_rank,
            "qk_nope_head_dim": self.qk_nope_dim,
            "qk_rope_head_dim": self.qk_rope_dim,
            "v_head_dim": self.v_dim,
            "intermediate_size": self.ffn_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": scaling_to_hf(self.yarn),
            "first_k_dense_replace": self.n_dense_layers,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": self.mtp_depth,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.hidden_dim,
            "scoring_func": moe.score_func,
            "topk_method": method,
            "n_group": moe.n_groups,
            "topk_group": moe.top_groups,
            "norm_topk_prob": moe.normalize_weights,
            "routed_scaling_factor": moe.route_scale,
            **without_bias,
        }

    def update_from_config(self, job_config: JobConfig) -> Self:
        require_splittable_experts(job_config, self.moe.hidden_dim)
        parallelism = job_config.parallelism
        if self.mtp_depth > 1 and splits_backward(job_config):
            fail(
                job_config,
                "parallelism.pipeline_parallel_schedule",
                "PyTorch cannot split the backward pass of a stage that embeds tokens more than "
                f"once, as mtp_depth = {self.mtp_depth} does. Use '1F1B' or 'Interleaved1F1B', or "
                "mtp_depth = 1",
            )
        for point in ("mtp_embeddings", "mtp") if self.mtp_depth else ():
            if point in parallelism.pipeline_parallel_split_points:
                fail(
                    job_config,
                    "parallelism.pipeline_parallel_split_points",
                    f"{point!r} must be in the stage of the output layer, which predicts all "
                    "tokens. Cut at a layer, 'norm' or 'output'",
                )
        ring = parallelism.context_parallel_method == "ring"
        if ring and parallelism.context_parallel_degree > 1 and self.qk_dim != self.v_dim:
            fail(
                job_config,
                "parallelism.context_parallel_method",
                "ring attention needs keys and values of the same size, but "
                f"{job_config.model.name} has keys of {self.qk_dim} features and values of "
                f"{self.v_dim}. Use 'allgather' or 'ulysses'",
            )
        return super().update_from_config(job_config)

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json` (`DeepseekV3ForCausalLM` or V2's)."""
        with HuggingFaceConfig(config, "deepseek_v3", "deepseek_v2") as hf:
            hf.require("hidden_act", "silu")
            hf.require("attention_bias", False)
            decoder = hf.take_decoder()
            hf.require("mlp_bias", False)
            hf.require("rope_interleave", True)
            hf.ignore("auto_map", "aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux")
            hf.require("num_key_value_heads", decoder["n_heads"], None)
            sizes = {
                "qk_nope_dim": hf.take("qk_nope_head_dim", kind=Size),
                "qk_rope_dim": hf.take("qk_rope_head_dim", kind=Size),
            }
            hf.require("head_dim", sizes["qk_rope_dim"], None)
            hf.require("qk_head_dim", sum(sizes.values()))
            rope_theta, rope_scaling = hf.take_rope()
            return cls(
                **decoder,
                n_dense_layers=hf.take("first_k_dense_replace", kind=Count),
                q_rank=hf.take("q_lora_rank", kind=Size, default=None),
                kv_rank=hf.take("kv_lora_rank", kind=Size),
                v_dim=hf.take("v_head_dim", kind=Size),
                ffn_dim=hf.take("intermediate_size", kind=Size),
                moe=_moe_from_hf(hf),
                rope_theta=rope_theta,
                yarn=scaling_from_hf(rope_scaling, YarnScaling),
                mtp_layers=hf.take("num_nextn_predict_layers", kind=Count, default=0),
                **sizes,
            )


def _moe_from_hf(hf: HuggingFaceConfig) -> MoEArgs:
    hf.require("moe_layer_freq", 1)
    v3 = hf.model_type == "deepseek_v3"
    method = hf.take("topk_method", kind=str, default="noaux_tc" if v3 else "greedy")
    if method not in (("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")):
        raise unsupported("topk_method", method)
    hf.require("scoring_func", "sigmoid" if v3 else "softmax")
    if not v3:
        hf.require("norm_topk_prob", False)
    n_groups = hf.take("n_group", kind=Size, default=1)
    top_groups = hf.take("topk_group", kind=Size, default=1)
    grouped = method != "greedy"
    return MoEArgs(
        num_experts=hf.take("n_routed_experts", "num_local_experts", "num_experts", kind=Size),
        top_k=hf.take("num_experts_per_tok", kind=Size),
        hidden_dim=hf.take("moe_intermediate_size", kind=Size),
        num_shared_experts=hf.take("n_shared_experts", kind=Count),
        score_func="sigmoid" if v3 else "softmax",
        normalize_weights=hf.take("norm_topk_prob", kind=bool) if v3 else False,
        route_scale=hf.take("routed_scaling_factor", kind=PositiveFloat),
        n_groups=n_groups if grouped else 1,
        top_groups=top_groups if grouped else 1,
        group_score_experts=2 if v3 else 1,
        use_bias=hf.take(_HAS_BIAS, kind=bool, default=True) if v3 else False,
    )
