"""`TrainSpec` describes how to train a model; the registry maps a model's name to its factory."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

from torchtitan.config.upstream import value_instead
from torchtitan.distributed.names import canonical_name
from torchtitan.errors import ConfigError, did_you_mean
from torchtitan.protocols.changed_args import changed_args, refuse_replaced, refusing
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol
from torchtitan.protocols.state_dict_adapter import BaseStateDictAdapter
from torchtitan.tools.user_module import with_place

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

TrainSpecFactory = Callable[[str], "TrainSpec"]

MODEL_REGISTRY: dict[str, TrainSpecFactory] = {}
"""Model name -> factory taking a flavor. `torchtitan.models.MODEL_REGISTRY` is this same table."""

ARGUMENTS = {
    "model_cls": "args",
    "parallelize_fn": "model, world_mesh, parallel_dims, job_config",
    "pipeline_fn": "model, world_mesh, parallel_dims, job_config, parallelize_fn, loss_fn",
    "build_optimizer_fn": "model_parts, job_config, parallel_dims",
    "build_lr_scheduler_fn": "optimizers, job_config",
    "build_dataloader_fn": "job_config, tokenizer, dp_rank, dp_world_size",
    "build_tokenizer_fn": "job_config",
    "build_loss_fn": "job_config",
    "build_validator_fn": "job_config, tokenizer, loss_fn, parallel_dims, dp_rank, dp_world_size",
    "build_metrics_processor_fn": "job_config, parallel_dims, model_args",
}
"""The arguments with which each function of a `TrainSpec` is called, by position."""


@dataclass
class TrainSpec:
    """Everything the trainer needs for one model of one size.

    The functions take the arguments above, and return:

    * `parallelize_fn`: the model
    * `pipeline_fn`: a `Pipeline`; `torchtitan.distributed.pipeline_parallel.build_pipeline` is one
    * `build_optimizer_fn`: an `OptimizersContainer`, or a `torch.optim.Optimizer` if there is one
      part
    * `build_lr_scheduler_fn`: an `LRSchedulersContainer`
    * `build_dataloader_fn`: see `torchtitan.components.DataLoader`
    * `build_tokenizer_fn`: a `Tokenizer`
    * `build_loss_fn`: a function `(pred, labels)` that sums over valid tokens, see
      `torchtitan.components.Loss`
    * `build_validator_fn`: see `torchtitan.components.Validator`
    * `build_metrics_processor_fn`: a `MetricsProcessor`
    """

    model_cls: type[ModelProtocol]
    model_args: BaseModelArgs
    parallelize_fn: Callable[..., Any]
    pipeline_fn: Callable[..., Any] | None
    build_optimizer_fn: Callable[..., Any]
    build_lr_scheduler_fn: Callable[..., Any]
    build_dataloader_fn: Callable[..., Any]
    build_tokenizer_fn: Callable[..., Any] | None
    build_loss_fn: Callable[..., Any]
    state_dict_adapter: type[BaseStateDictAdapter] | None = None
    build_validator_fn: Callable[..., Any] | None = None
    build_metrics_processor_fn: Callable[..., Any] | None = None
    has_changed_args: bool = False
    """Whether a job's `model.args` have changed the flavor's."""

    def updated_args(self, job_config: JobConfig) -> BaseModelArgs:
        """Return the flavor's args as `update_from_config` completes them.

        Raises:
            ConfigError: it returns None, as upstream's does, which updates in place, or it replaces
                a value of the job's `model.args`, or these are impossible.
        """
        name = type(self.model_args).__name__
        with self._refusing(type(self.model_args)):
            args = self.model_args.update_from_config(job_config)
        if args is None:
            raise ConfigError(f"{name}.update_from_config returns None, not the args")
        if self.has_changed_args:
            refuse_replaced(args, job_config, f"update_from_config of {name}")
            with self._refusing(type(args)):
                args.get_nparams_and_flops(job_config.training.seq_len)
        return args

    def meta_model(self, args: BaseModelArgs | None = None) -> ModelProtocol:
        """Return the whole model on the meta device, built from `args` or else `model_args`.

        Raises:
            ConfigError: it has a parameter that cannot be trained.
        """
        args = self.model_args if args is None else args
        with self._refusing(self.model_cls), torch.device("meta"):
            model = self.model_cls(args)
        for name, param in model.named_parameters():
            if problem := _problem_with(param):
                raise ConfigError(f"{type(model).__name__}: the parameter {name} {problem}")
        if getattr(model, "args", None) is None:
            cast(Any, model).args = args  # compared with the checkpoint's on resuming
        # Several models may share the class and differ in how they are exported.
        cast(Any, model)._state_dict_adapter = self.state_dict_adapter
        return model

    @contextmanager
    def _refusing(self, cls: type) -> Iterator[None]:
        """Raise `ConfigError` where a class fails because of changed args; other errors are bugs of
        its author.
        """
        if not self.has_changed_args:
            yield
            return
        with refusing(cls.__name__, cls.__module__):
            yield

    def parallelize(self, model: nn.Module, *layout: Any) -> Any:
        """Run `parallelize_fn`, then freeze again the parameters that were frozen before.

        PyTorch's `parallelize_module` creates new parameters, which all require gradients.
        """
        places = model.named_parameters(remove_duplicate=False)
        frozen = {canonical_name(name) for name, param in places if not param.requires_grad}
        model = self.parallelize_fn(model, *layout)
        if not isinstance(model, nn.Module):
            function = getattr(self.parallelize_fn, "__qualname__", self.parallelize_fn)
            raise ConfigError(
                f"{function}, a parallelize_fn, returned {model!r}: it must return the model"
            )
        for name, param in model.named_parameters():
            # Before the first forward pass, in which FSDP reads `requires_grad`.
            if canonical_name(name) in frozen:
                param.requires_grad_(False)
        return model

    def tokenizer(self, job_config: Any) -> Any:
        """Return the job's tokenizer; None if the model reads no text."""
        return self.build_tokenizer_fn(job_config) if self.build_tokenizer_fn else None


def _problem_with(param: nn.Parameter) -> str:
    """Return why a parameter of a new model cannot be trained; "" if it can."""
    if is_lazy(param):
        return "has no size yet. In place of lazy modules, use those that are given all sizes"
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(param.dtype).removeprefix("torch.")
        return (
            f"is {kind}, but parameters are float32, bfloat16 or float16. Make complex ones of a "
            "real one, [..., 2], by torch.view_as_complex in forward; keep integers in buffers"
        )
    if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
        return (
            "has a hook, which would be lost, since the model is built without memory and its "
            "parameters are replaced. Hooks of modules stay"
        )
    return ""


def register_train_spec(name: str, factory: TrainSpecFactory) -> None:
    """Make a model known as `model.name = name`. Repeating the same call is harmless.

    Raises:
        TypeError: `factory` is no function of a flavor.
        ValueError: the name is taken by another factory.
    """
    try:
        inspect.signature(factory).bind("flavor")
    except TypeError as error:
        raise TypeError(
            f"register_train_spec({name!r}, ...) takes a function (flavor) -> TrainSpec"
        ) from error
    known = MODEL_REGISTRY.setdefault(name, factory)
    if known is not factory:
        raise ValueError(
            f"model {name!r} is already registered by {known.__module__}; choose another name"
        )


class BrokenModel:
    """Takes the place of a `get_train_spec` in the registry."""

    def __init__(self, name: str, problem: str, error: Exception) -> None:
        self.problem = f"the model {name} cannot be used: its import failed with {problem}"
        self._error = error

    def __call__(self, flavor: str) -> NoReturn:
        """Raise `ConfigError`; a command that uses the model calls this."""
        raise ConfigError(self.problem) from self._error


def model_flavors(name: str) -> list[str]:
    """Return a model's flavors: the keys of `MODEL_CONFIGS` in the module of its factory."""
    return list(_configs_of(name))


def _configs_of(name: str) -> dict[str, Any]:
    return getattr(MODEL_REGISTRY[name], "__globals__", {}).get("MODEL_CONFIGS", {})


def get_train_spec(name: str, flavor: str) -> TrainSpec:
    """Look up a model. If there is none, raise a `ConfigError` that lists the known names."""
    if name not in MODEL_REGISTRY:
        hint = did_you_mean(name, MODEL_REGISTRY)
        if not MODEL_REGISTRY:
            hint = " `import torchtitan.models` registers the library's."
        raise ConfigError(
            f"model.name = {name!r}: no such model.{hint} "
            "job.custom_import imports a model of your own"
        )
    flavors = model_flavors(name)
    if flavors and flavor not in flavors:
        hint = value_instead("model.flavor", flavor, flavors) or did_you_mean(flavor, flavors)
        raise ConfigError(f"model.flavor = {flavor!r}: {name} has no such flavor.{hint}")
    spec = MODEL_REGISTRY[name](flavor)
    if not isinstance(spec, TrainSpec):  # such as None, without `return`
        kind = type(spec).__name__
        raise ConfigError(f"{name}: its factory returns {kind} for {flavor!r}, not a TrainSpec")
    if not isinstance(spec.model_args, BaseModelArgs):
        kind = type(spec.model_args).__name__
        raise ConfigError(f"{name}: model_args of its TrainSpec is {kind}, not one flavor's args")
    for field, arguments in ARGUMENTS.items():
        if function := getattr(spec, field):
            _refuse_other_arguments(function, f"{name}: {field} of its TrainSpec", arguments)
    function = spec.model_args.get_nparams_and_flops
    _refuse_other_arguments(
        function, f"{type(spec.model_args).__name__}.{function.__name__}", "seq_len"
    )
    return spec


def _refuse_other_arguments(function: Callable[..., Any], what: str, arguments: str) -> None:
    """Raise `ConfigError` unless a function can be called with such arguments, by position."""
    try:
        with suppress(ValueError):  # a compiled function has no signature
            inspect.signature(function).bind(*arguments.split(", "))
    except TypeError as error:
        raise ConfigError(f"{what} must take ({arguments}): {error}") from error


def train_spec_of(job_config: JobConfig) -> TrainSpec:
    """Return the `TrainSpec` of a job's model: of its flavor, with the changes of `model.args`.

    Raises:
        ConfigError: there is no such model or flavor, or it cannot be changed like this.
    """
    name, flavor = job_config.model.name, job_config.model.flavor
    spec = get_train_spec(name, flavor)
    if not job_config.model.args:
        return spec
    args = changed_args(spec.model_args, job_config)
    configs = _configs_of(name)
    if isinstance(configs, dict) and flavor in configs:
        # The factory may give the args to builders, too, such as that of a model's own loader.
        flavors_own, configs[flavor] = configs[flavor], args
        try:
            spec = get_train_spec(name, flavor)
        finally:
            configs[flavor] = flavors_own
    return replace(spec, model_args=args, has_changed_args=True)


def some_specs() -> tuple[dict[str, TrainSpec], list[str]]:
    """Return name -> `TrainSpec` of one flavor of each model, and the problems of the others.

    These may be plugins of no concern to the caller. A model whose flavors are unknown is left out.
    """
    specs, problems = {}, []
    for name, factory in MODEL_REGISTRY.items():
        flavors = model_flavors(name)
        try:
            specs[name] = factory(flavors[0] if flavors else "")
        except Exception as error:
            unknown = not flavors and isinstance(error, KeyError | ConfigError)
            if not unknown or isinstance(factory, BrokenModel):
                problems.append(problem_of(name, error))
    return specs, problems


def problem_of(name: str, error: Exception) -> str:
    """Return what the code of a model's author did wrong, and where."""
    if isinstance(error, ConfigError):
        return str(error)
    module = sys.modules.get(MODEL_REGISTRY[name].__module__)
    file = getattr(module, "__file__", None) or ""
    return f"the model {name} fails: {with_place(error, [str(Path(file).parent)])}"
