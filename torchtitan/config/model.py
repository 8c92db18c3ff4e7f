from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class Model:
    """The model and its assets."""

    name: str = "llama3"
    """Model name in the registry (`torchtitan models` lists them)."""
    flavor: str = "debugmodel"
    """Size of the model: a key of the model's `MODEL_CONFIGS`."""
    tokenizer_path: str = "bytes"
    """`bytes` (UTF-8 bytes, needs no file) or a folder with a Hugging Face `tokenizer.json`; a
    custom `build_tokenizer_fn` may interpret it differently."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel. `auto`: flex for document masks on CUDA, else SDPA. CPU always uses SDPA,
    since flex attention has no backward there."""
    converters: list[str] = field(default_factory=list)
    """Converters applied to the model before it is parallelized, in the order listed:
    `quantize.linear.float8`, `quantize.linear.mx`, `quantize.grouped_mm.float8`,
    `quantize.grouped_mm.mx`. See docs/performance.md."""
