"""FLUX.1, a model of images. See README.md."""

from functools import partial

from torchtitan.components import build_lr_scheduler, build_optimizer
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from .data import build_dataloader
from .infra.parallelize import parallelize_flux
from .infra.pipeline import pipeline_flux
from .loss import build_loss
from .model import FluxModel, FluxModelArgs, FluxStateDictAdapter
from .validate import FluxValidator

MODEL_CONFIGS = {
    # Learns on a laptop's CPU in a minute, from drawings of shapes.
    "debugmodel": FluxModelArgs(
        n_double_layers=2,
        n_single_layers=2,
        n_heads=8,
        axes_dim=(4, 6, 6),
        text_dim=64,
        pooled_dim=32,
        text_len=8,
    ),
    "flux-schnell": FluxModelArgs(text_len=256),
    "flux-dev": FluxModelArgs(guidance=True),
}


def get_train_spec(flavor: str) -> TrainSpec:
    args = MODEL_CONFIGS[flavor]
    return TrainSpec(
        model_cls=FluxModel,
        model_args=args,
        parallelize_fn=parallelize_flux,
        pipeline_fn=pipeline_flux,
        build_optimizer_fn=build_optimizer,
        build_lr_scheduler_fn=build_lr_scheduler,
        build_dataloader_fn=partial(build_dataloader, args),
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        state_dict_adapter=FluxStateDictAdapter,
        build_validator_fn=partial(FluxValidator, args),
    )


register_train_spec("flux", get_train_spec)
