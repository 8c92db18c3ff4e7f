"""Options of the test suite, and what no test may leave behind."""

import gc
import logging
from collections.abc import Callable, Generator, Iterator
from types import FunctionType

import pytest
from hypothesis import settings

from torchtitan.models import MODEL_REGISTRY
from torchtitan.runtime import ranks

# Ranks import the module of their function: a test's, which imports pytest. Those that compile need
# the compiler's modules: 600, a second of imports.
ranks.PRELOADED += ("pytest", "torch._inductor.compile_fx", "torch._dynamo.backends.debugging")

# An example that takes long is no failure: other processes may have the machine.
settings.register_profile("without_deadline", deadline=None)
settings.load_profile("without_deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-docs",
        action="store_true",
        help="write the pages under docs/ that tests produce, instead of only checking them",
    )
    parser.addoption(
        "--kills",
        type=int,
        default=8,
        help="how often tests/faults kills a run, over 1 and 4 processes (100: about 5 minutes)",
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported, a million objects, stays: garbage need not be looked for among it."""
    gc.disable()
    collected = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return collected


@pytest.fixture(autouse=True, scope="module")
def _flavors_as_before() -> Iterator[None]:
    """Flavors that a file's tests add to a model are gone after it."""
    ours = (factory for factory in MODEL_REGISTRY.values() if _is_ours(factory))
    tables = [factory.__globals__["MODEL_CONFIGS"] for factory in ours]
    before = [dict(table) for table in tables]
    yield
    for table, flavors in zip(tables, before, strict=True):
        table.clear()
        table.update(flavors)


@pytest.fixture(autouse=True)
def _logger_as_imported() -> Iterator[None]:
    """Commands that run in this process set the log's level, which others read.

    Also in a fixture of a module, which is set up before this one.
    """
    yield
    logger = logging.getLogger("torchtitan")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


def _is_ours(factory: Callable[..., object]) -> bool:
    """Whether it is a model of this package that can be imported: those of tests may have no such
    table."""
    return isinstance(factory, FunctionType) and factory.__module__.startswith("torchtitan.models.")
