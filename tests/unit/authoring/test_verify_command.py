"""The command line of `torchtitan verify`: what it accepts, its exit codes and its report."""

import json
import re
import sys
from dataclasses import replace

import pytest

from torchtitan.authoring.verify.catalog import all_checks, choose
from torchtitan.authoring.verify.check import CheckFailedError
from torchtitan.authoring.verify.command import main
from torchtitan.authoring.verify.contract import spec_is_complete
from torchtitan.authoring.verify.subject import Subject
from torchtitan.errors import ConfigError
from torchtitan.models import MODEL_REGISTRY
from torchtitan.models.llama3 import Llama3ModelArgs
from torchtitan.protocols.train_spec import get_train_spec


def test_names_are_unique_and_needs_come_first():
    seen = []
    for check in all_checks():
        assert check.name not in seen
        assert set(check.needs) <= set(seen), check.name
        seen.append(check.name)


def test_only_takes_checks_and_groups_and_adds_what_they_need():
    names = [check.name for check in choose(["cost", "semantics.batch"])]
    assert {"cost.nparams", "cost.flops", "semantics.batch", "contract.forward"} <= set(names)
    assert "semantics.order" not in names


def test_quick_leaves_out_what_is_not_quick():
    assert all(check.quick for check in choose(quick=True))


def test_an_unknown_check_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"--only semantics\.batches: .*semantics\.batch"):
        choose(["semantics.batches"])


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no model 'lama3'.*llama3"):
        main(["lama3"])


def test_an_unknown_flavor_is_refused():
    with pytest.raises(ConfigError, match=r"model\.flavor = 'huge'"):
        main(["llama3", "--flavor", "huge"])


@pytest.mark.parametrize("option", ["--custom-import", "--job.custom_import"])
def test_a_module_that_does_not_import_is_a_failed_check(capsys, option):
    assert main(["mine", option, "no_such_module", "--only", "cost"]) == 1
    out = capsys.readouterr().out
    assert "fail  contract.import" in out and "no_such_module" in out
    assert re.search(
        r"s  job\.custom_import = 'no_such_module': the import failed with Module", out
    )
    assert "look at: the module that --custom-import names" in out
    assert "0 passed, 1 failed, 4 skipped" in out


def test_one_folder_too_high_is_one_message(tmp_path, monkeypatch, capsys):
    (tmp_path / "too_high" / "too_high").mkdir(parents=True)
    (tmp_path / "too_high" / "too_high" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"'too_high': .*Run the command inside it: cd too_high$"):
        main(["too_high", "--custom-import", "too_high", "--quick"])
    del sys.modules["too_high"]
    assert not capsys.readouterr().out


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        main(["llama3", "--hf", str(tmp_path / "nowhere")])


def test_a_report_that_cannot_be_written_is_refused_before_the_checks(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--json .*/file: cannot write there"):
        main(["llama3", "--only", "contract", "--json", str(tmp_path / "file" / "report.json")])
    with pytest.raises(ConfigError, match=r"--json .*: a folder\. Give a file"):
        main(["llama3", "--only", "contract.import", "--json", str(tmp_path)])
    assert "checks" not in capsys.readouterr().out


def test_the_list_runs_nothing(capsys):
    assert main(["llama3", "--list", "--only", "cost.nparams"]) == 0
    assert "\ncost.nparams     the number of parameters is exact\n" in capsys.readouterr().out


def test_a_right_model_gives_0_and_a_report(tmp_path, capsys):
    file = tmp_path / "report.json"
    code = main(["llama3", "--only", "contract.layers", "--json", str(file)])
    assert code == 0
    assert "3 passed, 0 failed" in capsys.readouterr().out
    checks = json.loads(file.read_text())["checks"]
    names = [check["name"] for check in checks]
    assert names == ["contract.import", "contract.spec", "contract.layers"]
    assert {check["status"] for check in checks} == {"pass"}


def test_args_that_are_updated_in_place_fail_once(tmp_path, monkeypatch):
    """As upstream's do. Without args, no other check could run."""

    class Args(Llama3ModelArgs):
        def update_from_config(self, job_config):
            pass

    spec = get_train_spec("llama3", "debugmodel")
    spec = replace(spec, model_args=Args(**vars(spec.model_args)))
    monkeypatch.setitem(MODEL_REGISTRY, "upstreams", lambda flavor: spec)
    with pytest.raises(CheckFailedError, match=r"Args\.update_from_config returns None, not the"):
        spec_is_complete(Subject("upstreams", "debugmodel", tmp_path))


BROKEN = '''
"""Llama 3 that claims one parameter too many."""
from dataclasses import dataclass, replace

from torchtitan.models import llama3
from torchtitan.models.llama3 import Llama3ModelArgs
from torchtitan.protocols import register_train_spec

@dataclass
class Args(Llama3ModelArgs):
    def get_nparams_and_flops(self, seq_len):
        nparams, flops = super().get_nparams_and_flops(seq_len)
        return nparams + 1, flops

MODEL_CONFIGS = {"debugmodel": Args(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=64,
                                    vocab_size=264)}

def get_train_spec(flavor):
    return replace(llama3.get_train_spec("debugmodel"), model_args=MODEL_CONFIGS[flavor])

register_train_spec("one_too_many", get_train_spec)
'''


@pytest.fixture
def broken_model(tmp_path, monkeypatch):
    """The name of a module in the working directory."""
    (tmp_path / "one_too_many.py").write_text(BROKEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(MODEL_REGISTRY, "one_too_many", None)  # so that it is no model afterwards
    del MODEL_REGISTRY["one_too_many"]
    return "one_too_many"


def test_a_wrong_model_gives_1_and_says_why(broken_model, capsys):
    code = main([broken_model, "--custom-import", broken_model, "--only", "cost.nparams"])
    assert code == 1
    out = capsys.readouterr().out
    assert "2 passed, 1 failed" in out
    assert "1 less" in out
    assert "look at: args.py: get_nparams_and_flops" in out


def test_a_train_spec_that_cannot_be_made_is_a_failed_check(tmp_path, monkeypatch, capsys):
    text = "from torchtitan.protocols import register_train_spec\n\n\ndef get_train_spec(flavor):\n"
    text += '    return flavour\n\n\nregister_train_spec("misspelt", get_train_spec)\n'
    (tmp_path / "misspelt.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(MODEL_REGISTRY, "misspelt", None)  # so that it is no model afterwards
    del MODEL_REGISTRY["misspelt"]
    assert main(["misspelt", "--custom-import", "misspelt", "--only", "contract.spec"]) == 1
    out = capsys.readouterr().out
    assert "fail  contract.spec" in out and "NameError: name 'flavour' is not defined" in out
    assert "misspelt.py:5 in get_train_spec" in out
