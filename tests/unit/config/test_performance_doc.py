"""docs/performance.md names keys and converters that there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from torchtitan.config import JobConfig, load_config
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.protocols.model_converter import MODEL_CONVERTERS, build_model_converters

TEXT = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()


def test_every_key_exists() -> None:
    config = JobConfig()
    sections = "|".join(vars(config))
    keys = set(re.findall(rf"`((?:{sections})\.\w+)(?: = [^`]*)?`", TEXT))
    assert len(keys) > 10
    for key in keys:
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key


def test_every_converter_exists_and_the_example_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert "quantize" in tomllib.loads(example)
    (tmp_path / "run.toml").write_text(example)
    job_config = load_config(["--job.config_file", str(tmp_path / "run.toml")])
    build_model_converters(job_config, ParallelDims(world_size=1))
    named = set(re.findall(r"`(quantize\.\w+\.\w+)`", TEXT))
    # Other tests make converters of their own known.
    assert named == {name for name in MODEL_CONVERTERS if name.startswith("quantize.")}
