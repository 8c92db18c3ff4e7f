"""What a config asks of a model is refused where the model's TrainSpec has no such part."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from torchtitan.config import JobConfig, load_config
from torchtitan.errors import ConfigError
from torchtitan.models.llama3 import Llama3ModelArgs
from torchtitan.preflight.model_fit import check_builders, check_vocabulary, fitting_model
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


def test_special_tokens_alone_may_be_beyond_the_vocabulary(config, caplog):
    def leave_out(size):
        return ["<image>"] if size == 9 else None

    config.model.tokenizer_path = "folder"
    tokenizer = SimpleNamespace(vocab_size=10, leave_out=leave_out)
    check_vocabulary(tokenizer, SimpleNamespace(vocab_size=10), config)
    assert not caplog.records
    check_vocabulary(tokenizer, SimpleNamespace(vocab_size=9), config)
    assert "tokenizer folder has special tokens" in caplog.text and "9: <image>." in caplog.text
    with pytest.raises(
        ConfigError,
        match=r"10 tokens, but the vocabulary of llama3 .* only 8.*new my_model --like llama3",
    ):
        check_vocabulary(tokenizer, SimpleNamespace(vocab_size=8), config)
    del tokenizer.leave_out
    with pytest.raises(ConfigError, match="the tokenizer has 10 tokens"):
        check_vocabulary(tokenizer, SimpleNamespace(vocab_size=9), config)
