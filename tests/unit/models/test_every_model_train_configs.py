"""Every model's folder of configs."""

import re
from pathlib import Path

import pytest
from harness import command
from model_cases import CASES

from torchtitan import models
from torchtitan.config.batch import batch_sizes
from torchtitan.config.load import load_config
from torchtitan.data.sources import DATASETS
from torchtitan.preflight.validate import validate
from torchtitan.protocols.train_spec import get_train_spec, model_flavors

MODELS = [*CASES, "flux"]


def configs(name: str) -> list[Path]:
    return sorted((Path(models.__file__).parent / name / "train_configs").glob("*.toml"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=f"{name}-{path.stem}") for name in MODELS for path in configs(name)],
)
def test_it_loads_and_fits_its_model(path):
    config = load_config(["--job.config_file", str(path)])
    args = get_train_spec(config.model.name, config.model.flavor).model_args
    args.update_from_config(config)  # raises where tensor parallelism does not fit
    batch_sizes(config, dp_world_size=8)
    assert config.training.dataset in DATASETS


@pytest.mark.parametrize("name", CASES)
def test_documents_begin_with_bos_where_the_published_tokenizer_puts_it(name):
    """Programs that read the exported tokenizer begin prompts with it, so it must be trained."""
    puts_it = name in ("llama3", "llama4", "gemma3", "deepseek_v3")
    for path in configs(name):
        if path.stem.startswith("debug_model") or path.stem == "llama3_150m":  # of SmolLM2
            continue
        assert load_config(["--job.config_file", str(path)]).data.add_bos == puts_it, path


@pytest.mark.parametrize("path", configs("deepseek_v3"), ids=lambda path: path.stem)
def test_deepseek_trains_with_a_document_mask_where_it_is_set(path):
    """As upstream's flavors do, for runs that come from there; V3's paper has none."""
    options = ["--job.config_file", str(path), "--model.tokenizer_path=bytes"]
    assert not load_config(options).training.document_mask
    degree = "--parallelism.context_parallel_degree=2"
    validate(load_config([*options, "--training.document_mask", degree]), world_size=16)


SIZED = [
    pytest.param(path, int({"one": "1"}.get(found[1], found[1])), id=path.stem)
    for name in MODELS
    for path in configs(name)
    if (found := re.search(r"\b(one|\d+)(?: to [\d,]+)? GPUs of 80 GB", path.read_text()))
]


LEAST_MFU = 20
"""Percent, as planned: below, a layout wastes its GPUs, and another is faster."""


@pytest.mark.long
@pytest.mark.parametrize(("path", "gpus"), SIZED)
def test_it_fits_the_fewest_gpus_that_it_names_and_uses_them_well(path, gpus):
    done = command("plan", str(path), f"--world-size={gpus}")
    assert done.exit_code == 0 and "it fits" in done.out, done.out + done.err
    mfu = re.search(r"MFU ([\d.]+)%", done.out)
    assert mfu and float(mfu[1]) >= LEAST_MFU, done.out


def test_configs_of_published_sizes_name_a_number_of_gpus():
    every = {path.stem for name in MODELS for path in configs(name)}
    unsized = every - {param.id for param in SIZED}
    assert {stem for stem in unsized if not stem.startswith("debug_model")} == {"llama3_150m"}


@pytest.mark.parametrize("name", MODELS)
def test_every_flavor_has_a_config(name):
    loaded = [load_config(["--job.config_file", str(path)]) for path in configs(name)]
    assert {config.model.name for config in loaded} == {name}
    assert {config.model.flavor for config in loaded} == set(model_flavors(name))
