"""Models of the library transformers train in every layout like in one process.

See test_layouts.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from equality import assert_equal_runs
from test_layouts import CHUNKED, COMPILE, CP2, DOCUMENTS, FULL_AC, RING, TP2, WHOLE_SEQUENCE
from test_layouts import train_in as train

from torchtitan.models.transformers.model import smaller

PP2 = "--parallelism.pipeline_parallel_degree=2"
# As in test_expert_layouts.py: with few weights, Adam's first steps amplify rounding.
RATE = "--optimizer.lr=3e-4"

LAYOUTS = {"gemma3_text-pp2xtp2": (4, 8, PP2, TP2), "olmo3-cp2": (2, 8, CP2)}
LONG_LAYOUTS = {
    f"{kind}-{name}": layout
    for kind in ("ernie4_5", "gemma3_text", "olmo2", "phi3", "qwen3", "starcoder2")
    for name, layout in {
        "fsdp2": (2, 4),
        "tp2": (2, 8, TP2),
        "tp2_whole_sequence": (2, 8, TP2, WHOLE_SEQUENCE),
        "tp2xcp2_chunked": (4, 8, TP2, CP2, CHUNKED),
        "pp2xfsdp2_documents": (4, 4, PP2, DOCUMENTS),
        "pp2xtp2_full_ac": (4, 8, PP2, TP2, FULL_AC),
        "tp2_compile": (2, 8, TP2, *COMPILE),
        "fsdp2_compiled_whole": (2, 4, *COMPILE, "--compile.scope=model"),
    }.items()
} | {"qwen3-cp2_ring": (2, 8, CP2, RING)}


def options_for(kind: str, folder: Path) -> tuple[str, ...]:
    config = transformers.AutoConfig.for_model(kind).to_diff_dict()
    small = transformers.AutoConfig.for_model(**smaller(config) | {"pad_token_id": None})
    small.save_pretrained(folder)
    flavor = "--model.flavor=debugmodel"
    return "--model.name=transformers", flavor, f"--model.args.path={folder}", RATE


def check(name: str, layout: tuple, folder: Path) -> None:
    kind = name.partition("-")[0]
    shared = options_for(kind, folder / "config")
    if DOCUMENTS in layout:
        shared += (DOCUMENTS,)
    one_process = train(folder / "one", (1, 8), *shared)
    assert_equal_runs(train(folder / "layout", layout, *shared), one_process)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(name, tmp_path: Path) -> None:
    check(name, LAYOUTS[name], tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_LAYOUTS)
def test_more_layouts_train_like_one_process(name, tmp_path: Path) -> None:
    check(name, LONG_LAYOUTS[name], tmp_path)
