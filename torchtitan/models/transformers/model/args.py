"""The `config.json` of a model in the library transformers, as hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torchtitan.config import JobConfig
from torchtitan.models.common.attention import AttentionKernel
from torchtitan.models.common.divisibility import (
    require_divisible_by_tp,
    require_heads_divisible_by_cp,
)
from torchtitan.models.common.hf_config import WITHOUT_EFFECT
from torchtitan.models.from_hf import read_hf_config
from torchtitan.protocols.model import BaseModelArgs

from .longrope import limit_of_short_rotations, long_rotations


@dataclass
class TransformersArgs(BaseModelArgs):
    """An architecture of transformers, and its sizes."""

    path: str = ""
    """Folder with the `config.json` to use in place of `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `config.json`; those that are absent have transformers' defaults."""
    attention: AttentionKernel = "auto"
    """Attention kernel, see `model.attention`."""
    long_rotations: bool = False
    """Rotate as `longrope` does in sequences longer than its original length. A job sets it by
    `training.seq_len`."""

    @property
    def max_seq_len(self) -> int | None:
        """Longest sequence for the short rotations of `longrope`; None: there is no limit."""
        return None if self.long_rotations else limit_of_short_rotations(self.hf_config())

    @property
    def vocab_size(self) -> int:
        return self.hf_config().vocab_size

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.hf_config().tie_word_embeddings)

    def hf_config(self) -> Any:
        """Return the `PreTrainedConfig` of transformers."""
        from .build import hf_config

        return hf_config(self.config)

    def get_nparams_and_flops(self, seq_len: int) -> tuple[int, int]:
        """Return the exact number of parameters, and FLOPs per token, forward and backward.

        FLOPs are counted as for llama3: 6 for each weight of a matrix, the embedding excepted, and
        12 for each feature of a query and token of the sequence.
        """
        from .build import build_model, check_layers, parts_of

        model = build_model(self)
        parts = parts_of(model)
        matrices = sum(p.numel() for p in parts.layers.parameters() if p.ndim > 1)
        matrices += parts.output.weight.numel()
        flops = 6 * matrices + 12 * check_layers(model, parts).features * seq_len
        return sum(p.numel() for p in model.parameters()), flops

    def update_from_config(self, job_config: JobConfig) -> Self:
        """Return a copy with the config of `path` and the attention kernel that the job asks for.

        Raises:
            CheckpointError: transformers has no such model, or it is none that we can train.
            ConfigError: the heads do not divide over the ranks that share them, or validation
                would need other rotations than training.
        """
        args = replace(self, attention=job_config.model.attention)
        if self.path:
            args.config = config_of(self.path)
        hf = args.hf_config()
        heads = hf.num_attention_heads
        sizes = {
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(hf, "num_key_value_heads", None) or heads,
            "vocab_size": hf.vocab_size,
        }
        require_divisible_by_tp(job_config, **sizes)
        require_heads_divisible_by_cp(job_config, heads)
        args.long_rotations = long_rotations(hf, job_config)
        return args

    def to_hf_config(self) -> dict[str, Any]:
        from .build import class_name

        return {
            "architectures": [class_name(self.config)],
            **self.config,
            "pad_token_id": None,  # its default may be beyond the vocabulary
        }

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> Self:
        """Return the args for a `config.json`.

        Raises:
            OtherArchitectureError: transformers has no such causal language model.
        """
        args = cls(config=essential(config))
        args.hf_config()
        return args


def config_of(folder: str | Path) -> dict[str, Any]:
    """Return what matters of the `config.json` in a folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return essential(read_hf_config(Path(folder).expanduser()))


def essential(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `config.json` that affect what the model computes."""
    ignored = WITHOUT_EFFECT - {"model_type", "initializer_range", "max_position_embeddings"}
    return {name: value for name, value in config.items() if name not in ignored}


_SMALL = {
    "vocab_size": 264,  # of the tokenizer `bytes`, rounded up to a multiple of 8
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 16,
    "sliding_window": 32,
}


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """Return the `config.json` of a small model of the same architecture, with its last layers.

    Raises:
        CheckpointError: see `hf_config`.
    """
    from .build import hf_config

    full = hf_config(config)
    small = dict(config)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == full.num_hidden_layers:  # one entry a layer
            small[name] = value[-_SMALL["num_hidden_layers"] :]
    head_dim = full.hidden_size // full.num_attention_heads
    for name in ("rope_scaling", "rope_parameters"):
        if rope := config.get(name):
            cut = {  # as many factors of longrope as a head now needs
                key: factors[: len(factors) * _SMALL["head_dim"] // head_dim]
                for key, factors in rope.items()
                if key in ("short_factor", "long_factor")
            }
            small[name] = rope | cut
    small |= {name: size for name, size in _SMALL.items() if getattr(full, name, None)}
    if key_value_heads := getattr(full, "num_key_value_heads", None):
        grouped = key_value_heads < full.num_attention_heads
        small["num_key_value_heads"] = 4 if grouped else 8
    return small
