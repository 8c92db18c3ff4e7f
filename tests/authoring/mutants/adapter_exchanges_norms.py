"""The adapter exchanges the two norms of a layer, which in a new model are both all 1."""

from __future__ import annotations

from mutants import base

HF_CONFIG = base.hf_config()
CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is .*attention_norm .*post_attention_layernorm.*norms.* exchanged"


class Adapter(base.Adapter):
    layer_names = base.Adapter.layer_names | {
        "attention_norm": "post_attention_layernorm",
        "ffn_norm": "input_layernorm",
    }


base.register(__name__, state_dict_adapter=Adapter)
