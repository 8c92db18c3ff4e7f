"""Checks the state dict adapter alone: a pure map of names and tensors, there and back."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchtitan.components.checkpoint.converted import by_layer, convert_sharded
from torchtitan.components.checkpoint.model_tensors import buffer_names, first_names
from torchtitan.distributed.dtensor import local_tensor, whole_tensor
from torchtitan.protocols import BaseStateDictAdapter
from torchtitan.protocols.train_spec import get_train_spec, model_flavors
from torchtitan.runtime.process_group import init_distributed
from torchtitan.tools.text import few

from .check import CheckFailedError, Checks, NotApplicableError
from .diagnose import problem_and_place
from .subject import Subject

CHECKS = Checks("adapter.round_trip")

State = dict[str, Any]

_HINT = "state_dict_adapter.py: "
_PATIENCE = 180
"""Seconds. A check's own limit must come first, since it can report where each rank is."""


def adapter_of(subject: Subject) -> BaseStateDictAdapter:
    """Return the model's adapter. Raises `NotApplicableError` if the model has none."""
    if subject.spec.state_dict_adapter is None:
        raise NotApplicableError("the TrainSpec has no state_dict_adapter")
    return subject.spec.state_dict_adapter(subject.args)


def distinct_state(model: nn.Module) -> State:
    """Return the model's state dict with different random numbers in all but tied tensors."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in made:
            values = torch.randn(tensor.shape, generator=generator)
            made[id(tensor)] = values.to(tensor.dtype)
        state[name] = made[id(tensor)]
    return state


@CHECKS.of("adapter.round_trip", "from_hf(to_hf(state)) is the state", needs=("contract.spec",))
def maps_there_and_back(subject: Subject) -> str:
    """The round trip is exact, and changes nothing in place."""
    model, adapter = subject.spec.meta_model(subject.args), adapter_of(subject)
    state = distinct_state(model)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    hf = _convert(adapter.to_hf, dict(state), "to_hf")
    hf_kept = {name: tensor.clone() for name, tensor in hf.items()}
    back = _convert(adapter.from_hf, dict(hf), "from_hf")
    dropped = _compare(back, kept, buffer_names([model]), "from_hf(to_hf(state))")
    for name, tensor in state.items():
        if not torch.equal(tensor, kept[name]):
            raise CheckFailedError(
                f"the adapter changes {name} in place", f"{_HINT}clone() before operations with _."
            )
    again = _convert(adapter.to_hf, back, "to_hf")
    _compare(again, hf_kept, set(), "to_hf(from_hf(hf))")
    note = f"; {few(dropped, 5)} is not exported" if dropped else ""
    return f"{len(state)} tensors <-> {len(hf)} of Hugging Face{note}"


def _convert(function: Any, state: State, name: str) -> State:
    try:
        converted = function(state)
    except Exception as error:
        raise CheckFailedError(
            f"{name}() fails: {problem_and_place(error)}",
            f"{_HINT}every name of model.state_dict() needs a Hugging Face name.",
        ) from error
    if not isinstance(converted, dict):
        raise CheckFailedError(f"{name}() returns {type(converted).__name__}, not a dict")
    return converted


def _compare(actual: State, expected: State, may_lack: set[str], what: str) -> list[str]:
    """Return missing names that may be missing. Raises `CheckFailedError` for other differences."""
    missing = [name for name in expected if name not in actual]
    refused = [name for name in missing if name not in may_lack]
    if refused:
        raise CheckFailedError(
            f"{what} lacks {few(refused, 5)}",
            f"{_HINT}a name is dropped, or two are mapped to one.",
        )
    if extra := [name for name in actual if name not in expected]:
        raise CheckFailedError(
            f"{what} has {few(extra, 5)}, which did not exist before",
            f"{_HINT}from_hf() must give back the names of model.state_dict().",
        )
    for name, tensor in actual.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise CheckFailedError(
                f"in {what}, {name} is {_kind(tensor)}, not {_kind(wanted)}",
                f"{_HINT}what to_hf() transposes, splits or casts, from_hf() must undo.",
            )
        if not torch.equal(tensor, wanted):
            raise CheckFailedError(
                f"in {what}, {name} has different values{_explain(tensor, wanted)}",
                f"{_HINT}what to_hf() permutes or transposes, from_hf() must undo: the inverse "
                "permutation, not the same one again. Neither may round: no cast.",
            )
    return missing


def _kind(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _explain(actual: torch.Tensor, expected: torch.Tensor) -> str:
    if actual.ndim == 2 and actual.shape[0] == actual.shape[1] and torch.equal(actual.T, expected):
        return ": it is transposed"
    if torch.equal(actual.flatten().sort().values, expected.flatten().sort().values):
        return ": the same numbers in another order"
    if torch.allclose(actual.double(), expected.double(), rtol=0.01):
        return ": they are rounded, as by a cast to another dtype and back"
    return ""


@CHECKS.of("adapter.parts", "a stage's names alone are mapped as in the whole model")
def parts_map_alike(subject: Subject) -> str:
    adapter = adapter_of(subject)
    model = subject.spec.meta_model(subject.args)
    state, buffers = distinct_state(model), buffer_names([model])
    whole, second = adapter.to_hf(dict(state)), first_names(model)
    tied = {*second, *second.values()}
    count = 0
    for description, part in by_layer(state).items():
        hf = _convert(adapter.to_hf, dict(part), f"with the names of {description} alone, to_hf")
        wrong = [n for n, t in hf.items() if n not in whole or not torch.equal(t, whole[n])]
        if wrong:
            raise CheckFailedError(
                f"{description} alone gives a different {wrong[0]} than in the whole model",
                f"{_HINT}the mapping of a name must not depend on other names.",
            )
        back = _convert(adapter.from_hf, dict(hf), f"with {description} alone, from_hf")
        back = {name: tensor for name, tensor in back.items() if name in part or name not in tied}
        _compare(back, part, buffers, f"from_hf(to_hf()) of {description} alone")
        count += 1
    return f"{count} parts"


@CHECKS.of("adapter.flavors", "all flavors' names are mapped")
def flavors_map(subject: Subject) -> str:
    adapter_of(subject)
    flavors = [flavor for flavor in model_flavors(subject.name) if flavor != subject.flavor]
    if not flavors:
        raise NotApplicableError("there are no other flavors")
    for flavor in flavors:
        spec = get_train_spec(subject.name, flavor)
        if spec.state_dict_adapter is None:
            continue
        model = spec.meta_model()
        adapter, state = spec.state_dict_adapter(spec.model_args), model.state_dict()
        hf = _convert(adapter.to_hf, dict(state), f"{flavor}: to_hf")
        back = _convert(adapter.from_hf, hf, f"{flavor}: from_hf")
        may_lack = buffer_names([model])
        missing = [n for n in state if n not in back and n not in may_lack]
        shapes = [n for n, t in back.items() if n not in state or t.shape != state[n].shape]
        if missing or shapes:
            raise CheckFailedError(
                f"{flavor}: from_hf(to_hf()) lacks or misshapes {few(missing or shapes, 5)}",
                f"{_HINT}look at numbers of layers with two digits, and at options that only the "
                "larger flavors have.",
            )
    return f"{len(flavors)} flavors"


@CHECKS.of("adapter.dtensor", "sharded tensors are mapped without gathering them", ranks=2)
def works_on_dtensors(subject: Subject) -> str:
    init_distributed(timeout_seconds=_PATIENCE)
    model = subject.spec.meta_model(subject.args)
    state = distinct_state(model)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    for dim in (0, 1):
        adapter = adapter_of(subject)
        sharded = {
            name: distribute_tensor(tensor, mesh, [Shard(dim if tensor.ndim > dim else 0)])
            if tensor.ndim
            else tensor
            for name, tensor in state.items()
        }
        what = f"of tensors sharded over dimension {dim}, from_hf(to_hf(state))"
        hf: State = {}
        for layer in by_layer(sharded).values():  # as runs do
            to_hf = partial(convert_sharded, adapter.to_hf)
            hf |= _convert(to_hf, layer, f"with DTensors of Shard({dim}), to_hf")
        held, given = _local_bytes(hf), _local_bytes(sharded)
        if held > 1.25 * given:
            raise CheckFailedError(
                f"to_hf() of DTensors gives {held:,} bytes on a rank that holds {given:,}",
                f"{_HINT}no full_tensor(): sharded models are saved without a full copy.",
            )
        from_hf = partial(convert_sharded, adapter.from_hf)
        back = _convert(from_hf, hf, f"with DTensors of Shard({dim}), from_hf")
        plain = [
            name
            for name, tensor in back.items()
            if isinstance(sharded[name], DTensor) and not isinstance(tensor, DTensor)
        ]
        if plain:
            raise CheckFailedError(
                f"{what} has {few(plain, 5)} as plain tensors",
                f"{_HINT}use operations that DTensors support, not .data, .numpy() or to_local().",
            )
        full = {name: whole_tensor(tensor) for name, tensor in back.items()}
        _compare(full, state, buffer_names([model]), what)
    return "2 ranks, Shard(0) and Shard(1)"


def _local_bytes(state: State) -> int:
    locals_ = {id(t): local_tensor(t) for t in state.values()}
    return sum(tensor.nbytes for tensor in locals_.values())
