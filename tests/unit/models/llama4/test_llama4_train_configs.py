from pathlib import Path

import pytest

from torchtitan.config.batch import resolve_batch
from torchtitan.config.load import load_config
from torchtitan.data.sources import DATASETS
from torchtitan.models import llama4
from torchtitan.protocols.train_spec import get_train_spec

FOLDER = Path(llama4.__file__).parent / "train_configs"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_it_loads_and_fits_its_model(path):
    config = load_config(["--job.config_file", str(path)])
    args = get_train_spec(config.model.name, config.model.flavor).model_args
    args.update_from_config(config)  # raises where tensor parallelism does not fit
    resolve_batch(config, dp_world_size=8)
    assert config.training.dataset in DATASETS


def test_every_flavor_has_a_config():
    configured = {
        load_config(["--job.config_file", str(path)]).model.flavor for path in FOLDER.glob("*.toml")
    }
    assert configured == set(llama4.MODEL_CONFIGS)
