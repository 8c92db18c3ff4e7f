"""Map keys and values that only upstream torchtitan has to their replacements here.

A test compares this table with the one in docs/migrating.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORKERS = "data.workers (threads); batches always go through pinned memory"
_STACKS = "comm.hang_seconds: writes stacks and NCCL's flight record to DUMP_FOLDER/hang"
_SAMPLE = "none: python -m torchtitan.models.flux.sample makes images"

INSTEAD = {
    "model.hf_assets_path": "model.tokenizer_path",
    "model.print_after_conversion": "none",
    "experimental.custom_import": "job.custom_import",
    "float8": "quantize.linear.float8",
    "mx": "quantize.linear.mx",
    "experimental.custom_args_module": "job.custom_config_module",
    "job.save_config_file": "always saved, to config.resolved.toml",
    "training.dtype": "none: master weights are float32",
    "training.gc_debug": "none",
    "training.dataloader": _WORKERS,
    "validation.dataloader": _WORKERS,
    "optimizer.early_step_in_backward": "none",
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": "none",
    "activation_checkpoint.debug": "none",
    "activation_checkpoint.determinism_check": "none",
    "activation_checkpoint.early_stop": "none",
    "activation_checkpoint.preserve_rng_state": "none",
    "activation_checkpoint.visualize_memory_budget_pareto": "none",
    "debug.deterministic_warn_only": "none",
    "training.classifier_free_guidance_prob": "text_dropout in [flux]",
    "training.img_size": "training.seq_len: patches of 16 x 16 pixels",
    "training.test_mode": "none: without training.dataset, flux draws shapes",
    "encoder": "none: images are encoded before training, by python -m "
    "torchtitan.models.flux.encode",
    "validation.eval_freq": "validation.freq",
    "validation.all_timesteps": "none: always validation.steps batches at eight times",
    "validation.enable_classifier_free_guidance": _SAMPLE,
    "validation.classifier_free_guidance_scale": _SAMPLE,
    "validation.denoising_steps": _SAMPLE,
    "validation.save_img_count": _SAMPLE,
    "validation.save_img_folder": _SAMPLE,
    "inference": _SAMPLE,
    "quantize.linear.mx.recipe_name": "none: always MXFP8 by PyTorch's products",
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": "none: always MXFP8 by PyTorch's products",
    "quantize.grouped_mm.mx.recipe_name": "none: always MXFP8 by PyTorch's products",
    "quantize.grouped_mm.float8.fqns": "none: always all experts",
    "quantize.grouped_mm.mx.fqns": "none: always all experts",
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": "none: always, with "
    "enable_fsdp_float8_all_gather",
    "parallelism.module_fqns_per_model_part": "parallelism.pipeline_parallel_split_points: the "
    "first module of each stage but the first",
    "parallelism.pipeline_parallel_layers_per_stage": "parallelism."
    "pipeline_parallel_stages_per_rank",
    "parallelism.pipeline_parallel_first_stage_less_layers": "parallelism."
    "pipeline_parallel_embedding_weight",
    "parallelism.pipeline_parallel_last_stage_less_layers": "parallelism."
    "pipeline_parallel_output_weight",
    "parallelism.context_parallel_rotate_method": "parallelism.context_parallel_method: "
    "allgather, ring, ulysses",
    "parallelism.context_parallel_load_balancer": "always balanced",
    "parallelism.expert_parallel_comm_backend": "none",
    "parallelism.pipeline_parallel_expert_parallel_overlap": "none",
    "checkpoint.enable_first_step_checkpoint": "none; set checkpoint.interval = 1 in a trial run",
    "checkpoint.initial_load_in_hf_quantized": "torchtitan convert dequantize, once",
    "checkpoint.create_seed_checkpoint": "not needed: the same seed gives the same weights on "
    "every layout",
    "checkpoint.load_only": "checkpoint.initial_load_path without checkpoint.enable",
    "checkpoint.enable_ft_dataloader_checkpoints": "none",
    "profiling.save_traces_folder": "always DUMP_FOLDER/profile",
    "profiling.save_memory_snapshot_folder": "always DUMP_FOLDER/profile",
    "metrics.disable_color_printing": 'NO_COLOR=1, or metrics.progress = "plain"',
    "metrics.save_for_all_ranks": "none: only rank 0 writes",
    "comm.init_timeout_seconds": "comm.timeout_seconds",
    "comm.train_timeout_seconds": "comm.timeout_seconds",
    "comm.trace_buf_size": _STACKS,
    "comm.save_traces_folder": _STACKS,
    "comm.save_traces_file_prefix": _STACKS,
    "comm.mode": "none; see torchtitan plan, torchtitan verify",
    "fault_tolerance.process_group": "none",
    "fault_tolerance.process_group_timeout_ms": "none",
    "fault_tolerance.should_quantize": "none",
    "fault_tolerance.num_fragments": "none",
    "fault_tolerance.module_fqns_per_model_fragment": "none",
    "fault_tolerance.fragment_sync_delay": "none",
    "fault_tolerance.fragment_update_alpha": "none",
    "memory_estimation": "torchtitan plan",
}

_ENCODED = "parquet, of images that are encoded"
_DATASETS = {
    "c4_test": "stdlib, or text with files of your own",
    "cc12m-wds": _ENCODED,
    "cc12m-test": _ENCODED,
    "coco-validation": _ENCODED,
}
VALUES = {
    "model.flavor": {
        "flux-debug": "debugmodel",
        "17bx16e": "109B-A17B, with the layers of upstream's _irope",
        "17bx128e": "400B-A17B, with the layers of upstream's _irope",
    },
    "training.dataset": _DATASETS,
    "validation.dataset": _DATASETS,
    "checkpoint.async_mode": {"async_with_pinned_mem": "async"},
}
_MASKED = re.compile("_(flex|varlen|flex_attn|varlen_attn|irope)$")
"""Suffixes of upstream's flavors that attend only within documents."""


def value_instead(key: str, value: object, allowed: Iterable[str]) -> str:
    """Return the replacement of an upstream value that is not in `allowed`, to end a message with.

    Empty if upstream has no such value. Begins with a space, like `did_you_mean`.
    """
    name = str(value)
    plain = _MASKED.sub("", name) if key == "model.flavor" else name
    here = VALUES.get(key, {}).get(plain, plain)
    if re.split("[, ]", here)[0] not in allowed or here == name:
        return ""
    mask = ", and training.document_mask = true" if plain != name else ""
    return f" This value is from upstream torchtitan. Here: {here}{mask}"


def instead(path: tuple[str | int, ...]) -> str:
    """Return the replacement of an upstream key or of its section; "" if upstream has neither."""
    names = [str(part) for part in path]
    for count in range(len(names), 0, -1):
        if text := INSTEAD.get(".".join(names[:count])):
            return text
    return ""
