"""A tiny FLUX.1, ours and that of diffusers, and its release with random encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from torchtitan.models.flux import FluxModelArgs

ARGS = FluxModelArgs(
    n_double_layers=2,
    n_single_layers=3,
    n_heads=3,
    axes_dim=(4, 8, 12),
    channels=16,
    text_dim=40,
    pooled_dim=20,
    text_len=7,
)
DEV = replace(ARGS, guidance=True)
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "fox", "house"]


def varied(model: torch.nn.Module, std: float = 0.05) -> Any:
    """Random weights of which none is special."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(
            parameter, mean=float("norm" in name and parameter.ndim == 1), std=std
        )
    return model.eval().requires_grad_(False)


def hf_model(args: FluxModelArgs = ARGS) -> FluxTransformer2DModel:
    config = args.to_hf_config()
    del config["_class_name"]
    return varied(FluxTransformer2DModel(**config))


def batch_of(args: FluxModelArgs, rows: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Inputs of our model for images of `height` x `width` patches."""
    random = torch.Generator().manual_seed(1)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random)

    inputs = {
        "tokens": draw(rows, height * width, args.channels),
        "text": draw(rows, args.text_len, args.text_dim),
        "pooled": draw(rows, args.pooled_dim),
        "times": torch.randint(1_000_000, (rows,), generator=random),
        "widths": torch.full((rows,), width),
    }
    guidance = {"guidance": torch.randint(5000, (rows,), generator=random)} if args.guidance else {}
    return inputs | guidance


def hf_velocity(hf: FluxTransformer2DModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What diffusers' model makes of `batch_of`."""
    width = int(batch["widths"][0])
    places = torch.arange(batch["tokens"].shape[1])
    ids = torch.stack([torch.zeros_like(places), places // width, places % width], dim=1)
    guidance = batch.get("guidance")
    return hf(
        hidden_states=batch["tokens"],
        encoder_hidden_states=batch["text"],
        pooled_projections=batch["pooled"],
        timestep=batch["times"] / 1_000_000,
        guidance=None if guidance is None else guidance / 1000,
        img_ids=ids.float(),
        txt_ids=torch.zeros(batch["text"].shape[1], 3),
    ).sample


def save_release(folder: Path, args: FluxModelArgs = ARGS) -> None:
    """Write a release, but for the transformer."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=args.channels // 4,
        norm_num_groups=4,
        layers_per_block=1,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    sizes = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    clip = CLIPTextConfig(
        hidden_size=args.pooled_dim,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=9,
        bos_token_id=3,
        **sizes,
    )
    t5 = T5Config(d_model=args.text_dim, d_kv=8, d_ff=32, num_layers=2, num_heads=4, **sizes)
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    clip_tokenizer, t5_tokenizer = (
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=longest, **special)
        for longest in (9, args.text_len)
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=varied(vae, 0.2),
        text_encoder=varied(CLIPTextModel(clip), 0.3),
        tokenizer=clip_tokenizer,
        text_encoder_2=varied(T5EncoderModel(t5), 0.3),
        tokenizer_2=t5_tokenizer,
        transformer=None,
    ).save_pretrained(folder)


def pipeline_of(folder: Path, transformer: FluxTransformer2DModel) -> FluxPipeline:
    """The pipeline of diffusers with the encoders of `save_release`."""
    shifts = transformer.config.guidance_embeds
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=shifts)
    return FluxPipeline.from_pretrained(folder, transformer=transformer, scheduler=scheduler)
