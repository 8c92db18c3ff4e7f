"""Llama 3, 3.1 and 3.2. See README.md."""

from torchtitan.components import build_loss, build_lr_scheduler, build_optimizer, build_tokenizer
from torchtitan.data import build_dataloader
from torchtitan.models.common.rope import RopeScaling
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .infra.parallelize import parallelize_llama
from .infra.pipeline import pipeline_llama
from .model import Llama3Model, Llama3ModelArgs, Llama3StateDictAdapter

LLAMA_3_1 = RopeScaling(factor=8.0)
LLAMA_3_2 = RopeScaling(factor=32.0)

MODEL_CONFIGS = {
    # Learns on a laptop's CPU in a minute or two. The vocabulary is that of the tokenizer `bytes`
    # (258), rounded up to a multiple of 8, like the heads.
    "debugmodel": Llama3ModelArgs(
        dim=256, n_layers=4, n_heads=16, n_kv_heads=8, ffn_dim=768, vocab_size=264
    ),
    # Our own, for experiments on one GPU: the vocabulary of SmolLM2, whose tokenizer is open.
    "150M": Llama3ModelArgs(
        dim=768,
        n_layers=18,
        n_heads=12,
        n_kv_heads=4,
        ffn_dim=2048,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "1B": Llama3ModelArgs(
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim=8192,
        rope_scaling=LLAMA_3_2,
        tie_word_embeddings=True,
    ),
    "3B": Llama3ModelArgs(
        dim=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        ffn_dim=8192,
        rope_scaling=LLAMA_3_2,
        tie_word_embeddings=True,
    ),
    "8B": Llama3ModelArgs(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, ffn_dim=14336, rope_scaling=LLAMA_3_1
    ),
    "70B": Llama3ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, ffn_dim=28672, rope_scaling=LLAMA_3_1
    ),
    "405B": Llama3ModelArgs(
        dim=16384, n_layers=126, n_heads=128, n_kv_heads=8, ffn_dim=53248, rope_scaling=LLAMA_3_1
    ),
}


def get_train_spec(flavor: str) -> TrainSpec:
    return TrainSpec(
        model_cls=Llama3Model,
        model_args=MODEL_CONFIGS[flavor],
        parallelize_fn=parallelize_llama,
        pipeline_fn=pipeline_llama,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        state_dict_adapter=Llama3StateDictAdapter,
    )


register_train_spec("llama3", get_train_spec)
