"""What a config asks of a model is refused where the model's TrainSpec has no such part."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.config.optimizer import ParamRule
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.errors import ConfigError
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.llama3 import Llama3ModelArgs
from torchtitan.planning.trace import meta_model
from torchtitan.preflight.model_fit import (
    check_builders,
    check_length,
    check_vocabulary,
    fitting_model,
    log_model,
)
from torchtitan.protocols.train_spec import get_train_spec


@pytest.fixture
def config() -> JobConfig:
    config = JobConfig()
    config.model.name, config.model.flavor = "llama3", "debugmodel"
    return config


def test_a_pipeline_needs_a_pipeline_fn(config):
    spec = replace(get_train_spec("llama3", "debugmodel"), pipeline_fn=None)
    check_builders(spec, config)
    config.parallelism.pipeline_parallel_degree = 2
    with pytest.raises(ConfigError, match=r"pipeline_parallel_degree.*llama3 has no pipeline_fn"):
        check_builders(spec, config)


def test_validation_needs_a_tokenizer_or_a_validator(config):
    spec = replace(get_train_spec("llama3", "debugmodel"), build_tokenizer_fn=None)
    check_builders(spec, config)
    config.validation.enable = True
    with pytest.raises(ConfigError, match=r"validation.enable.*neither build_tokenizer_fn"):
        check_builders(spec, config)
    check_builders(replace(spec, build_validator_fn=lambda *_: None), config)


def test_args_that_are_updated_in_place_are_refused(monkeypatch):
    monkeypatch.setattr(Llama3ModelArgs, "update_from_config", lambda self, job_config: None)
    with pytest.raises(ConfigError, match=r"Llama3ModelArgs\.update_from_config returns None"):
        fitting_model(load_config([]), 1)


def test_the_log_tells_how_many_parameters_are_trained(config, caplog):
    caplog.set_level("INFO")
    dims = ParallelDims.from_config(config.parallelism, 1)
    config.optimizer.rules = [ParamRule("tok_embeddings", lr_scale=0.0)]
    log_model(meta_model(config, None), config, dims)
    assert "3,283,200 parameters, of which 3,215,616 are trained, on 1 rank" in caplog.text


def test_special_tokens_alone_may_be_beyond_the_vocabulary(config, caplog):
    def leave_out(size):
        return ["<image>"] if size == 9 else None

    tokenizer = SimpleNamespace(vocab_size=10, leave_out=leave_out)
    check_vocabulary(tokenizer, SimpleNamespace(vocab_size=10), config)
    assert not caplog.records
    check_vocabulary(tokenizer, SimpleNamespace(vocab_size=9), config)
    assert (
        "tokenizer SimpleNamespace has special tokens" in caplog.text
        and "9: <image>." in caplog.text
    )
    with pytest.raises(
        ConfigError,
        match=r"10 tokens, but the vocabulary of llama3 .* only 8.*args.vocab_size = 10 or more",
    ):
        check_vocabulary(tokenizer, SimpleNamespace(vocab_size=8), config)
    del tokenizer.leave_out
    with pytest.raises(ConfigError, match="the tokenizer has 10 tokens"):
        check_vocabulary(tokenizer, SimpleNamespace(vocab_size=9), config)


def test_sequences_longer_than_the_table_of_positions_are_refused(config):
    spec, args = get_train_spec("llama3", "debugmodel"), SimpleNamespace(max_seq_len=64)
    config.training.seq_len = 64
    check_length(spec, args, config)
    config.validation.seq_len = 65  # of no effect
    check_length(spec, args, config)
    config.validation.enable = True
    with pytest.raises(ConfigError, match=r"validation.seq_len = 65: llama3 debugmodel .* 64 tok"):
        check_length(spec, args, config)
    config.training.seq_len = 65
    check_length(replace(spec, build_tokenizer_fn=None), args, config)  # of no text


@dataclass
class ShortArgs(Llama3ModelArgs):
    max_seq_len: int = 64


def test_neither_a_run_nor_a_plan_takes_such_sequences(monkeypatch):
    spec = replace(get_train_spec("llama3", "debugmodel"), model_args=ShortArgs(dim=64, n_layers=2))
    monkeypatch.setitem(MODEL_REGISTRY, "short", lambda flavor: spec)
    config = load_config(["--model.name=short", "--training.seq_len=65"])
    for refuse in (lambda: fitting_model(config, 1), lambda: meta_model(config)):
        with pytest.raises(ConfigError, match=r"training.seq_len = 65: short debugmodel .* 64"):
            refuse()
