"""Build the optimizers of this rank's parameters, grouped by kind and name."""

from __future__ import annotations

import copy
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.components.muon import Muon
from torchtitan.components.rounded_adam import RoundedAdam, RoundedAdamW
from torchtitan.config import JobConfig
from torchtitan.config.optimizer import Optimizer as OptimizerConfig
from torchtitan.distributed.blocks import blocks_of
from torchtitan.distributed.names import canonical_name, require_match
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.stage_copies import copied_names, with_absent_modules
from torchtitan.errors import ConfigError, refuse_incomplete
from torchtitan.tools.logging import rank0
from torchtitan.tools.text import few

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(frozen=True)
class NamedParameter:
    """A trainable parameter with the settings that optimizers need."""

    name: str
    """Name of the parameter, as in checkpoints."""
    param: nn.Parameter
    kind: str
    """`norm`, `bias` (or another vector of a block, such as attention sinks), `embedding`, `weight`
    of a block, or `outer`, such as the output layer."""
    lr_scale: float
    weight_decay: float
    is_hidden_matrix: bool
    """Whether it is a matrix of a block, or a stack of them that its module declares as such (see
    `GroupedExperts`)."""


Build = Callable[[list[NamedParameter], "OptimizerConfig"], list[torch.optim.Optimizer]]


def _adam(exact: type[torch.optim.Adam], rounded: type[RoundedAdam]) -> Build:
    def build(params: list[NamedParameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
        cls = rounded if config.state_dtype == "bfloat16" else exact
        return [
            cls(
                param_groups(params, config.lr),
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=config.implementation == "fused",
                foreach=config.implementation == "foreach",
            )
        ]

    return build


def _sgd(params: list[NamedParameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    groups = param_groups(params, config.lr)
    # SGD's fused kernel does not support sharded parameters; foreach is the closest.
    foreach = config.implementation != "for-loop"
    return [torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=foreach)]


def _muon(params: list[NamedParameter], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Build Muon (Jordan et al., 2024) for the matrices of blocks, and AdamW for the rest."""
    matrices = [p for p in params if p.is_hidden_matrix]
    others = [p for p in params if not p.is_hidden_matrix]
    _warn_of_stacks(matrices, others)
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        groups = param_groups(matrices, config.muon_lr)
        dtype = torch.bfloat16 if config.state_dtype == "bfloat16" else None
        optimizers.append(Muon(groups, config.muon_lr, config.momentum, state_dtype=dtype))
    if others:
        optimizers += OPTIMIZERS["AdamW"](others, config)
    return optimizers


def _warn_of_stacks(matrices: list[NamedParameter], others: list[NamedParameter]) -> None:
    """Warn on rank 0 if Muon leaves most weights of the blocks to AdamW, as it does gpt-oss's.

    AdamW's `optimizer.lr`, which usually matters for few weights, then trains most of the model.
    """
    stacks = [p for p in others if p.kind == "weight" and p.param.ndim > 2]
    stacked, single = (sum(p.param.numel() for p in group) for group in (stacks, matrices))
    if stacked > single:
        rank0.warning(
            "optimizer.name = 'Muon' updates matrices, and stacks of them that a module names in "
            "stacks_of_matrices. %.0f%% of the blocks' weights are others, which AdamW updates "
            "with optimizer.lr: %s",
            *(100 * stacked / (stacked + single), few([p.name for p in stacks], 5)),
        )


OPTIMIZERS: dict[str, Build] = {
    "AdamW": _adam(torch.optim.AdamW, RoundedAdamW),
    "Adam": _adam(torch.optim.Adam, RoundedAdam),
    "SGD": _sgd,
    "Muon": _muon,
}
"""Maps `optimizer.name` to a builder."""


def register_optimizer(name: str, build: Build) -> None:
    """Register an optimizer as `optimizer.name = name`. Repeating the same call is harmless.

    `build(params, config)` gets the parameters of one model part that this rank trains, and the
    section `[optimizer]`. Pass the parameters to `param_groups`, which applies `optimizer.rules`.

    Raises:
        ValueError: another function is registered under the name.
    """
    if OPTIMIZERS.setdefault(name, build) is not build:
        raise ValueError(f"optimizer {name!r} is already registered; choose another name")


class OptimizersContainer:
    """Combines the optimizers of all model parts of this rank; `build_optimizer_fn` returns it.

    Args:
        parts: each model part with the optimizers of its parameters; none that is frozen.
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
        """Return a flat state keyed by parameter name, which does not depend on the layout."""
        merged: dict[str, Any] = {}
        for model, optimizers in self._parts:
            state = get_optimizer_state_dict(model, optimizers, options=_FLAT)
            merged |= _renamed(state, copied_names(model))
        return {name: _summed(value) for name, value in merged.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and step counts, on the devices and in the dtypes that they have here.

        The settings of the groups stay those of the config, and the groups the same dicts, which
        an author's schedule may hold.
        """
        kept = [(o, o.param_groups, [_settings(group) for group in o.param_groups]) for o in self]
        # PyTorch would round all state to the dtype of its parameter.
        policy = "_process_value_according_to_param_policy"
        with patch.object(torch.optim.Optimizer, policy, staticmethod(_unchanged)):
            for model, optimizers in self._parts:
                set_optimizer_state_dict(
                    model, optimizers, _with_copies(state_dict, model), options=_FLAT
                )
        for optimizer, groups, settings in kept:
            for group, loaded, own in zip(groups, optimizer.param_groups, settings, strict=True):
                group.update(loaded | own)
            optimizer.param_groups = groups


def _renamed(state_dict: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a flat state in which parameters have other names: `names` maps old to new."""
    prefixes = {
        f"{kind}.{old}.": f"{kind}.{new}."
        for kind in ("state", "param_groups")
        for old, new in names.items()
    }
    renamed = {}
    for key, value in state_dict.items():
        old = next((old for old in prefixes if key.startswith(old)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = value
    return renamed


def _with_copies(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return a flat state that a stage can load: with its own names of what other stages own.

    In memory of its own: the owner of a weight may be another stage of this rank.
    """
    if not (copied := copied_names(model)):
        return state_dict
    kinds = ("state", "param_groups")
    firsts = tuple(f"{kind}.{name}." for kind in kinds for name in copied.values())
    shared = {key: value for key, value in state_dict.items() if key.startswith(firsts)}
    own = _renamed(copy.deepcopy(shared), {first: name for name, first in copied.items()})
    return state_dict | own


def _summed(value: Any) -> Any:
    """Return a tensor of which ranks hold terms, such as a mean over a sharded dimension, whole."""
    if not isinstance(value, DTensor) or not any(place.is_partial() for place in value.placements):
        return value
    whole = [Replicate() if place.is_partial() else place for place in value.placements]
    return value.redistribute(placements=whole)


def _unchanged(param: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return value


def container_of(
    built: Any, model_parts: list[nn.Module], job_config: JobConfig
) -> OptimizersContainer:
    """Return the result of a `build_optimizer_fn` as a container that the trainer can use.

    Raises:
        ConfigError: the trainer cannot use it.
    """
    if isinstance(built, torch.optim.Optimizer) and len(model_parts) == 1:
        built = OptimizersContainer([(model_parts[0], [built])])
    wanted = ("__iter__", "step", "zero_grad", "state_dict", "load_state_dict")
    missing = [name for name in wanted if not hasattr(built, name)]
    needed = ". Return torchtitan.components.OptimizersContainer("
    needed += "[(part, [optimizer of its parameters]) for part in model_parts])"
    refuse_incomplete(built, f"build_optimizer_fn of {job_config.model.name}", missing, needed)
    for optimizer in built:
        _require_optional_closure(optimizer)
    return built


def _require_optional_closure(optimizer: torch.optim.Optimizer) -> None:
    signature = inspect.signature(optimizer.step)
    try:
        signature.bind()
        signature.bind(closure=None)
    except TypeError:
        raise ConfigError(
            f"{type(optimizer).__name__}.step{signature} must be step(self, closure=None). The "
            "trainer calls it without arguments, once the gradients are there, so optimizers that "
            "compute them by a closure, as LBFGS does, are not supported. PyTorch calls "
            "step(closure=None) before it loads a checkpoint"
        ) from None


_SETTINGS = frozenset(
    {
        *("weight_decay", "decoupled_weight_decay", "betas", "eps", "momentum", "dampening"),
        *("nesterov", "amsgrad", "maximize", "fused", "foreach", "capturable", "differentiable"),
    }
)
"""Keys of a parameter group that the config sets. Other keys load from checkpoints: some optimizers
keep state in the group, and the learning rate belongs to the schedule, which may continue from the
checkpoint's, as PyTorch's schedulers do."""


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name in _SETTINGS}


def build_optimizer(
    model_parts: list[nn.Module], job_config: JobConfig, parallel_dims: ParallelDims
) -> OptimizersContainer:
    """Build the optimizers of `[optimizer]` for parameters that are not frozen: see `freeze`.

    Rules are not checked here, since a rank may lack the layers they match: see `check_rules`.
    """
    config = job_config.optimizer
    parts = []
    for model in model_parts:
        trained = [p for p in _named_parameters(model, config) if p.param.requires_grad]
        if trained:  # nothing in a frozen stage of a pipeline
            parts.append((model, OPTIMIZERS[config.name](trained, config)))
    return OptimizersContainer(parts)


def freeze(model: nn.Module, job_config: JobConfig) -> None:
    """Set `requires_grad` to False for parameters with `lr_scale = 0`.

    A model may also freeze parameters itself.
    """
    for p in _named_parameters(model, job_config.optimizer):
        if p.lr_scale == 0:
            p.param.requires_grad_(False)


def check_rules(model: nn.Module, job_config: JobConfig) -> None:
    """Check `optimizer.rules` against the whole model, before a pipeline cuts it.

    Raises:
        ConfigError: the pattern of a rule matches no parameter, or all parameters are frozen.
    """
    for i, rule in enumerate(job_config.optimizer.rules):
        require_match(rule.pattern, model, job_config, f"optimizer.rules.{i}")
    named = _named_parameters(model, job_config.optimizer)
    if not any(p.lr_scale and p.param.requires_grad for p in named):
        raise ConfigError(
            "the model, or lr_scale = 0 in optimizer.rules, freezes every parameter of the model"
        )


def warn_of_low_precision(model: nn.Module) -> None:
    """Warn of trained weights that the model itself makes in another dtype than float32."""
    dtypes = {str(param.dtype) for param in model.parameters() if param.requires_grad}
    if low := sorted(dtypes - {"torch.float32"}):
        rank0.warning(
            "the model has weights of %s, and so their optimizer state is: small updates may round "
            "to nothing. Make them float32, which training.mixed_precision_param casts",
            ", ".join(low),
        )


def _named_parameters(model: nn.Module, config: OptimizerConfig) -> list[NamedParameter]:
    own = {id(param) for param in model.parameters()}
    with with_absent_modules(model):  # rules know a shared weight by its first name
        return [p for p in _all_named_parameters(model, config) if id(p.param) in own]


def _all_named_parameters(model: nn.Module, config: OptimizerConfig) -> list[NamedParameter]:
    inner = {id(p) for block in blocks_of(model).values() for p in block.parameters()}
    kinds: dict[int, str] = {}
    stacks: set[int] = set()
    for module in model.modules():
        of_matrices = getattr(module, "stacks_of_matrices", ())
        for name, param in module.named_parameters(recurse=False):
            # A weight that the output layer shares with the embedding counts as an embedding.
            kinds.setdefault(id(param), _kind(module, name, param, id(param) in inner))
            if name in of_matrices:
                stacks.add(id(param))

    named = []
    for fqn, param in model.named_parameters():
        name, kind = canonical_name(fqn), kinds[id(param)]
        lr_scale, weight_decay = 1.0, 0.0 if kind in config.no_decay else config.weight_decay
        is_matrix = kind == "weight" and (param.ndim == 2 or id(param) in stacks)
        if config.name == "Muon" and is_matrix:
            weight_decay = config.muon_weight_decay
        for rule in config.rules:
            if re.search(rule.pattern, name):
                if rule.lr_scale is not None:
                    lr_scale = rule.lr_scale
                if rule.weight_decay is not None:
                    weight_decay = rule.weight_decay
        named.append(NamedParameter(name, param, kind, lr_scale, weight_decay, is_matrix))
    return named


def _kind(module: nn.Module, name: str, param: torch.Tensor, in_block: bool) -> str:
    if name == "bias" or name.endswith("_bias"):
        return "bias"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm"
    if in_block:
        return "bias" if param.ndim < 2 else "weight"
    return "outer"


def param_groups(params: list[NamedParameter], lr: float) -> list[dict[str, Any]]:
    """Return a group per learning rate, weight decay and mesh, as fused kernels take one mesh.

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
