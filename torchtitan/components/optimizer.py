"""Optimizers over the parameters of this rank, in groups by kind and by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from torchtitan.components.muon import Muon
from torchtitan.distributed.names import canonical_name, require_match
from torchtitan.errors import ConfigError, refuse_incomplete

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.config.optimizer import Optimizer as OptimizerConfig
    from torchtitan.distributed.parallel_dims import ParallelDims

_OUTPUT_NAMES = ("output", "lm_head")
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class NamedParameter:
    """A trainable parameter and what the optimizers need to know of it."""

    name: str
    """Name of the parameter, as in checkpoints."""
    param: nn.Parameter
    kind: str
    """`norm`, `bias`, `embedding`, `output` or `weight`."""
    lr_scale: float
    weight_decay: float

    @property
    def is_hidden_matrix(self) -> bool:
        return self.kind == "weight" and self.param.ndim == 2


Build = Callable[[list[NamedParameter], "OptimizerConfig"], list[torch.optim.Optimizer]]


def _adam(cls: type[torch.optim.Adam]) -> Build:
    def build(params: list[NamedParameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
        betas = (config.beta1, config.beta2)
        groups = param_groups(params, config.lr)
        return [cls(groups, lr=config.lr, betas=betas, eps=config.eps, **_kernel(config))]

    return build


def _sgd(params: list[NamedParameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    groups = param_groups(params, config.lr)
    # The fused kernel of SGD knows no sharded parameters; foreach is its nearest.
    foreach = config.implementation != "for-loop"
    return [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=foreach)]


def _muon(params: list[NamedParameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for all others.

    The others include stacked matrices, such as those of experts `[experts, in, out]`.
    """
    matrices = [p for p in params if p.is_hidden_matrix]
    others = [p for p in params if not p.is_hidden_matrix]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        groups = param_groups(matrices, config.muon_lr)
        optimizers.append(Muon(groups, lr=config.muon_lr, momentum=config.momentum))
    if others:
        optimizers += OPTIMIZERS["AdamW"](others, config)
    return optimizers


OPTIMIZERS: dict[str, Build] = {
    "AdamW": _adam(torch.optim.AdamW),
    "Adam": _adam(torch.optim.Adam),
    "SGD": _sgd,
    "Muon": _muon,
}
"""`optimizer.name` -> builder."""


def register_optimizer(name: str, build: Build) -> None:
    """Make an optimizer known as `optimizer.name = name`. Repeating the same call is harmless.

    `build(params, config)` gets the parameters that this rank trains, of one part of the model, and
    the section `[optimizer]`. It is for `param_groups`, which heeds `optimizer.rules`.

    Raises:
        ValueError: the name is taken by another function.
    """
    if OPTIMIZERS.setdefault(name, build) is not build:
        raise ValueError(f"optimizer {name!r} is already registered; choose another name")


class OptimizersContainer:
    """The optimizers of all model parts of this rank, as one: what `build_optimizer_fn` returns.

    Args:
        parts: each model part, with the optimizers of its parameters.
    """

    def __init__(self, parts: list[tuple[nn.Module, list[torch.optim.Optimizer]]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        for _, optimizers in self._parts:
            yield from optimizers

    def step(self) -> None:
        for optimizer in self:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Flat, keyed by parameter name, so that it does not depend on the layout."""
        merged: dict[str, Any] = {}
        for model, optimizers in self._parts:
            merged |= get_optimizer_state_dict(model, optimizers, options=_FLAT)
        return merged

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the moments and counts of steps. The settings of groups stay those of the config."""
        settings = [[_settings(group) for group in o.param_groups] for o in self]
        for model, optimizers in self._parts:
            set_optimizer_state_dict(model, optimizers, state_dict, options=_FLAT)
        for optimizer, of_groups in zip(self, settings, strict=True):
            for group, own in zip(optimizer.param_groups, of_groups, strict=True):
                group.update(own)


def container_of(
    built: Any, model_parts: list[nn.Module], job_config: JobConfig
) -> OptimizersContainer:
    """What a `build_optimizer_fn` has built, where the trainer can use it.

    Raises:
        ConfigError: it cannot.
    """
    if isinstance(built, torch.optim.Optimizer) and len(model_parts) == 1:
        return OptimizersContainer([(model_parts[0], [built])])
    wanted = ("__iter__", "step", "zero_grad", "state_dict", "load_state_dict")
    missing = [name for name in wanted if not hasattr(built, name)]
    needed = ". Return torchtitan.components.OptimizersContainer("
    needed += "[(part, [optimizer of its parameters]) for part in model_parts])"
    refuse_incomplete(built, f"build_optimizer_fn of {job_config.model.name}", missing, needed)
    return built


_SETTINGS = frozenset(
    {
        *("weight_decay", "decoupled_weight_decay", "betas", "eps", "momentum", "dampening"),
        *("nesterov", "amsgrad", "maximize", "fused", "foreach", "capturable", "differentiable"),
    }
)
"""What the config sets in a parameter group. Some optimizers keep there what they have found out,
too, and the learning rate is the schedule's, which may go on from that of the checkpoint, as
PyTorch's do."""


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name in _SETTINGS}


def build_optimizer(
    model_parts: list[nn.Module], job_config: JobConfig, parallel_dims: ParallelDims
) -> OptimizersContainer:
    """Optimizers by `[optimizer]`. Parameters with `lr_scale = 0` stop requiring gradients.

    Rules are not checked here, as a rank may lack the layers that they are for: see `check_rules`.

    Raises:
        ConfigError: all parameters of a part are frozen.
    """
    config = job_config.optimizer
    built = []
    for model in model_parts:
        freeze(model, job_config)
        # A model may freeze its own, too.
        trained = [p for p in _named_parameters(model, config) if p.param.requires_grad]
        if not trained:
            raise ConfigError(_nothing_to_train(job_config))
        built.append((model, OPTIMIZERS[config.name](trained, config)))
    return OptimizersContainer(built)


def freeze(model: nn.Module, job_config: JobConfig) -> None:
    """Parameters with `lr_scale = 0` stop requiring gradients."""
    for p in _named_parameters(model, job_config.optimizer):
        if p.lr_scale == 0:
            p.param.requires_grad_(False)


def _nothing_to_train(job_config: JobConfig) -> str:
    problem = "the model, or lr_scale = 0 in optimizer.rules, freezes every parameter of "
    if job_config.parallelism.pipeline_parallel_degree == 1:
        return f"{problem}the model"
    return (
        f"{problem}a pipeline stage. Use fewer stages, or cut elsewhere "
        "(parallelism.pipeline_parallel_split_points)"
    )


def check_rules(model: nn.Module, job_config: JobConfig) -> None:
    """Check `optimizer.rules` against the whole model, before a pipeline cuts it.

    Raises:
        ConfigError: the pattern of a rule matches no parameter.
    """
    for i, rule in enumerate(job_config.optimizer.rules):
        require_match(rule.pattern, model, job_config, f"optimizer.rules.{i}")


def _named_parameters(model: nn.Module, config: OptimizerConfig) -> list[NamedParameter]:
    kinds: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            # A weight that the output layer shares with the embedding is an embedding.
            kinds.setdefault(id(param), _kind(module_name, module, name))

    named = []
    for fqn, param in model.named_parameters():
        name, kind = canonical_name(fqn), kinds[id(param)]
        lr_scale, weight_decay = 1.0, 0.0 if kind in config.no_decay else config.weight_decay
        for rule in config.rules:
            if re.search(rule.pattern, name):
                if rule.lr_scale is not None:
                    lr_scale = rule.lr_scale
                if rule.weight_decay is not None:
                    weight_decay = rule.weight_decay
        named.append(NamedParameter(name, param, kind, lr_scale, weight_decay))
    return named


def _kind(module_name: str, module: nn.Module, name: str) -> str:
    if name == "bias" or name.endswith("_bias"):
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if module_name.rpartition(".")[2] in _OUTPUT_NAMES:
        return "output"
    return "weight"


def param_groups(params: list[NamedParameter], lr: float) -> list[dict[str, Any]]:
    """One group for each learning rate, weight decay and mesh: fused kernels take one mesh.

    `lr` is the peak learning rate of parameters whose `lr_scale` is 1.
    """
    groups: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for p in params:
        mesh = p.param.device_mesh if isinstance(p.param, DTensor) else None
        groups[lr * p.lr_scale, p.weight_decay, mesh].append(p.param)
    return [
        {"params": members, "lr": group_lr, "weight_decay": weight_decay}
        for (group_lr, weight_decay, _), members in groups.items()
    ]


def _kernel(config: OptimizerConfig) -> dict[str, bool]:
    fused = config.implementation == "fused"
    return {"fused": fused, "foreach": config.implementation == "foreach"}
