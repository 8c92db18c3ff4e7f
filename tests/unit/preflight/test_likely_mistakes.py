from __future__ import annotations

from torchtitan.config import JobConfig
from torchtitan.config.data import DataSource
from torchtitan.preflight.likely_mistakes import unlikely


def test_the_defaults_are_likely() -> None:
    config = JobConfig()
    config.validation.enable = True
    assert unlikely(config) == []


def test_a_warmup_that_reaches_the_last_step() -> None:
    config = JobConfig()
    config.lr_scheduler.warmup_steps, config.training.steps = 999, 1000
    assert unlikely(config) == []
    config.lr_scheduler.warmup_steps = 1000
    assert unlikely(config) == [
        "lr_scheduler.warmup_steps = 1000: the warm-up takes up the whole schedule "
        "(training.steps = 1000), so the learning rate only rises. Set fewer"
    ]
    config.training.steps = 49  # only tries something
    assert unlikely(config) == []
    config.lr_scheduler.total_steps = 5000
    assert unlikely(config) == []
    config.lr_scheduler.warmup_steps = 5000
    assert "(lr_scheduler.total_steps = 5000)" in unlikely(config)[0]


def test_a_ramp_that_reaches_the_last_step() -> None:
    config = JobConfig()
    config.training.global_batch_size, config.training.steps = 32, 1000
    config.training.batch_size_ramp = ["8:500", "16:999"]
    assert unlikely(config) == []
    config.training.batch_size_ramp = ["8:500", "16:1000"]
    assert unlikely(config) == [
        "training.batch_size_ramp: it lasts to step 1000, but the run has 1000, so none has "
        "training.global_batch_size (32) sequences. End it earlier"
    ]
    config.training.steps = 20  # only tries something
    assert unlikely(config) == []
    config.lr_scheduler.total_steps = 900
    assert "the run has 900" in unlikely(config)[0]


def test_validation_of_data_that_is_not_trained_on() -> None:
    config = JobConfig()
    config.training.dataset, config.training.dataset_path = "jsonl", "notes.jsonl"
    assert unlikely(config) == []
    config.validation.enable = True
    assert unlikely(config) == [
        "validation.dataset = 'stdlib_validation': validation reads Python's standard library, but "
        "training reads training.dataset = 'jsonl'. Set validation.dataset and "
        "validation.dataset_path"
    ]
    config.validation.dataset = "jsonl"
    assert unlikely(config) == []


def test_validation_of_data_that_no_source_of_a_mixture_has() -> None:
    config = JobConfig()
    config.validation.enable = True
    config.data.sources = [DataSource(dataset="text")]
    assert "but training reads data.sources" in unlikely(config)[0]
    config.data.sources.append(DataSource(dataset="stdlib"))
    assert unlikely(config) == []


def test_held_out_data_are_not_those_of_training() -> None:
    config = JobConfig()
    config.validation.enable = True
    config.validation.dataset, config.validation.dataset_path = "text", "notes.txt"
    assert unlikely(config) == []
    config.training.dataset, config.training.dataset_path = "text", "./notes.txt"
    (doubt,) = unlikely(config)
    assert "validation.dataset = 'text': validation reads the training data" in doubt
    config.data.sources = [DataSource(dataset="jsonl", dataset_path="a.jsonl")]
    assert unlikely(config) == []
    config.data.sources.append(DataSource("own", "text", "notes.txt"))
    (doubt,) = unlikely(config)
    assert "reads the training data" in doubt
    config.validation.sources = [DataSource("other", "text", "b.txt"), config.data.sources[1]]
    (doubt,) = unlikely(config)
    assert "validation.sources.1.dataset = 'text': validation reads the training" in doubt
    config.validation.sources.pop()
    assert unlikely(config) == []
    config.validation.sources = []
    config.validation.enable = False
    assert unlikely(config) == []
