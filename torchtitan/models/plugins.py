"""Load models from outside this package: a module that the user names, and entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from torchtitan.protocols.train_spec import register_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.user_module import import_user_module, places_of, with_place

ENTRY_POINT_GROUP = "torchtitan.models"


def load_plugins(custom_import: str = "") -> None:
    """Make out-of-tree models known. Call it before looking a model up; repeating it is harmless.

    Every entry point in the group `torchtitan.models` is loaded. It names either a module that
    registers its models when imported, or a `get_train_spec(flavor)` factory, which is registered
    under the entry point's name. If one fails, this only warns, as it may come from a package that
    has nothing to do with this run.

    Args:
        custom_import: `job.custom_import`, a module that registers its models; "" for none.

    Raises:
        ConfigError: `custom_import` cannot be imported.
    """
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry_point.load()
            if callable(loaded):
                register_train_spec(entry_point.name, loaded)
        except Exception as error:
            logger.warning(
                "model plugin %s = %s failed to load: %s",
                entry_point.name,
                entry_point.value,
                with_place(error, places_of(entry_point.module)),
            )
    if custom_import:
        import_user_module(custom_import, "job.custom_import")
