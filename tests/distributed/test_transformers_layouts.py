"""Models of the library transformers train in every layout like in one process.

See test_layouts.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from equality import assert_equal_runs
from test_layouts import CHUNKED, COMPILE, CP2, DOCUMENTS, FULL_AC, RING, TP2, WHOLE_SEQUENCE
from test_layouts import train_in as train

from torchtitan.components.checkpoint.manifest import Manifest
from torchtitan.generation.load import ModelOptions, open_source
from torchtitan.models.transformers.model import smaller

PP2 = "--parallelism.pipeline_parallel_degree=2"
# As in test_expert_layouts.py: with few weights, Adam's first steps amplify rounding.
RATE = "--optimizer.lr=3e-4"

LAYOUTS = {"gemma3_text-pp2": (2, 8, PP2), "olmo3-cp2": (2, 8, CP2)}
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


LONGROPE = {
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48},
}


def options_for(kind: str, folder: Path, **fields: Any) -> tuple[str, ...]:
    config = transformers.AutoConfig.for_model(kind, **fields).to_diff_dict()
    small = transformers.AutoConfig.for_model(**smaller(config) | {"pad_token_id": None})
    small.save_pretrained(folder)
    flavor = "--model.flavor=debugmodel"
    return "--model.name=transformers", flavor, f"--model.args.path={folder}", RATE


def check(name: str, layout: tuple, folder: Path, **fields: Any) -> None:
    kind = name.partition("-")[0]
    shared = options_for(kind, folder / "config", **fields)
    if DOCUMENTS in layout:
        shared += (DOCUMENTS,)
    one_process = train(folder / "one", (1, 8), *shared)
    assert_equal_runs(train(folder / "layout", layout, *shared), one_process)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(name, tmp_path: Path) -> None:
    check(name, LAYOUTS[name], tmp_path)


def test_long_rotations_are_for_the_sequences_of_training(tmp_path: Path) -> None:
    check("phi3", (4, 8, PP2, CP2, DOCUMENTS), tmp_path, **LONGROPE)
    run = tmp_path / "layout" / "run"
    assert Manifest.read(run / "checkpoint" / "step-6").model["args"]["long_rotations"]
    source = open_source(ModelOptions(str(run)))
    assert not source.spec.model_args.long_rotations and source.max_seq_len == 32


@pytest.mark.long
@pytest.mark.parametrize("name", LONG_LAYOUTS)
def test_more_layouts_train_like_one_process(name, tmp_path: Path) -> None:
    check(name, LONG_LAYOUTS[name], tmp_path)
