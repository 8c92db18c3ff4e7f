from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Job:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file to read; options on the command line win over it."""
    dump_folder: str = "./outputs"
    """Folder that receives everything the run writes. `~` is expanded, variables are not."""
    description: str = "default job"
    """Free text that says what this run is for."""
    print_config: bool = False
    """Print the resolved config as TOML. On the command line, stop before training; in the file,
    train."""
    custom_import: str = ""
    """Python module to import first, so that it can register a model (`my_pkg.my_model`)."""
    custom_config_module: str = ""
    """Python module whose `JobConfig` dataclass adds sections or fields to this config."""
