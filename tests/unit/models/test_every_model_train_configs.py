"""Every model's folder of configs."""

import re
from pathlib import Path

import pytest
from harness import command
from model_cases import CASES

from torchtitan import models
from torchtitan.config.batch import resolve_batch
from torchtitan.config.load import load_config
from torchtitan.data.sources import DATASETS
from torchtitan.protocols.train_spec import get_train_spec, model_flavors


def configs(name: str) -> list[Path]:
    return sorted((Path(models.__file__).parent / name / "train_configs").glob("*.toml"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=f"{name}-{path.stem}") for name in CASES for path in configs(name)],
)
def test_it_loads_and_fits_its_model(path):
    config = load_config(["--job.config_file", str(path)])
    args = get_train_spec(config.model.name, config.model.flavor).model_args
    args.update_from_config(config)  # raises where tensor parallelism does not fit
    resolve_batch(config, dp_world_size=8)
    assert config.training.dataset in DATASETS


SIZED = [
    pytest.param(path, int({"one": "1"}.get(found[1], found[1])), id=path.stem)
    for name in CASES
    for path in configs(name)
    if (found := re.search(r"\b(one|\d+)(?: to [\d,]+)? GPUs of 80 GB", path.read_text()))
]


@pytest.mark.long
@pytest.mark.parametrize(("path", "gpus"), SIZED)
def test_it_fits_the_fewest_gpus_that_it_names(path, gpus):
    done = command("plan", str(path), f"--world-size={gpus}")
    assert done.exit_code == 0 and "it fits" in done.out, done.out + done.err


def test_most_configs_name_a_number_of_gpus():
    assert len(SIZED) >= 15


@pytest.mark.parametrize("name", CASES)
def test_every_flavor_has_a_config(name):
    loaded = [load_config(["--job.config_file", str(path)]) for path in configs(name)]
    assert {config.model.name for config in loaded} == {name}
    assert {config.model.flavor for config in loaded} == set(model_flavors(name))
