"""A right model whose tokens see the last 128, as Mistral's."""

from __future__ import annotations

from dataclasses import dataclass

from mutants import base

WINDOW = 128


@dataclass
class Args(base.Args):
    sliding_window: int = WINDOW


class Model(base.Model):
    def __init__(self, args: Args) -> None:
        super().__init__(args)
        self.mask = base.CausalMask(window=args.sliding_window)


def hf_config() -> dict:
    """The same model as a `config.json` of `MistralForCausalLM`."""
    return base.hf_config() | {"model_type": "mistral", "sliding_window": WINDOW}


base.register(__name__, model_cls=Model, model_args=Args())
