"""`conformance_tests` in an author's test file: a test for each check."""

import subprocess
import sys
import textwrap

import pytest

from torchtitan.protocols.train_spec import MODEL_REGISTRY

pytest_plugins = ["pytester"]

MODEL = """
from dataclasses import replace

from torchtitan.models import llama3
from torchtitan.models.llama3 import Llama3Model, Llama3ModelArgs
from torchtitan.protocols import register_train_spec

MODEL_CONFIGS = {
    "debugmodel": Llama3ModelArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=64, vocab_size=264
    )
}


class Model(Llama3Model):
    def forward(self, tokens, positions=None, document_ids=None):
        return super().forward(tokens, positions)


def get_train_spec(flavor):
    return replace(
        llama3.get_train_spec("debugmodel"),
        model_cls=Model,
        model_args=MODEL_CONFIGS[flavor],
        state_dict_adapter=None,
    )


register_train_spec("forgets_documents", get_train_spec)
"""

TEST = """
from torchtitan.authoring import conformance_tests

test_conformance = conformance_tests(
    "forgets_documents",
    custom_import="forgets_documents",
    only=["contract.layers", "semantics.documents", "adapter.parts"],
)
"""


@pytest.fixture
def written(pytester, monkeypatch):
    """The files, and a registry without the model that another test has imported from them."""
    monkeypatch.delitem(MODEL_REGISTRY, "forgets_documents", raising=False)
    pytester.makepyfile(forgets_documents=MODEL, test_mine=TEST)
    monkeypatch.syspath_prepend(str(pytester.path))


def test_each_check_is_a_test(pytester, written):
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v", "-rs")
    # Besides the three: contract.import, .spec and .forward, and adapter.round_trip.
    result.assert_outcomes(passed=4, failed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "*test_conformance?contract.layers? PASSED*",
            "*layers.0: in row 0 of a batch, the last document sees 50 tokens of the others*",
            "*look at: The mask must hold*",
            "*no state_dict_adapter*",
        ]
    )
    assert "Traceback" not in result.stdout.str()


def test_one_check_alone_runs_what_it_needs(pytester, written):
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-k", "documents]")
    result.assert_outcomes(failed=1, deselected=6)
    result.stdout.fnmatch_lines(["*the last document sees 50 tokens of the others*"])


def test_a_model_that_nothing_registers_is_told_as_by_verify(pytester):
    test = 'test = conformance_tests("lama3", only=["contract.import"])'
    pytester.makepyfile(f"from torchtitan.authoring import conformance_tests\n{test}")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ConfigError: no model 'lama3'*llama3*custom_import*"])


def test_neither_pytest_nor_torch_is_imported_with_the_package():
    script = """
        import sys
        from torchtitan.authoring import conformance_tests
        assert not {"pytest", "torch"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
