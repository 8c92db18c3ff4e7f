from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .toml_file import format_value


@dataclass
class Model:
    """The model and its assets."""

    name: str = "llama3"
    """Model name in the registry (`torchtitan models` lists them)."""
    flavor: str = "debugmodel"
    """Size of the model: a key of the model's `MODEL_CONFIGS`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Fields of the flavor's args that have another value in this job: `[model.args]`, or
    `--model.args.n_layers=8`, with values as in TOML; `"none"` is None. See docs/configuration.md.
    """
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

    def __str__(self) -> str:
        """Return `llama3 8B`, or `llama3 8B (n_layers = 8)` with changed args."""
        changed = ", ".join(f"{name} = {format_value(value)}" for name, value in self.args.items())
        return f"{self.name} {self.flavor}" + (f" ({changed})" if changed else "")
