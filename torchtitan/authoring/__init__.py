"""The author's toolkit: `torchtitan new` starts a model, `torchtitan verify` proves it right."""

from .conformance import conformance_tests

__all__ = ["conformance_tests"]
