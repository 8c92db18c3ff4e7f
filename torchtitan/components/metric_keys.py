"""Describe the keys of `metrics.jsonl` and `validation.jsonl`, in display order.

`docs/metrics.md` and `torchtitan report` are generated from this table. Keys that are not in it are
plotted too, under their own names.
"""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = {"share": ("%", 100.0), "bytes": ("GiB", 2.0**-30)}
"""Unit of a value -> its unit in plots, and the factor between the two."""


@dataclass(frozen=True)
class MetricKey:
    """A key; one that ends with `/NAME` stands for the keys that end with a source's name."""

    key: str
    label: str
    unit: str
    """Unit of the value in the file; empty for a plain number."""
    meaning: str
    when: str = ""
    """Condition under which the key is present; empty: always."""
    from_zero: bool = False
    """Whether plots begin at 0, for keys where the relative size of a change matters."""
    spread: bool = False
    """Whether one plot shows the keys of all names, by their mean, least and greatest values."""
    count: bool = False
    """Whether it only grows: a point of a plot is the last value of its steps, not the mean."""

    @property
    def shown(self) -> tuple[str, float]:
        """The unit in plots, and what a value is multiplied by."""
        return _SHOWN.get(self.unit, (self.unit, 1.0))


STARTED_AT = MetricKey(
    "started_at",
    "Start of the process",
    "s",
    "Unix time at which this process began to train; it differs between the processes of a run",
)
"""Distinguishes the processes of a resumed run; not plotted."""

SECTIONS: dict[str, list[MetricKey]] = {
    "Learning": [
        MetricKey(
            "loss",
            "Loss",
            "per token",
            "mean over the steps since the last logged one; the loss of a step is the mean over "
            "its tokens on all ranks, in nats if it is the cross entropy; includes the z-loss, if "
            "any, but no loss of a router of experts",
        ),
        MetricKey(
            "mtp_loss",
            "Loss of multi-token prediction",
            "per token",
            "mean loss of the tokens after the next, since the last logged step, without its "
            "weight; `loss` does not include it",
            "`mtp_depth` of DeepSeek-V3",
        ),
        MetricKey(
            "grad_norm",
            "Gradient norm",
            "",
            "global 2-norm of this step's gradients, before clipping",
        ),
        MetricKey(
            "lr",
            "Learning rate",
            "",
            "learning rate of this step, in the parameter group where it is highest",
        ),
        MetricKey(
            "grad_norm/NAME",
            "Gradient norms of the blocks",
            "",
            "2-norm of the gradients of this block, before clipping; the sum of all squares is the "
            "square of `grad_norm`",
            "`metrics.block_norm_freq`",
            spread=True,
        ),
        MetricKey(
            "weight_norm/NAME",
            "Weight norms of the blocks",
            "",
            "2-norm of the weights of this block, before the step",
            "`metrics.block_norm_freq`",
            spread=True,
        ),
    ],
    "Guard": [
        MetricKey(
            "steps_skipped",
            "Skipped steps",
            "steps",
            "steps since step 0 whose batch was not trained on",
            "`training.on_nonfinite`, `on_spike`, `skip_batches`",
            count=True,
        ),
        MetricKey(
            "rollbacks",
            "Rollbacks",
            "",
            "rollbacks to a checkpoint since step 0",
            "`training.on_nonfinite`, `on_spike`",
            count=True,
        ),
        MetricKey(
            "batches_skipped",
            "Batches left out",
            "batches",
            "batches left out by rollbacks: step N trains on batch N + this number",
            "`training.on_nonfinite`, `on_spike`",
            count=True,
        ),
    ],
    "Speed and memory": [
        MetricKey(
            "tokens_per_second",
            "Throughput",
            "tokens/s",
            "tokens per second of all devices since the last logged step, including skipped steps "
            "and excluding the time of validation and checkpoints",
            from_zero=True,
        ),
        MetricKey(
            "mfu",
            "Model FLOPs utilisation",
            "share",
            "the model's FLOP/s divided by the device's bfloat16 peak",
            "bfloat16, on a GPU whose peak is known",
            from_zero=True,
        ),
        MetricKey(
            "peak_memory_bytes",
            "Peak memory of rank 0",
            "bytes",
            "GPU: most bytes in tensors since the start; CPU: most memory of the process",
            from_zero=True,
        ),
        MetricKey(
            "peak_memory_reserved_percent",
            "Memory reserved on rank 0",
            "%",
            "largest share of the device's memory that the caching allocator reserved",
            "GPU",
            from_zero=True,
        ),
        MetricKey(
            "data_wait_seconds",
            "Waiting for data, rank 0",
            "s",
            "time that rank 0 waited for batches in the steps since the last logged one",
            from_zero=True,
        ),
    ],
    "Ranks": [
        MetricKey(
            "own_seconds_max",
            "Slowest rank's own work",
            "s",
            "time that the slowest rank worked in a measured step: waiting for data, computing "
            "and launching kernels, but not communicating",
            "`metrics.straggler_freq`",
            from_zero=True,
        ),
        MetricKey(
            "own_seconds_mean",
            "Own work of the ranks, mean",
            "s",
            "the same, averaged over the ranks",
            "`metrics.straggler_freq`",
            from_zero=True,
        ),
        MetricKey(
            "slowest_rank",
            "Slowest rank",
            "rank",
            "rank that worked longest in the measured step",
            "`metrics.straggler_freq`",
        ),
    ],
    "Experts": [
        MetricKey(
            "expert_imbalance",
            "Expert imbalance",
            "",
            "load of a layer's busiest expert divided by the mean load, averaged over layers; 1 "
            "is perfectly balanced",
            "models with experts, once this process trained on a step",
        ),
        MetricKey(
            "expert_imbalance_max",
            "Expert imbalance, worst layer",
            "",
            "the same for the least balanced layer",
            "models with experts, once this process trained on a step",
        ),
        MetricKey(
            "router_aux_loss",
            "Auxiliary loss of the routers",
            "",
            "loss that balances a layer's experts, by their load in the step before (with "
            "`aux_loss_per_sequence`, in each sequence), without its weight, averaged over layers; "
            "1 for an even load",
            "`MoEArgs.aux_loss_weight`, from step 2 on",
        ),
        MetricKey(
            "router_z_loss",
            "Z-loss of the routers",
            "",
            "squared log-partition of the gate's logits, averaged over the tokens and layers, "
            "without its weight",
            "`MoEArgs.z_loss_weight`, from step 2 on",
        ),
    ],
    "Data": [
        MetricKey(
            "data_padding_share",
            "Padding",
            "share",
            "share of padding in the tokens since this process began",
            '`data.packing = "best_fit"`',
            from_zero=True,
        ),
        MetricKey(
            "data_skipped_documents",
            "Skipped documents",
            "documents",
            "malformed documents skipped since this process began",
            '`data.on_error = "skip"`',
            count=True,
        ),
        MetricKey(
            "data_tokens/NAME",
            "Tokens of a source",
            "tokens",
            "tokens read from this source",
            "`[[data.sources]]`",
            count=True,
        ),
        MetricKey(
            "data_epoch/NAME",
            "Epochs of a source",
            "",
            "number of passes over this source",
            "`[[data.sources]]`",
            count=True,
        ),
    ],
    "Replicas": [
        MetricKey(
            "replica_groups",
            "Replica groups",
            "",
            "replica groups that took part in the step, or in the last meeting",
            "`fault_tolerance.enable`",
            from_zero=True,
        ),
    ],
    "Other": [],
    "More": [
        MetricKey(
            "max_loss",
            "Largest loss",
            "per token",
            "largest loss of a step since the last logged one",
        ),
        MetricKey(
            "tokens_per_second_per_device",
            "Throughput of a device",
            "tokens/s",
            "`tokens_per_second` divided by the number of devices",
            from_zero=True,
        ),
        MetricKey(
            "tflops_per_second_per_device",
            "FLOP/s of a device",
            "TFLOP/s",
            "FLOP/s of the model according to its `get_nparams_and_flops`, with what "
            "`model.converters` and `optimizer.rules` change, excluding recomputation",
            from_zero=True,
        ),
        MetricKey(
            "data_epoch",
            "Epochs",
            "",
            "number of passes over the dataset",
            "one dataset",
            count=True,
        ),
        MetricKey(
            "tokens_seen",
            "Tokens seen",
            "tokens",
            "tokens of the batches since step 0 on all ranks, with padding, without skipped steps",
            count=True,
        ),
        MetricKey(
            "elapsed_seconds",
            "Time",
            "s",
            "time since this process began to train, including pauses",
        ),
        STARTED_AT,
    ],
}
"""Maps report sections to keys. `Other` is for keys not in this table; `More` is collapsed."""

VALIDATION = MetricKey(
    "loss",
    "Validation loss",
    "per token",
    "mean over all tokens of all ranks on held-out data, excluding the z-loss",
)
"""The key of `validation.jsonl` that each run has; `loss/NAME` is that of a source."""


def find(key: str) -> tuple[str, MetricKey]:
    """Return section and entry of a key of `metrics.jsonl`; an unknown key is its own label."""
    for section, entries in SECTIONS.items():
        for entry in entries:
            family, _, name = entry.key.partition("/")
            if entry.key == key or (name and key.startswith(f"{family}/")):
                return section, entry
    return "Other", MetricKey(key, key, "", "")
