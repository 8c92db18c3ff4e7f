"""The output layer shares the embedding's weight, and both are counted."""

from __future__ import annotations

from mutants import base

CAUGHT_BY = ("cost.nparams",)
SAYS = r"16,896 less.*output\.weight shares its weight"


class Args(base.Args):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams + self.vocab_size * self.dim, flops


class Adapter(base.Adapter):
    names = {**base.Adapter.names, "output": "model.embed_tokens"}  # noqa: RUF012


base.register(__name__, model_args=Args(tie_word_embeddings=True), state_dict_adapter=Adapter)
