"""The adapter permutes queries and keys for rotary pairs 2i and 2i + 1, which the model has not."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("adapter.hf_numbers",)
SAYS = r"layers\.0 is the first layer .*layers\.0\.attention\.w[qk] gives the features .* order"
HF_CONFIG = base.hf_config()


class Adapter(base.Adapter):
    def to_hf(self, state_dict):
        hf = super().to_hf(state_dict)
        return {k: permute(v, 2) if _turns(k) else v for k, v in hf.items()}

    def from_hf(self, state_dict):
        hf = {k: permute(v, -1) if _turns(k) else v for k, v in state_dict.items()}
        return super().from_hf(hf)


def _turns(key):
    return key.endswith(("q_proj.weight", "k_proj.weight"))


def permute(weight, pairs):
    heads, dim = base.Args().n_heads, weight.shape[1]
    split = weight.reshape(heads, -1, 2, dim) if pairs == 2 else weight.reshape(heads, 2, -1, dim)
    return split.transpose(1, 2).reshape(weight.shape)


base.register(__name__, state_dict_adapter=Adapter)
