"""What a data loader lacks is said at once, in one message."""

import errno
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

from torchtitan.components.data_loader import check_dataloader, next_batch
from torchtitan.components.model_inputs import ModelInputs, pinned
from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError, ContextParallelError, DataError, OutageError

TOKENS = torch.zeros(2, 4, dtype=torch.int64)
LONGER = torch.zeros(3, 6, dtype=torch.int64)
VALIDATED = "checked_for_validation"


@pytest.fixture
def config() -> JobConfig:
    config = JobConfig()
    config.model.name = "mine"
    config.checkpoint.enable = True
    return config


class Loader:
    def __init__(self, state: Any = None) -> None:
        self.state = {"rows": torch.tensor([[0]])} if state is None else state

    def __next__(self) -> dict[str, torch.Tensor]:
        return {"tokens": TOKENS, "labels": TOKENS}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_loader_with_everything_is_accepted(config):
    check_dataloader(Loader(), config)
    assert inputs(config).checked(next(Loader()))["tokens"] is TOKENS


def test_batches_grow_only_if_the_loader_says_so(config):
    config.training.global_batch_size = 4 * config.training.local_batch_size
    config.training.batch_size_ramp = [f"{config.training.local_batch_size}:5"]
    with pytest.raises(ConfigError, match=r"ramp: build_dataloader_fn of .* takes_ramp = True"):
        check_dataloader(Loader(), config)
    loader = Loader()
    loader.takes_ramp = True
    check_dataloader(loader, config)


def test_what_is_missing_is_named_at_once(config):
    loader = torch.utils.data.DataLoader([1, 2])
    with pytest.raises(ConfigError, match=r"build_dataloader_fn of mine returns DataLoader, "):
        check_dataloader(loader, config)
    with pytest.raises(ConfigError, match="has no __next__, close, state_dict, load_state_dict"):
        check_dataloader(loader, config)


def test_a_state_is_asked_for_where_there_are_checkpoints(config):
    bare = type("Bare", (), {"__next__": lambda self: {}, "close": lambda self: None})()
    with pytest.raises(ConfigError, match="Bare, which has no state_dict, load_state_dict"):
        check_dataloader(bare, config)
    config.checkpoint.enable = False
    check_dataloader(bare, config)
    config.checkpoint.initial_load_model_only = False
    with pytest.raises(ConfigError, match="Bare, which has no state_dict, load_state_dict"):
        check_dataloader(bare, config)
    with pytest.raises(ConfigError, match="SimpleNamespace, which has no __next__"):
        check_dataloader(SimpleNamespace(close=lambda: None), config)


@pytest.mark.parametrize(
    ("state", "found"),
    [
        ({"step": 3}, "has 'step'"),
        ({"rows": 3}, "has 'rows'"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows of torch.int64 \[3\]"),
        ({"rows": torch.zeros(3, 1)}, r"rows of torch.float32 \[3, 1\]"),
    ],
)
def test_a_state_is_rows(config, state, found):
    with pytest.raises(ConfigError, match=f"{found}.*must be .*int64 tensor"):
        check_dataloader(Loader(state), config)


def test_a_loader_that_ends_is_a_mistake_that_names_the_step(config):
    loader = iter([{"tokens": TOKENS, "labels": TOKENS}])
    config.training.steps = 9
    assert next_batch(loader, config, 1)["tokens"] is TOKENS
    with pytest.raises(DataError, match="_fn of mine: the loader ended in step 2 of 9") as end:
        next_batch(loader, config, 2)
    assert end.value.exit_code == 2


class Failing:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __next__(self) -> dict[str, torch.Tensor]:
        raise self.error


@pytest.mark.parametrize(
    "error", [ConnectionResetError("peer"), TimeoutError("late"), OSError(errno.EIO, "I/O error")]
)
def test_an_outage_of_an_own_loader_is_told_as_one(config, error, caplog):
    with pytest.raises(OutageError, match=f"of mine: {type(error).__name__}: .* This may") as told:
        next_batch(Failing(error), config, 1)
    assert told.value.exit_code == 1
    assert "in __next__" in caplog.text  # where it was raised


@pytest.mark.parametrize(
    "error",
    [
        *(FileNotFoundError(errno.ENOENT, "none"), PermissionError(errno.EACCES, "not for you")),
        *(OSError(errno.ENOSPC, "full"), OSError("of a file"), ValueError("a bug")),
        DataError("a mistake"),
    ],
)
def test_other_errors_of_an_own_loader_stay_as_they_are(config, error):
    with pytest.raises(type(error)) as raised:
        next_batch(Failing(error), config, 1)
    assert raised.value is error


class Model(nn.Module):
    def forward(self, x: torch.Tensor, *, times: torch.Tensor | None = None) -> torch.Tensor:
        return x


class Needy(nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        times: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return x


class ByName(nn.Module):
    def forward(self, *, tokens: torch.Tensor) -> torch.Tensor:
        return tokens


class Causal(nn.Module):
    def forward(self, x: torch.Tensor, *, positions: torch.Tensor | None = None) -> torch.Tensor:
        return x


def inputs(config: JobConfig, model: nn.Module | None = None, **degrees: int) -> ModelInputs:
    config.training.local_batch_size, config.training.seq_len = TOKENS.shape
    dims = ParallelDims(world_size=max(degrees.values(), default=1), **degrees)
    return ModelInputs(model or Model(), dims, config, vocab_size=100)


def test_tokens_are_given_by_position(config):
    """Else the first step failed with Python's TypeError."""
    with pytest.raises(ConfigError, match=r"ByName.forward\(\) must take the tokens as its first"):
        inputs(config, ByName())


def test_a_batch_has_tokens_and_labels_and_nothing_that_nobody_reads(config):
    checked = inputs(config).checked
    with pytest.raises(ConfigError, match="a batch of the loader has 'input' but no 'tokens', 'la"):
        checked({"input": TOKENS})
    with pytest.raises(ConfigError, match=r"of mine: a batch of the loader has 'noise', which for"):
        checked({"tokens": TOKENS, "labels": TOKENS, "noise": TOKENS})
    with pytest.raises(ConfigError, match=r"it takes 'times' from a loader"):
        checked({"tokens": TOKENS, "labels": TOKENS, "noise": TOKENS})
    with pytest.raises(ConfigError, match="is tuple, not a dict"):
        checked((TOKENS, TOKENS))
    batch = {
        "tokens": torch.zeros(2, 3, 8, 8),
        "labels": torch.zeros(2, 4, 5),
        "times": TOKENS[:, 0],
    }
    assert checked(batch) is batch


class TakesAny(nn.Module):
    sequence_inputs = ("noise",)

    def forward(self, x, **inputs):
        return x


@pytest.mark.parametrize("name", ["target", "losses", "return_outputs"])
def test_an_input_has_no_name_that_pipelines_have(config, name):
    checked = inputs(config, TakesAny()).checked
    with pytest.raises(ConfigError, match=f"of mine: .* has '{name}', but .*Choose another name"):
        checked({"tokens": TOKENS, "labels": TOKENS, name: TOKENS})
    batch = {"tokens": TOKENS, "labels": TOKENS, "noise": TOKENS}
    assert checked(batch) is batch


def test_positions_that_would_be_replaced_are_refused(config):
    batch = {"tokens": TOKENS, "labels": TOKENS, "times": TOKENS[:, 0], "positions": TOKENS}
    with pytest.raises(ConfigError, match=r"of mine: .* 'positions' without .*document_mask, or"):
        inputs(config, Needy()).checked(batch)
    # Packed documents may be trained on without a mask, as with the library's loader.
    packed = batch | {"document_ids": TOKENS}
    assert inputs(config, Needy()).checked(packed) is packed
    config.training.document_mask = True
    assert inputs(config, Needy()).checked(packed) is packed


def test_tokens_are_counted_by_the_config_so_labels_have_its_sizes(config):
    checked = inputs(config).checked
    with pytest.raises(ConfigError, match=r"labels of shape \[2, 3\]. It must begin with \[2, 4\]"):
        checked({"tokens": TOKENS, "labels": TOKENS[:, :3]})
    with pytest.raises(ConfigError, match=r"labels of shape \[1, 4\]"):
        checked({"tokens": TOKENS, "labels": TOKENS[:1]})
    with pytest.raises(ConfigError, match=r"'times' of shape \[3\], whose first dimension"):
        checked({"tokens": TOKENS, "labels": TOKENS, "times": torch.zeros(3)})


def test_what_forward_needs_is_in_a_batch(config):
    batch = {"tokens": TOKENS, "labels": TOKENS, "times": TOKENS[:, 0]}
    assert inputs(config, Needy()).checked(batch) is batch
    with pytest.raises(ConfigError, match=r"but no 'times', which forward\(\) of mine needs"):
        inputs(config, Needy()).checked({"tokens": TOKENS, "labels": TOKENS})
    config.training.document_mask = True
    with pytest.raises(ConfigError, match="but no 'positions', 'document_ids', which forward"):
        inputs(config, Needy()).checked(batch)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"times": [1, 2]}, "'times' of list, which must be a torch.Tensor"),
        ({"tokens": TOKENS.numpy()}, "'tokens' of ndarray, which must be a torch.Tensor"),
        ({"labels": TOKENS.int()}, "'labels' of torch.int32, which must be torch.int64"),
        ({"tokens": TOKENS.to(torch.uint8)}, "'tokens' of torch.uint8, which must be torch.int64"),
    ],
)
def test_a_batch_has_tensors_and_ids_are_int64(config, wrong, found):
    with pytest.raises(ConfigError, match=f"of mine: a batch of the loader has {found}"):
        inputs(config).checked({"tokens": TOKENS, "labels": TOKENS, **wrong})


@pytest.mark.parametrize(("check", "who"), [("checked", "loader"), (VALIDATED, "validator")])
@pytest.mark.parametrize("token", [-1, 100])
def test_a_token_is_in_the_vocabulary(config, check, who, token):
    check = getattr(inputs(config), check)
    config.model.flavor = "1B"
    tokens = TOKENS.clone()
    tokens[1, 2] = token
    batch = {"tokens": tokens, "labels": TOKENS}
    with pytest.raises(ConfigError, match=f"{who} has the token {token}, but the vocab_size of mi"):
        check(batch)
    codes = {"tokens": tokens.float(), "labels": TOKENS}
    assert check(codes) is codes
    assert check({"tokens": TOKENS + 99, "labels": TOKENS})


def test_only_ids_of_a_known_vocabulary_on_the_host_are_looked_at(config):
    config.training.mixed_precision_param = "bfloat16"
    times = torch.tensor([0.5, 0.999])
    on_device = {"tokens": TOKENS, "labels": TOKENS, "times": times}
    on_device = {name: tensor.to("meta") for name, tensor in on_device.items()}
    patches = {"tokens": (TOKENS + 200)[..., None], "labels": TOKENS}
    no_text = {"tokens": TOKENS[:, :0], "labels": TOKENS}
    numbers = {"tokens": TOKENS, "labels": TOKENS.float() - 1}
    for batch in on_device, patches, no_text, numbers:
        assert inputs(config).checked(batch) is batch
    unknown = {"tokens": TOKENS + 200, "labels": TOKENS}
    dims = ParallelDims(world_size=1)
    assert ModelInputs(Model(), dims, config).checked(unknown) is unknown


@pytest.mark.parametrize("check", ["checked", VALIDATED])
def test_a_label_of_a_token_is_an_id_or_ignored(config, check):
    check = getattr(inputs(config), check)
    with pytest.raises(ConfigError, match=r"has the label -1\. Labels are .*IGNORE_INDEX \(-100\)"):
        check({"tokens": TOKENS, "labels": TOKENS - 1})
    assert check({"tokens": TOKENS, "labels": TOKENS - 100})
    assert check({"tokens": TOKENS, "labels": (TOKENS - 1)[..., None]})  # other things than tokens


def test_a_label_is_a_class_of_the_output_layer_if_there_is_one(config):
    """A model may predict more than it reads, and have a head of another name."""
    assert inputs(config).checked({"tokens": TOKENS, "labels": TOKENS + 1000})
    model = Model()
    model.output = nn.Linear(4, 1000)
    check = inputs(config, model).checked
    assert check({"tokens": TOKENS, "labels": TOKENS + 999})
    with pytest.raises(ConfigError, match=r"has the label 1000\. .* from 0 to 999"):
        check({"tokens": TOKENS, "labels": TOKENS + 1000})


def test_a_validator_may_have_other_sizes(config):
    checked = getattr(inputs(config), VALIDATED)
    batch = {"tokens": LONGER, "labels": LONGER, "times": LONGER[:, 0]}
    assert checked(batch) is batch
    name = "build_validator_fn of mine: a batch of the validator"
    with pytest.raises(ConfigError, match=f"{name} has 'times' of shape .* labels [(]3[)]"):
        checked(batch | {"times": TOKENS})
    with pytest.raises(
        ConfigError, match=f"{name} has labels of shape .3.. It must begin with the"
    ):
        checked({"tokens": LONGER, "labels": LONGER[:, 0]})
    with pytest.raises(ConfigError, match=f"{name} has 'noise', which forward"):
        checked(batch | {"noise": LONGER})
    with pytest.raises(ConfigError, match=f"{name} has 'tokens', 'times' but no 'labels'"):
        checked({"tokens": LONGER, "times": LONGER[:, 0]})


def test_a_layout_needs_sizes_of_a_validator(config):
    batch = {"tokens": LONGER, "labels": LONGER}
    pipeline = inputs(config, Causal(), pp=2)
    with pytest.raises(
        ConfigError, match=r"3 samples\. The pip.* validation\.local_batch_size, here 2"
    ):
        getattr(pipeline, VALIDATED)(batch)
    config.validation.local_batch_size = 3
    assert getattr(pipeline, VALIDATED)(batch) is batch
    context = inputs(config, Causal(), cp=2)
    with pytest.raises(
        ConfigError, match=r"sequences of length 6\. .* multiple of 4, .* \(2\) cuts them into"
    ):
        getattr(context, VALIDATED)(batch)


def test_context_parallelism_divides_patches_and_targets_with_weights(config):
    context = inputs(config, Causal(), cp=2)
    patches, weighted = TOKENS.float()[..., None], torch.stack([TOKENS, TOKENS], -1)
    for batch in ({"tokens": patches, "labels": TOKENS}, {"tokens": TOKENS, "labels": weighted}):
        assert context.checked(batch) is batch
    with pytest.raises(
        ContextParallelError, match=r"\[batch, seq, \.\.\.\], .* tokens \[2, 1, 4\]"
    ):
        context.checked({"tokens": TOKENS[:, None].float(), "labels": TOKENS})


def test_without_a_list_context_parallelism_divides_no_other_inputs(config):
    context = inputs(config, Needy(), cp=2)
    batch = {"tokens": TOKENS, "labels": TOKENS, "times": TOKENS[:, 0]}
    assert context.checked(batch) is batch
    with pytest.raises(ContextParallelError, match=r"must be \[batch\] if .* times \[2, 4\]"):
        context.checked(batch | {"times": TOKENS})


class Prompted(Causal):
    sequence_inputs = ("prompt",)

    def forward(self, x, *, prompt, pooled, positions=None):
        return x


def test_context_parallelism_divides_the_inputs_that_a_model_names(config):
    context = inputs(config, Prompted(), cp=2)
    batch = {"tokens": TOKENS, "labels": TOKENS, "pooled": TOKENS}
    batch["prompt"] = torch.arange(8).repeat(2, 1)
    assert context.checked(batch) is batch
    mesh = SimpleNamespace(get_local_rank=lambda: 1, size=lambda: 2)
    tokens, labels, others = context.on_device(batch, torch.device("cpu"), mesh)
    assert tokens.shape == labels.shape == (2, 2)
    assert others["prompt"].tolist() == [[2, 3, 4, 5]] * 2
    assert others["pooled"] is TOKENS
    for prompt in (torch.zeros(2, 6), torch.zeros(2)):
        with pytest.raises(
            ContextParallelError, match=r"'labels', 'prompt' \[.* into 4 chunks, but"
        ):
            context.checked(batch | {"prompt": prompt})
    Prompted.sequence_inputs = ("promt",)
    with pytest.raises(ConfigError, match=r"Prompted.sequence_inputs has 'promt',.* 'prompt'\?"):
        inputs(config, Prompted(), cp=2)


def test_a_batch_that_is_kept_can_be_given_again(config):
    context = inputs(config, Causal(), cp=2)
    batch = {"tokens": TOKENS, "labels": TOKENS}
    more = context.on_device(batch, torch.device("cpu"), None)[2]
    assert more["positions"].tolist() == [[0, 1, 2, 3]] * 2
    assert getattr(context, VALIDATED)(batch).keys() == {"tokens", "labels"}


def test_images_may_be_bytes(config):
    pixels = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    batch = {"tokens": pixels, "labels": torch.zeros(2, 4, 5), "times": pixels[:, 0, 0, 0]}
    assert inputs(config).checked(batch) is batch


def test_what_the_model_is_called_with(config):
    config.training.mixed_precision_param = "bfloat16"
    model_inputs = inputs(config)
    noise, times = torch.rand(2, 4, 1), torch.arange(2)
    batch = {"tokens": noise, "labels": noise, "times": times}
    tokens, labels, more = model_inputs.on_device(batch, torch.device("cpu"), None)
    assert tokens.dtype == torch.bfloat16 and labels is noise
    assert more.keys() == {"times"} and more["times"] is times
    more = model_inputs.on_device(batch | {"times": noise}, torch.device("cpu"), None)[2]
    assert torch.equal(more["times"], noise.bfloat16())


def test_a_number_of_each_sample_that_is_rounded_is_told_once(config, caplog):
    config.training.mixed_precision_param = "bfloat16"
    batch = {"tokens": TOKENS, "labels": TOKENS, "times": torch.tensor([0.5, 0.25])}
    model_inputs = inputs(config)
    model_inputs.checked(batch)
    model_inputs.checked(batch | {"times": torch.rand(2, 4)})  # not a number of each sample
    assert not caplog.records
    for _ in range(2):
        model_inputs.checked(batch | {"times": torch.tensor([0.5, 0.999])})
    (record,) = caplog.records
    assert "has 'times' of torch.float32, which forward() gets rounded" in record.getMessage()


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (TOKENS, [[0, 1, 2, 3]] * 2),
        (torch.zeros(2, 1, 3), [[0]] * 2),
        (torch.zeros(2, 4, 3), None),  # of images
        (torch.zeros(2, 2, 4, dtype=torch.int64), None),  # pairs of texts
    ],
)
def test_positions_are_those_of_tokens_also_if_a_sample_has_one_label(config, tokens, positions):
    batch = {"tokens": tokens, "labels": TOKENS[:, :1]}
    more = inputs(config, Causal(), pp=2).on_device(batch, torch.device("cpu"), None)[2]
    assert (more["positions"].tolist() if more else None) == positions


def test_only_what_is_on_the_host_is_pinned(monkeypatch):
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append(tensor) or tensor)
    elsewhere = torch.empty(2, device="meta")
    assert pinned(elsewhere) is elsewhere and not copies
    pinned(TOKENS.T)
    assert copies[0].is_contiguous()
