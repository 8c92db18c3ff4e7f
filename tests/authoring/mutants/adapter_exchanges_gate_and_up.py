"""The adapter exchanges the gate and the input matrix of the feed-forward layer."""

from __future__ import annotations

from mutants import base

from torchtitan.protocols import TrainSpec, register_train_spec

CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is the first layer .*feed_forward"
HF_CONFIG = base.hf_config()


class Adapter(base.Adapter):
    layer_names = {  # noqa: RUF012
        **base.Adapter.layer_names,
        "feed_forward.w1": "mlp.up_proj",
        "feed_forward.w3": "mlp.gate_proj",
    }


def get_train_spec(flavor: str) -> TrainSpec:
    return base.get_train_spec(flavor, state_dict_adapter=Adapter)


register_train_spec("adapter_exchanges_gate_and_up", get_train_spec)
