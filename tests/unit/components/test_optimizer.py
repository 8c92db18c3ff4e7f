from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.components import optimizer
from torchtitan.components.muon import Muon
from torchtitan.components.optimizer import (
    OPTIMIZERS,
    OptimizersContainer,
    build_optimizer,
    check_rules,
    container_of,
    freeze,
    param_groups,
    register_optimizer,
    warn_of_low_precision,
)
from torchtitan.components.unsaved_state import check_optimizer_state
from torchtitan.config import JobConfig
from torchtitan.config.optimizer import ParamRule
from torchtitan.errors import ConfigError
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.runtime.fake_world import fake_world


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tok_embeddings = nn.Embedding(16, 8)
        self.layers = nn.ModuleDict({"hidden": nn.Linear(8, 8)})
        self.norm = nn.RMSNorm(8)
        self.output = nn.Linear(8, 16, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.norm(self.layers.hidden(self.tok_embeddings(tokens))))


def build(model: nn.Module, name: str = "AdamW", **options) -> OptimizersContainer:
    config = JobConfig()
    config.optimizer.name = name
    for key, value in options.items():
        setattr(config.optimizer, key, value)
    freeze(model, config)
    return build_optimizer([model], config, None)


def train(model: nn.Module, optimizers: OptimizersContainer, steps: int) -> None:
    for step in range(steps):
        tokens = (torch.arange(12).view(2, 6) * (step + 3)) % 16
        optimizers.zero_grad()
        model(tokens).square().mean().backward()
        optimizers.step()


def groups_of(optimizers: OptimizersContainer) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def setting(model: nn.Module, optimizers: OptimizersContainer, key: str) -> dict[str, float]:
    names = {id(param): name for name, param in model.named_parameters()}
    groups = groups_of(optimizers)
    return {names[id(p)]: group[key] for group in groups for p in group["params"]}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_resumed_optimizer_goes_on_bit_by_bit(
    name: str, implementation: str, state_dtype: str
) -> None:
    model = Model()
    options = {"implementation": implementation, "state_dtype": state_dtype}
    optimizers = build(model, name, **options)
    train(model, optimizers, 3)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in optimizers.state_dict().items()
    }
    train(model, optimizers, 3)

    resumed = Model()
    resumed.load_state_dict(weights)
    resumed_optimizers = build(resumed, name, **options)
    resumed_optimizers.load_state_dict(state)
    train(resumed, resumed_optimizers, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_resumed_optimizer_has_the_settings_of_the_config(name: str, state_dtype: str) -> None:
    model = Model()
    optimizers = build(model, name, weight_decay=0.1, no_decay=["embedding"])
    train(model, optimizers, 1)
    state = optimizers.state_dict()

    resumed = Model()
    changed = {"weight_decay": 0.01, "no_decay": ["norm"], "momentum": 0.5, "beta2": 0.99}
    changed |= {"implementation": "for-loop", "state_dtype": state_dtype}
    fresh = build(resumed, name, **changed)
    expected = [
        {key: value for key, value in group.items() if key not in ("params", "lr")}
        for optimizer in fresh
        for group in optimizer.param_groups
    ]
    held = groups_of(fresh)  # as a schedule may hold them
    fresh.load_state_dict(state)
    assert all(old is new for old, new in zip(held, groups_of(fresh), strict=True))
    groups = groups_of(fresh)
    assert [
        {key: group[key] for key in own} for group, own in zip(groups, expected, strict=True)
    ] == expected
    decay = setting(resumed, fresh, "weight_decay")
    assert (decay["tok_embeddings.weight"], decay["norm.weight"]) == (0.01, 0.0)
    states = [optimizer.state[p] for optimizer in fresh for p in optimizer.state]
    assert states and all(any(v is not None for v in s.values()) for s in states)


def test_implementations_agree() -> None:
    results = []
    for implementation in ("fused", "foreach", "for-loop"):
        model = Model()
        train(model, build(model, implementation=implementation), 5)
        results.append(model.layers.hidden.weight)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_the_options_of_the_config_reach_pytorch() -> None:
    options = {"beta1": 0.7, "beta2": 0.8, "eps": 1e-5, "momentum": 0.6}
    for name in ("Adam", "AdamW"):
        for implementation in ("fused", "foreach", "for-loop"):
            (adam,) = build(Model(), name, **options, implementation=implementation)
            found = adam.defaults
            assert (found["betas"], found["eps"]) == ((0.7, 0.8), 1e-5)
            kernels = {kernel for kernel in ("fused", "foreach") if found[kernel]}
            assert kernels == {implementation} - {"for-loop"}
    for implementation in ("fused", "foreach", "for-loop"):
        (sgd,) = build(Model(), "SGD", implementation=implementation)
        assert sgd.defaults["foreach"] == (implementation != "for-loop")
    (sgd,), (muon, adamw) = (build(Model(), name, **options) for name in ("SGD", "Muon"))
    assert sgd.defaults["momentum"] == muon.defaults["momentum"] == 0.6
    assert adamw.defaults["betas"] == (0.7, 0.8)


def test_no_decay_spares_the_kinds_asked_for() -> None:
    model = Model()
    model.layers.hidden.expert_bias = nn.Parameter(torch.zeros(3, 8))
    model.layers.hidden.sinks = nn.Parameter(torch.zeros(8))
    decay = setting(model, build(model, no_decay=["norm", "bias", "embedding"]), "weight_decay")
    assert decay == {
        "tok_embeddings.weight": 0.0,
        "layers.hidden.weight": 0.1,
        "layers.hidden.bias": 0.0,
        "layers.hidden.expert_bias": 0.0,
        "layers.hidden.sinks": 0.0,
        "norm.weight": 0.0,
        "output.weight": 0.1,
    }


def test_muon_takes_the_hidden_matrices_alone() -> None:
    model = Model()
    muon, adamw = build(model, "Muon")
    assert isinstance(muon, Muon)
    (matrix,) = (param for group in muon.param_groups for param in group["params"])
    assert matrix is model.layers.hidden.weight
    assert sum(len(group["params"]) for group in adamw.param_groups) == 4


def test_muon_leaves_what_is_outside_of_the_blocks_to_adamw() -> None:
    """By whatever name: a table of positions, a projection of patches, a head."""
    model = Model()
    model.positions = nn.Parameter(torch.zeros(6, 8))
    model.patches, model.head = nn.Linear(8, 8), model.output
    del model.output
    model.tower = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(2)))
    lr = setting(model, build(model, "Muon", lr=0.1, muon_lr=0.2), "lr")
    assert {name for name, rate in lr.items() if rate == 0.2} == {
        "layers.hidden.weight",
        "tower.0.0.weight",
        "tower.1.0.weight",
    }


def test_muon_has_a_weight_decay_of_its_own() -> None:
    """As it has a learning rate, 25 times AdamW's: together, they shrink weights in each step."""
    model = Model()
    options = {"weight_decay": 0.3, "muon_weight_decay": 0.2}
    decay = setting(model, build(model, "Muon", **options), "weight_decay")
    assert decay.pop("layers.hidden.weight") == 0.2 and set(decay.values()) == {0.3}
    assert set(setting(model, build(model, **options), "weight_decay").values()) == {0.3}
    rules = [ParamRule("hidden", weight_decay=0.1)]
    decay = setting(model, build(model, "Muon", **options, rules=rules), "weight_decay")
    assert decay["layers.hidden.weight"] == decay["layers.hidden.bias"] == 0.1


@pytest.mark.parametrize("hidden", [True, False])
def test_muon_may_have_no_matrix_or_nothing_else(hidden: bool) -> None:
    """As in a stage of a pipeline, or if all others are frozen."""
    frozen = "^(?!layers.hidden.weight)" if hidden else "hidden.weight"
    (only,) = build(Model(), "Muon", rules=[ParamRule(frozen, lr_scale=0.0)])
    assert isinstance(only, Muon) == hidden


def test_muon_leaves_stacked_matrices_to_adamw() -> None:
    model = Model()
    model.experts = nn.ParameterList([nn.Parameter(torch.zeros(3, 8, 8))])
    muon, adamw = build(model, "Muon")
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    assert any(p.ndim == 3 for group in adamw.param_groups for p in group["params"])


def test_muon_takes_stacks_that_a_module_declares() -> None:
    model = Model()
    model.layers.hidden.experts = GroupedExperts(2, 8, 16)
    muon, _ = build(model, "Muon")
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    experts = {f"layers.hidden.experts.{name}" for name in ("w1", "w2", "w3")}
    assert names == {"layers.hidden.weight"} | experts


def test_it_is_told_if_muon_leaves_most_of_the_model_to_adamw(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As of gpt-oss, whose experts `optimizer.lr` then trains."""
    model = Model()
    model.layers.hidden.conv = nn.Parameter(torch.zeros(8, 1, 4))  # smaller than the matrix
    build(model, "Muon")
    assert not caplog.text
    model.layers.hidden.w1 = nn.Parameter(torch.zeros(3, 8, 8))
    build(model, "AdamW")
    assert not caplog.text
    build(model, "Muon")
    assert "78% of the blocks' weights are others" in caplog.text
    assert "optimizer.lr: layers.hidden.conv, layers.hidden.w1" in caplog.text


def test_a_rule_names_a_parameter_as_checkpoints_do() -> None:
    model = Model()
    model.layers.hidden = checkpoint_wrapper(model.layers.hidden)
    lr = setting(model, build(model, lr=1.0, rules=[ParamRule("^layers.hidden.w", 0.5)]), "lr")
    assert [name for name, rate in lr.items() if rate == 0.5] == [
        "layers.hidden._checkpoint_wrapped_module.weight"
    ]


def test_the_state_is_that_of_all_parts() -> None:
    first, last = Model(), Model()
    first.output = last.tok_embeddings = last.norm = None
    last.layers = nn.ModuleDict()
    state = build_optimizer([first, last], JobConfig(), None).state_dict()
    names = [name for part in (first, last) for name, _ in part.named_parameters()]
    assert len(names) == 5 and all(f"state.{name}.exp_avg" in state for name in names)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("means", [torch.float32, torch.bfloat16])
def test_a_loaded_state_has_the_precision_of_the_optimizer(
    weights: torch.dtype, means: torch.dtype
) -> None:
    """PyTorch rounds it to that of the parameter."""

    class Mean(torch.optim.Optimizer):
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                mean = param.grad.float().add(1e-5).to(means)
                self.state[param] = {"mean": mean, "inner": {"mean": mean}, "step": 2**24 + 1}

    model = Model().to(weights)
    optimizer = Mean(model.parameters(), {"lr": 0.1})
    built = OptimizersContainer([(model, [optimizer])])
    train(model, built, 1)
    expected = copy.deepcopy(built.state_dict())
    built.load_state_dict(built.state_dict())
    for state in optimizer.state.values():
        assert state["mean"].dtype == state["inner"]["mean"].dtype == means
    loaded = built.state_dict()
    assert loaded.keys() == expected.keys() and len(loaded) > 10
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(loaded[name]), torch.as_tensor(value)), name


def test_no_gradient_takes_memory_between_steps() -> None:
    model = Model()
    optimizers = build(model, "Muon")
    train(model, optimizers, 1)
    optimizers.zero_grad()
    assert all(param.grad is None for param in model.parameters())


def test_the_last_matching_rule_wins_and_zero_freezes() -> None:
    model = Model()
    rules = [
        ParamRule("hidden", lr_scale=0.5, weight_decay=0.0),
        ParamRule(r"hidden\.bias", lr_scale=0.25),
        ParamRule("norm", lr_scale=0.0),
    ]
    optimizers = build(model, lr=1.0, rules=rules)
    lr, decay = (setting(model, optimizers, key) for key in ("lr", "weight_decay"))
    assert (lr["layers.hidden.weight"], lr["layers.hidden.bias"], lr["output.weight"]) == (
        0.5,
        0.25,
        1.0,
    )
    assert (decay["layers.hidden.weight"], decay["output.weight"]) == (0.0, 0.1)
    train(model, optimizers, 2)
    assert torch.equal(model.norm.weight, torch.ones(8))


def test_a_rule_leaves_what_it_does_not_set_to_the_rules_before() -> None:
    model = Model()
    rules = [
        ParamRule("tok_embeddings|norm", lr_scale=0.0),
        ParamRule("norm|bias", weight_decay=0.0),
        ParamRule("hidden", weight_decay=0.3),
        ParamRule(r"hidden\.weight", lr_scale=0.5),
    ]
    optimizers = build(model, lr=1.0, rules=rules)
    assert not model.norm.weight.requires_grad
    lr, decay = (setting(model, optimizers, key) for key in ("lr", "weight_decay"))
    assert (lr["layers.hidden.weight"], lr["layers.hidden.bias"]) == (0.5, 1.0)
    assert (decay["layers.hidden.weight"], decay["layers.hidden.bias"]) == (0.3, 0.3)


def test_what_a_model_freezes_itself_stays_frozen() -> None:
    model = Model()
    model.norm.weight.requires_grad_(False)
    before = model.norm.weight.clone()
    train(model, build(model), steps=2)
    assert not model.norm.weight.requires_grad
    assert torch.equal(model.norm.weight, before)


def test_a_rule_that_matches_nothing_is_an_error() -> None:
    config = JobConfig()
    config.optimizer.rules = [ParamRule("hidden"), ParamRule("hiden")]
    with pytest.raises(ConfigError, match=r"optimizer\.rules\.1: pattern 'hiden'.*hidden"):
        check_rules(Model(), config)


def test_a_model_that_is_frozen_whole_is_an_error() -> None:
    config = JobConfig()
    config.optimizer.rules = [ParamRule("^(?!norm)", lr_scale=0.0)]
    model = Model()
    check_rules(model, config)
    model.norm.requires_grad_(False)
    with pytest.raises(ConfigError, match="freezes every parameter of the model"):
        check_rules(model, config)


def test_a_part_of_a_model_need_not_have_what_a_rule_is_for() -> None:
    part = Model()
    part.tok_embeddings = None
    rules = [ParamRule("tok_embeddings", lr_scale=0.5), ParamRule("hidden", lr_scale=0.25)]
    lr = setting(part, build(part, lr=1.0, rules=rules), "lr")
    assert (lr["layers.hidden.weight"], lr["output.weight"]) == (0.25, 1.0)


def test_a_tied_weight_is_one_parameter() -> None:
    model = Model()
    model.output.weight = model.tok_embeddings.weight
    decay = setting(model, build(model, no_decay=["embedding"]), "weight_decay")
    assert len(decay) == 4 and decay["tok_embeddings.weight"] == 0


def test_an_optimizer_of_an_author_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "OPTIMIZERS", dict(OPTIMIZERS))

    def build_sgd(params, config):
        return [torch.optim.SGD(param_groups(params, config.lr), lr=config.lr)]

    for _ in range(2):
        register_optimizer("Mine", build_sgd)
    with pytest.raises(ValueError, match="'AdamW' is already registered"):
        register_optimizer("AdamW", build_sgd)
    model, rules = Model(), [ParamRule("hidden", lr_scale=0.0), ParamRule("norm", lr_scale=0.5)]
    rates = setting(model, build(model, "Mine", lr=0.2, rules=rules), "lr")
    assert rates["norm.weight"] == 0.1 and rates["output.weight"] == 0.2
    assert "layers.hidden.weight" not in rates


def test_a_plain_optimizer_of_one_part_is_enough() -> None:
    model = Model()
    built = container_of(torch.optim.SGD(model.parameters(), lr=0.1), [model], JobConfig())
    train(model, built, 1)
    assert built.state_dict()["param_groups.norm.weight.lr"] == 0.1


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_no_optimizer_is_refused_with_what_is_one(parts: int) -> None:
    """Of several parts, one optimizer cannot tell which names its parameters have."""
    models = [Model() for _ in range(parts)]
    params = [p for model in models for p in model.parameters()]
    built = torch.optim.SGD(params, lr=0.1) if parts == 2 else object()
    message = r"^build_optimizer_fn of llama3 returns (SGD|object), which has no __iter__.* Return "
    with pytest.raises(ConfigError, match=message):
        container_of(built, models, JobConfig())


def test_a_group_has_the_parameters_of_one_mesh() -> None:
    """As those of experts have another, and the fused kernel takes one."""
    model = Model()
    with fake_world(2, 0):
        for module, name in ((model.layers.hidden, "dp"), (model.output, "ep")):
            mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
            local = module.weight.detach()
            weight = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
            module.weight = nn.Parameter(weight)
        groups = [group["params"] for optimizer in build(model) for group in optimizer.param_groups]
    meshes = [{getattr(param, "device_mesh", None) for param in params} for params in groups]
    assert all(len(of_group) == 1 for of_group in meshes) and len(set.union(*meshes)) == 3


class Own(torch.optim.Optimizer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})


class NeedsAClosure(Own):
    def step(self, closure):  # type: ignore[override]
        closure()


class TakesNone(Own):
    def step(self):  # type: ignore[override]
        pass


@pytest.mark.parametrize("cls", [NeedsAClosure, TakesNone])
def test_an_optimizer_is_called_with_and_without_a_closure_of_none(cls: type[Own]) -> None:
    model = Model()
    with pytest.raises(ConfigError, match=rf"^{cls.__name__}.step\(.* must be step\(self, closure"):
        container_of(cls(model), [model], JobConfig())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"slow": [torch.zeros(2)]}, "'slow' of norm.weight as list, but checkpoints hold"),
        ({"old": {"mean": None}}, "'old.mean' of norm.weight as NoneType"),
        ({"parts": {0: torch.zeros(2)}}, "'parts' of norm.weight as dict, .* strings as keys"),
        (None, r"state\['step'\], which is of no parameter"),
    ],
)
def test_state_that_a_checkpoint_cannot_hold_is_refused(state: dict | None, message: str) -> None:
    model = Model()
    own = Own(model)
    own.state["step" if state is None else model.norm.weight] = state or {}  # type: ignore[index]
    with pytest.raises(ConfigError, match=f"^Own keeps {message}"):
        check_optimizer_state([own], [model])


def test_weights_of_low_precision_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    model.layers.hidden.bfloat16().requires_grad_(False)  # as of a frozen teacher
    warn_of_low_precision(model)
    assert not caplog.text
    model.norm.bfloat16()
    warn_of_low_precision(model)
    assert "weights of torch.bfloat16, and so their optimizer state" in caplog.text
