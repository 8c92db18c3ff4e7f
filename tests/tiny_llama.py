"""Llama 3 with 0.2 million parameters, for runs of a second: `--job.custom_import tiny_llama`."""

from dataclasses import replace

from torchtitan.models import llama3
from torchtitan.models.llama3.model import Llama3ModelArgs
from torchtitan.protocols import TrainSpec, register_train_spec

# As many layers and heads as the debugmodel has, so that it can be split in the same ways.
TINY = Llama3ModelArgs(dim=64, n_layers=4, n_heads=16, n_kv_heads=8, ffn_dim=192, vocab_size=264)
MODEL_CONFIGS = {"tiny": TINY, "tied": replace(TINY, tie_word_embeddings=True)}


def get_train_spec(flavor: str) -> TrainSpec:
    return replace(llama3.get_train_spec("debugmodel"), model_args=MODEL_CONFIGS[flavor])


register_train_spec("tiny_llama", get_train_spec)

OPTIONS = [
    "--job.custom_import",
    "tiny_llama",
    "--model.name",
    "tiny_llama",
    "--model.flavor",
    "tiny",
    "--training.steps",
    "6",
    "--training.seq_len",
    "32",
    "--training.global_batch_size",
    "8",
    "--training.local_batch_size",
    "4",
    "--training.mixed_precision_param",
    "float32",
    "--optimizer.lr",
    "1e-2",
    "--lr_scheduler.warmup_steps",
    "2",
    "--activation_checkpoint.mode",
    "none",
    "--metrics.log_freq",
    "1",
]
"""Of a short run in float32, for 1 or 2 data ranks."""
