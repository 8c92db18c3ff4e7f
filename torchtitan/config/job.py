from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Job:
    """The run as a whole."""

    config_file: str | None = None
    """TOML file to read; command-line options override it."""
    dump_folder: str = "./outputs"
    """Folder for all output of the run. `~` is expanded, variables are not."""
    description: str = "default job"
    """Free text describing the run."""
    print_config: bool = False
    """Print the resolved config as TOML. Set on the command line, it exits before training; set in
    the file, it does not."""
    custom_import: str = ""
    """Python module to import first, for example to register a model (`my_pkg.my_model`)."""
    custom_config_module: str = ""
    """Python module whose `JobConfig` dataclass adds sections or fields to this config."""
