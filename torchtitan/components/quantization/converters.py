"""Convert layers to 8 bits: `quantize.linear.*` and `quantize.grouped_mm.*` converters."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import NoReturn

import torch
import torch.nn as nn

from torchtitan.config import JobConfig, fail
from torchtitan.distributed.expert_parallel import moe_layers
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols.model_converter import register_model_converter
from torchtitan.runtime.device import device_type
from torchtitan.tools.logging import logger, rank0
from torchtitan.tools.text import few

from .linear import QuantizedLinear
from .products import quantized_grouped_linear
from .scaling import MX_BLOCK, Grouping


class _Converter:
    """Base of the converters: reads the options and decides whether to emulate.

    `key` is the config section. Sizes must be multiples of `unit`. `needed` is the lowest CUDA
    compute capability that supports these products; None if there is no kernel.
    """

    key: str
    unit = 16
    needed: tuple[int, int] | None = None

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        self.job_config, self.parallel_dims = job_config, parallel_dims
        _, kind, name = self.key.split(".")
        self.options = getattr(getattr(job_config.quantize, kind), name)
        self.emulate = self.options.emulate or device_type() == "cpu"  # for trials there
        if self.emulate:
            return
        self.require_capability(torch.cuda.get_device_capability(), "this one")
        if job_config.training.mixed_precision_param != "bfloat16":
            problem = "8-bit products return bfloat16, so training.mixed_precision_param must be "
            self.fail("emulate", f"{problem}'bfloat16', or this key true")

    def require_capability(self, found: tuple[int, int], device: str) -> None:
        """Raise `ConfigError` if a device of this compute capability lacks these products."""
        if self.needed is None:
            self.fail("emulate", "there is no kernel for these products yet. Set it to true")
        if found < self.needed:
            least, has = (".".join(map(str, version)) for version in (self.needed, found))
            problem = f"needs a device of compute capability {least}, and {device} has {has}. "
            self.fail("emulate", problem + "Set it to true to emulate the numerics")

    def tell(self, count: int, what: str) -> None:
        """Log the conversion and warn of slow settings."""
        logger.info("%s: %d %s", self.key, count, what)
        if self.emulate and not self.options.emulate:
            text = (
                "%s: emulated, as on every CPU: the numerics are those of a GPU, the speed is not"
            )
            rank0.warning(text, self.key)
        if not self.emulate and not self.job_config.compile.compiles("model"):
            text = (
                "%s: without compile.enable, each step of rounding to 8 bits takes a pass over "
                "memory, which may cost more time than the products save"
            )
            rank0.warning(text, self.key)

    def post_optimizer_hook(self, model_parts: list[nn.Module]) -> None:
        """Do nothing: scales are computed anew in each product."""

    def fail(self, option: str, problem: str) -> NoReturn:
        fail(self.job_config, f"{self.key}.{option}", problem)


class _LinearConverter(_Converter):
    grouping: Grouping
    quantize_weight_grad = True
    float8_gather = False

    def convert(self, model: nn.Module) -> None:
        self._check_filter(model)
        places: dict[nn.Linear, list[str]] = defaultdict(list)  # a shared layer has several names
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, nn.Linear):
                places[module].append(name)
        chosen = {
            linear: names
            for linear, names in places.items()
            if not any(part in name for name in names for part in self.options.filter_fqns)
        }
        linears = {linear: names for linear, names in chosen.items() if type(linear) is nn.Linear}
        if not linears:
            self.fail("filter_fqns", "no linear layer is left to convert")
        if others := [names[0] for linear, names in chosen.items() if linear not in linears]:
            text = "%s: left in high precision, as they are of a subclass of nn.Linear: %s"
            rank0.warning(text, self.key, few(others, 5))
        self._check_tokens()
        for linear, names in linears.items():
            self._check_sizes(names[0], linear)
            quantized = QuantizedLinear(
                linear, self.grouping, self.quantize_weight_grad, self.emulate, self.float8_gather
            )
            for name in names:
                model.set_submodule(name, quantized)
        self.tell(len(linears), f"of {len(places)} linear layers")

    def _check_filter(self, model: nn.Module) -> None:
        """Refuse a name that matches nothing: misspelled, or several names parsed as one."""
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        usual = type(self.options)().filter_fqns  # some of these only match mixtures of experts
        for part in self.options.filter_fqns:
            if part in usual or any(part in name for name in names):
                continue
            spaces = " On the command line, separate names by spaces" if "," in part else ""
            self.fail("filter_fqns", f"no layer's name contains {part!r}.{spaces}".rstrip("."))

    def _check_sizes(self, name: str, linear: nn.Linear) -> None:
        unit = self.unit * self.parallel_dims.tp  # tensor parallelism may shard either size
        if linear.in_features % unit or linear.out_features % unit:
            shared = f" (tensor_parallel_degree {self.parallel_dims.tp} x {self.unit})"
            self.fail(
                "filter_fqns",
                f"{name} has {linear.in_features} features in and {linear.out_features} out, "
                f"which must be multiples of {unit}{shared if self.parallel_dims.tp > 1 else ''}. "
                "Add its name to leave it unquantized",
            )

    def _check_tokens(self) -> None:
        """Check the number of tokens in a forward pass, over which weight gradients sum."""
        if not self.quantize_weight_grad:
            return
        config, dims = self.job_config, self.parallel_dims
        batch, key = config.training.local_batch_size, "training.local_batch_size"
        if dims.pp_enabled:
            key = "parallelism.pipeline_parallel_microbatch_size"
            batch = config.parallelism.pipeline_parallel_microbatch_size
        # Some layers, such as shared experts, process only each rank's part of a sequence.
        tokens = batch * config.training.seq_len // (dims.cp * dims.tp)
        if tokens % self.unit:
            fail(
                config,
                key,
                f"{self.key} needs a multiple of {self.unit} tokens in the forward pass of a "
                f"rank, but this one has {tokens}",
            )


class Float8LinearConverter(_LinearConverter):
    """`quantize.linear.float8`."""

    key = "quantize.linear.float8"

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
        recipe = job_config.quantize.linear.float8.recipe_name
        self.needed = (8, 9) if recipe == "tensorwise" else (9, 0)
        self.grouping = "tensor" if recipe == "tensorwise" else "row"
        self.quantize_weight_grad = recipe != "rowwise_with_gw_hp"
        super().__init__(job_config, parallel_dims)
        self.float8_gather = self.options.enable_fsdp_float8_all_gather
        if self.float8_gather and recipe != "tensorwise":
            problem = f"needs recipe_name 'tensorwise', not {recipe!r}, whose two products with a "
            self.fail("enable_fsdp_float8_all_gather", f"{problem}weight round it differently")
        if self.float8_gather and job_config.training.enable_cpu_offload:
            problem = (
                "cannot be combined with training.enable_cpu_offload. Set one of them to false"
            )
            self.fail("enable_fsdp_float8_all_gather", problem)


class MXLinearConverter(_LinearConverter):
    """`quantize.linear.mx`."""

    key = "quantize.linear.mx"
    unit = MX_BLOCK
    needed = (10, 0)
    grouping = "block"


class _GroupedConverter(_Converter):
    grouping: Grouping

    def convert(self, model: nn.Module) -> None:
        layers = moe_layers(model)
        if not layers:
            name = self.job_config.model.name
            problem = f"{self.key} needs a mixture of experts, but {name} has no experts"
            fail(self.job_config, "model.converters", problem)
        compiler = self.job_config.compile
        product = partial(
            quantized_grouped_linear,
            grouping=self.grouping,
            emulate=self.emulate,
            backend=compiler.backend if compiler.compiles("model") else None,
        )
        for layer in layers:
            if not hasattr(layer.experts, "product"):
                fail(
                    self.job_config,
                    "model.converters",
                    f"{self.key} needs experts that multiply with `self.product`, as in "
                    f"torchtitan.models.common.moe, but {type(layer.experts).__name__} does not "
                    "have it",
                )
            self._check_sizes(layer.experts)
            layer.experts.product = product
        self.tell(len(layers), "layers of experts")

    def _check_sizes(self, experts: nn.Module) -> None:
        unit = self.unit * self.parallel_dims.etp
        for name, param in experts.named_parameters():
            if param.ndim == 3 and (param.size(1) % unit or param.size(2) % unit):
                fail(
                    self.job_config,
                    "model.converters",
                    f"{self.key} needs sizes that are multiples of {unit}, but the experts' "
                    f"{name} is {list(param.shape)}",
                )


class Float8GroupedConverter(_GroupedConverter):
    """`quantize.grouped_mm.float8`."""

    key = "quantize.grouped_mm.float8"
    needed = (9, 0)
    grouping = "row"


class MXGroupedConverter(_GroupedConverter):
    """`quantize.grouped_mm.mx`."""

    key = "quantize.grouped_mm.mx"
    unit = MX_BLOCK
    grouping = "block"


for _cls in (Float8LinearConverter, MXLinearConverter, Float8GroupedConverter, MXGroupedConverter):
    register_model_converter(_cls, _cls.key)
