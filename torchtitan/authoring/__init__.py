"""The author's toolkit: `torchtitan new` starts a model, `torchtitan verify` proves it right."""
