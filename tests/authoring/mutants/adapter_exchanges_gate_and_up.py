"""The adapter exchanges the gate and the input matrix of the feed-forward layer."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is the first layer .*feed_forward"
HF_CONFIG = base.hf_config()


class Adapter(base.Adapter):
    layer_names = {  # noqa: RUF012
        **base.Adapter.layer_names,
        "feed_forward.w1": "mlp.up_proj",
        "feed_forward.w3": "mlp.gate_proj",
    }


base.register(__name__, state_dict_adapter=Adapter)
