import itertools
import sys

import pytest

from torchtitan.config import JobConfig, load_config, to_toml
from torchtitan.errors import ConfigError

HEAD = """\
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Annotated, Literal
import torchtitan.config
from torchtitan.config.base import Range
from torchtitan.config.training import Training as OurTraining
"""

SECTIONS = """
@dataclass
class Extra:
    "What we add."
    factor: Annotated[float, Range(gt=0)] = 0.5
    \"\"\"Factor of everything.\"\"\"
    kind: Literal["a", "b"] = "a"

@dataclass
class Training:
    curriculum: bool = False
    \"\"\"Start with short documents.\"\"\"
    steps: Annotated[int, Range(ge=1, le=50)] = 30
"""

PLAIN = """
@dataclass
class JobConfig:
    extra: Extra = field(default_factory=Extra)
    training: Training = field(default_factory=Training)
"""

SUBCLASS = """
@dataclass
class LongerTraining(Training, OurTraining):
    pass

@dataclass
class JobConfig(torchtitan.config.JobConfig):
    extra: Extra = field(default_factory=Extra)
    training: LongerTraining = field(default_factory=LongerTraining)
"""

_numbers = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module and returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(text: str) -> str:
        names.append(f"users_config_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(HEAD + text)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(params=[PLAIN, SUBCLASS], ids=["plain", "subclass"])
def extended(request, module):
    return module(SECTIONS + request.param)


def write_toml(tmp_path, module_name, text):
    path = tmp_path / "run.toml"
    path.write_text(f"[job]\ncustom_config_module = '{module_name}'\n{text}")
    return ["--job.config_file", str(path)]


def test_sections_and_fields_are_added(tmp_path, extended):
    argv = write_toml(tmp_path, extended, "[extra]\nkind = 'b'\n[training]\ncurriculum = true\n")
    config = load_config([*argv, "--extra.factor=2", "--training.seq_len", "64"])
    assert isinstance(config, JobConfig)
    assert (config.extra.factor, config.extra.kind) == (2.0, "b")
    assert (config.training.curriculum, config.training.seq_len) == (True, 64)
    assert config.training.steps == 30  # the user's default
    assert config.training.dataset == JobConfig().training.dataset


def test_the_module_can_be_named_on_the_command_line(extended):
    argv = ["--extra.factor=2", "--job.custom_config_module", extended]
    assert load_config(argv).extra.factor == 2.0


def test_an_added_option_may_be_a_table_of_any_keys_or_a_tuple(tmp_path, module):
    name = module(
        "@dataclass\nclass Mix:\n    shares: dict[str, float] = field(default_factory=dict)\n"
        "    betas: tuple[float, float] = (0.9, 0.95)\n"
        "@dataclass\nclass JobConfig:\n    mix: Mix = field(default_factory=Mix)"
    )
    argv = write_toml(tmp_path, name, "[mix]\nbetas = [0, 1]\n[mix.shares]\ncode = 1\n")
    config = load_config([*argv, "--mix.shares.text=2"])
    assert config.mix.betas == (0.0, 1.0)
    assert config.mix.shares == {"code": 1.0, "text": 2.0}
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load_config(argv).mix == config.mix
    with pytest.raises(ConfigError, match=r"^--mix\.shares\.text: must be a number, not 'x'$"):
        load_config([*argv, "--mix.shares.text=x"])
    (tmp_path / "run.toml").write_text(to_toml(config).replace("[0.0, 1.0]", "[1]"))
    with pytest.raises(ConfigError, match=r"\[mix\] betas: must be an array of 2, not of 1$"):
        load_config(argv)


def test_added_options_get_the_same_checks(tmp_path, extended):
    argv = write_toml(tmp_path, extended, "[extra]\nkind = 'c'\n")
    with pytest.raises(ConfigError, match=r"run.toml:4: \[extra\] kind: 'c' is not allowed"):
        load_config(argv)
    argv = write_toml(tmp_path, extended, "[training]\ncuriculum = true\n")
    with pytest.raises(ConfigError, match=r":4: \[training\] curiculum: .*'curriculum'\?"):
        load_config(argv)
    argv = ["--job.custom_config_module", extended]
    with pytest.raises(ConfigError, match=r"^--extra.factor: must be > 0, not -1.0$"):
        load_config([*argv, "--extra.factor=-1"])
    with pytest.raises(ConfigError, match=r"^--training.steps: must be >= 1 and <= 50, not 51$"):
        load_config([*argv, "--training.steps=51"])


def test_added_options_are_in_the_help(extended, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(["--job.custom_config_module", extended, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "Factor of everything. (default: 0.5)" in shown
    assert "Start with short documents." in shown
    assert "Tokens in a sequence." in shown


def test_an_extended_config_survives_the_round_trip(tmp_path, extended):
    config = load_config(["--job.custom_config_module", extended, "--extra.factor", "3"])
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config))
    again = load_config(["--job.config_file", str(path)])
    assert again.extra.factor == 3.0
    assert to_toml(again) == to_toml(config)


def test_what_is_unset_stays_unset_though_it_has_a_default(tmp_path, module):
    name = module(
        "@dataclass\nclass Part:\n    size: int | None = 3\n    name: str | None = None\n"
        "@dataclass\nclass Mine:\n    limit: int | None = None\n    other: str | None = None\n"
        "    parts: list[Part] = field(default_factory=lambda: [Part()])\n"
        "@dataclass\nclass JobConfig:\n    mine: Mine = field(default_factory=lambda: Mine(5))"
    )
    argv = ["--job.custom_config_module", name, "--mine.limit", "None", "--mine.parts.0.size"]
    config = load_config([*argv, "None"])
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config))
    again = load_config(["--job.config_file", str(path)])
    assert again.mine == config.mine
    assert (again.mine.limit, again.mine.parts[0].size) == (None, None)


def test_two_configs_share_no_mutable_values(extended):
    first, second = (load_config(["--job.custom_config_module", extended]) for _ in range(2))
    first.extra.factor = 9.0
    assert second.extra.factor == 0.5


def test_nested_sections_required_keys_and_rules_of_the_users_own(tmp_path, module):
    name = module("""
@dataclass
class Source:
    path: str
    weight: float = 1.0

@dataclass
class Inner:
    size: int | None = 3

@dataclass
class Mix:
    sources: list[Source] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if len(self.sources) > 2:
            raise ValueError("more than two sources")

@dataclass
class JobConfig:
    mix: Mix = field(default_factory=Mix)
""")
    text = "[mix.inner]\nsize = 5\n[[mix.sources]]\npath = 'a'\n"
    config = load_config(write_toml(tmp_path, name, text))
    assert (config.mix.inner.size, config.mix.sources[0].path) == (5, "a")
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config))
    assert load_config(["--job.config_file", str(path)]).mix == config.mix

    with pytest.raises(ConfigError, match=r":4: \[mix\] inner\.sise: unknown key"):
        load_config(write_toml(tmp_path, name, "[mix.inner]\nsise = 5\n"))
    with pytest.raises(ConfigError, match=r":3: \[mix\] sources\[0\]: .*'path'"):
        load_config(write_toml(tmp_path, name, "[[mix.sources]]\nweight = 2\n"))
    with pytest.raises(ConfigError, match=r":3: \[mix\]: more than two sources"):
        load_config(write_toml(tmp_path, name, "[[mix.sources]]\npath = 'a'\n" * 3))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the module has no dataclass JobConfig"),
        ("class JobConfig: pass", "the module has no dataclass JobConfig"),
        ("1 / 0", "ZeroDivisionError"),
        ("syntax error", "SyntaxError"),
        ("@dataclass\nclass JobConfig:\n    steps: int = 5", "steps must be a dataclass"),
        (
            "@dataclass\nclass A:\n    x: set[int] = field(default_factory=set)\n"
            "@dataclass\nclass JobConfig:\n    a: A = field(default_factory=A)",
            "the default of a.x has the annotation set[int], which is not supported here",
        ),
        (
            "@dataclass\nclass A:\n    x: Annotated[int, Range(ge=1)] = 0\n"
            "@dataclass\nclass JobConfig:\n    a: A = field(default_factory=A)",
            "the default of a.x must be >= 1, not 0",
        ),
        (
            "@dataclass\nclass A:\n    x: int = field(init=False, default=1)\n"
            "@dataclass\nclass JobConfig:\n    a: A = field(default_factory=A)",
            "the default of a.x has field(init=False): no value can be given. A section needs",
        ),
        (
            "@dataclass\nclass A:\n    x: int\n@dataclass\nclass JobConfig:\n    a: A",
            "missing 1 required positional argument",
        ),
        (
            "@dataclass\nclass A:\n    x: Nowhere = 1\n"
            "@dataclass\nclass JobConfig:\n    a: A = field(default_factory=A)",
            "Nowhere",
        ),
    ],
)
def test_message_for_a_module_that_cannot_be_used(module, text, problem):
    name = module(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--job.custom_config_module", name])
    assert str(caught.value).startswith(f"job.custom_config_module = '{name}': ")
    assert problem in str(caught.value)


def test_message_for_a_missing_module(tmp_path):
    message = "job.custom_config_module = 'no_such.module': .*No module named 'no_such'"
    with pytest.raises(ConfigError, match=message):
        load_config(["--job.custom_config_module", "no_such.module"])
    argv = write_toml(tmp_path, "x", "")
    (tmp_path / "run.toml").write_text("[job]\ncustom_config_module = 5\n")
    with pytest.raises(ConfigError, match=r":2: \[job\] custom_config_module: must be a string"):
        load_config(argv)
