"""Defines flavors of Llama 3 for benchmarks.

Some have the layers of larger flavors, but only few of them, so that a CPU step takes seconds;
others are complete, for a GPU.

`--job.custom_import benchmarks.flavors` registers them under the name `benchmark_llama3`.
"""

from __future__ import annotations

from dataclasses import replace

from torchtitan.models import llama3
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

_VOCAB_SIZE = 8192  # otherwise the output layer would take most of the time

MODEL_CONFIGS = {
    "debugmodel": llama3.MODEL_CONFIGS["debugmodel"],
    "tiny": replace(
        llama3.MODEL_CONFIGS["debugmodel"], dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=64
    ),
    "150M-4-layers": replace(llama3.MODEL_CONFIGS["150M"], n_layers=4, vocab_size=_VOCAB_SIZE),
    "1B-1-layer": replace(llama3.MODEL_CONFIGS["1B"], n_layers=1, vocab_size=_VOCAB_SIZE),
    "1B": llama3.MODEL_CONFIGS["1B"],
}
MODEL_CONFIGS |= {
    # Flavors that the `torchtitan` package of PyPI can express too.
    f"{name}-untied": replace(
        MODEL_CONFIGS[name], tie_word_embeddings=False, rope_scaling=llama3.LLAMA_3_1
    )
    for name in MODEL_CONFIGS
}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(llama3.get_train_spec("debugmodel"), model_args=MODEL_CONFIGS[flavor])


register_train_spec("benchmark_llama3", get_train_spec)
