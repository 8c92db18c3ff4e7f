"""What benchmarks add to the registries of models is gone after each test."""

from collections.abc import Iterator

import pytest

from torchtitan.models import llama3, qwen3


@pytest.fixture(autouse=True)
def _flavors_as_before() -> Iterator[None]:
    tables = [module.MODEL_CONFIGS for module in (llama3, qwen3)]
    before = [dict(table) for table in tables]
    yield
    for table, flavors in zip(tables, before, strict=True):
        table.clear()
        table.update(flavors)
