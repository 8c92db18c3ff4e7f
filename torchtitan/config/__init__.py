"""The configuration: dataclasses (one file a section), TOML + command line loading."""

from .job_config import JobConfig
from .load import fail, load_config, origin
from .toml_file import to_toml

__all__ = ["JobConfig", "fail", "load_config", "origin", "to_toml"]
