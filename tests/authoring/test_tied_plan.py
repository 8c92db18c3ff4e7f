"""A plan of an author's model whose output layer is its embedding."""

from __future__ import annotations

import pytest
from mutants import base

from torchtitan.config import load_config
from torchtitan.planning.trace import trace_step
from torchtitan.protocols import TrainSpec, register_train_spec
from torchtitan.runtime.fake_world import fake_world


def get_train_spec(flavor: str) -> TrainSpec:
    args = base.Args(tie_word_embeddings=flavor == "tied")
    return base.get_train_spec(flavor, model_args=args)


register_train_spec("tied_base", get_train_spec)


@pytest.mark.parametrize("flavor", ["tied", "untied"])
def test_a_tied_weight_is_held_once(flavor: str) -> None:
    options = ["--model.name=tied_base", f"--model.flavor={flavor}", "--training.seq_len=64"]
    with fake_world(1, rank=0):
        held = trace_step(load_config(options)).gradients
    assert held / 4 == get_train_spec(flavor).model_args.get_nparams_and_flops(1)[0]
