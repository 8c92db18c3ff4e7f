"""No input gives a traceback: `load_config` returns a valid config, or says what is wrong."""

import collections
import contextlib
import dataclasses
import io
import os
import tomllib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchtitan.config import JobConfig, load_config, origin, to_toml
from torchtitan.errors import ConfigError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SECTIONS = {
    section.name: [f.name for f in dataclasses.fields(getattr(JobConfig(), section.name))]
    for section in dataclasses.fields(JobConfig)
}
KEYS = sorted({key for keys in SECTIONS.values() for key in keys} - {"custom_config_module"})
PATHS = sorted(f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys)
PATHS.remove("job.custom_config_module")  # would import any module of this machine


def near_miss(names: list[str]) -> st.SearchStrategy[str]:
    """A name, or one with a character doubled, dropped or changed."""

    def change(name: str, position: int, what: str) -> str:
        position %= len(name)
        middle = {"drop": "", "double": name[position] * 2}.get(what, what)
        return name[:position] + middle + name[position + 1 :]

    whats = st.sampled_from(["drop", "double", "Z", "_", "-"])
    wrong = st.builds(change, st.sampled_from(names), st.integers(0, 40), whats)
    return st.one_of(st.sampled_from(names), st.sampled_from(names), wrong)


def quoted(text: str) -> str:
    escaped = "".join(f"\\U{ord(c):08x}" if c in '"\\' or not c.isprintable() else c for c in text)
    return f'"{escaped}"'


words = st.sampled_from(
    ["model", "loss", "op", "AdamW", "linear", "norm", "auto", "true", "None", "", "bytes", "all"]
)
text = st.one_of(words, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
integers = st.one_of(st.integers(-3, 200), st.integers(), st.sampled_from([2**63, 10**400]))
floats = st.floats()
scalars = st.one_of(
    text.map(quoted),
    integers.map(str),
    floats.map(repr),
    st.sampled_from(["true", "false", "1979-05-27", "07:32:00", "0xff", "1_000", "+inf", "-nan"]),
)
rules = st.builds(
    lambda key, value: f"{{ {key or 'x'} = {value} }}",
    near_miss(["pattern", "lr_scale", "weight_decay"]),
    scalars,
)
values = st.recursive(
    st.one_of(scalars, scalars, rules),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    max_leaves=4,
)
right_values = {
    "steps": "5", "lr": "1e-3", "seq_len": "64", "rules": '[{pattern = "a"}]', "enable": "true",
    "decay_ratio": "0.5", "components": '["loss"]', "decay_type": '"cosine"', "max_norm": "inf",
}  # fmt: skip


@st.composite
def documents(draw) -> str:
    """Statements of valid TOML; together they may repeat a key, which TOML forbids."""
    lines = []
    if draw(st.integers(0, 4)) == 0:
        lines.append(f"{draw(near_miss(PATHS))} = {draw(values)}")
    for section in draw(st.lists(near_miss(sorted(SECTIONS)), unique=True, max_size=4)):
        header = draw(st.sampled_from(["[{}]", "[{}]", "[{}]", "[[{}]]", "[{}.x]", '["{}"]']))
        lines.append(header.format(section or "x"))
        keys = SECTIONS.get(section, KEYS)
        keys = [key for key in keys if key != "custom_config_module"]
        for key in draw(st.lists(near_miss(keys), unique=True, max_size=3)):
            right = right_values.get(key)
            value = right if right and draw(st.booleans()) else draw(values)
            lines.append(f"{key or 'x'} = {value}{draw(st.sampled_from(['', '  # comment', '']))}")
    if draw(st.integers(0, 4)) == 0:
        lines.append(f"[[optimizer.rules]]\n{draw(near_miss(['pattern', 'lr_scale']))} = 1")
    return "\n".join(lines)


in_table = st.lists(near_miss(["n_layers", "moe", "x-y"]), min_size=1, max_size=3).map(".".join)
options = st.one_of(
    st.builds("--{}".format, near_miss(PATHS)), st.builds("--model.args.{}".format, in_table)
)
argument_words = st.one_of(
    words,
    values,
    st.text(st.characters(exclude_characters="\0"), max_size=6),
    integers.map(str),
    floats.map(repr),
)
arguments = st.one_of(
    options,
    st.builds("{}={}".format, options, argument_words),
    argument_words,
    st.sampled_from(
        ["--", "-h", "--help", "-1", "=", "--=", "--job", "@x", "--tyro-print-completion"]
    ),
)
pairs = st.lists(
    st.one_of(arguments.map(lambda a: [a]), st.lists(arguments, max_size=2)), max_size=4
)
argument_lists = pairs.map(lambda groups: [argument for group in groups for argument in group])


def load_or_refuse(argv: list[str]) -> JobConfig | None:
    """The config, or None if it was refused as it should be."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return load_config(argv)
        except ConfigError as error:
            lines = str(error).split("\n")  # one for each mistake
            starts = (argv[1] + ":", "--", "and more") if len(lines) > 1 else ("",)
            assert all(line and line.startswith(starts) for line in lines)
        except SystemExit as stop:
            assert stop.code in (0, 2)
    return None


def check(config: JobConfig | None, path) -> None:
    """What was accepted can be written, loads to the same, and can be named in messages."""
    if config is None:
        return
    path.write_text(to_toml(config), encoding="utf-8")
    again = load_config(["--job.config_file", str(path)])
    assert to_toml(again) == to_toml(config)
    for key in ("training.steps", "optimizer.rules", "job.description"):
        assert key.rpartition(".")[2] in origin(config, key)


@fuzz
@given(documents())
def test_any_toml_document(tmp_path, document):
    path = tmp_path / "run.toml"
    path.write_text(document, encoding="utf-8")
    check(load_or_refuse(["--job.config_file", str(path)]), tmp_path / "resolved.toml")


@fuzz
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode(
    errors="surrogatepass"))))  # fmt: skip
def test_any_bytes(tmp_path, data):
    path = tmp_path / "run.toml"
    path.write_bytes(data)
    load_or_refuse(["--job.config_file", str(path)])


@fuzz
@given(argument_lists)
def test_any_command_line(tmp_path, argv):
    check(load_or_refuse(argv), tmp_path / "resolved.toml")


@fuzz
@given(documents(), argument_lists)
def test_any_document_with_any_command_line(tmp_path, document, argv):
    path = tmp_path / "run.toml"
    path.write_text(document, encoding="utf-8")
    config = load_or_refuse(["--job.config_file", str(path), *argv])
    check(config, tmp_path / "resolved.toml")


def test_the_documents_reach_every_outcome(tmp_path):
    """Guards the tests above, which would prove little if hardly a document was TOML."""
    outcomes = collections.Counter()
    path = tmp_path / "run.toml"

    @settings(fuzz, max_examples=200, derandomize=True, database=None)
    @given(documents())
    def count(document):
        path.write_text(document, encoding="utf-8")
        try:
            tomllib.loads(document)
        except tomllib.TOMLDecodeError:
            outcomes["not TOML"] += 1
            return
        accepted = load_or_refuse(["--job.config_file", str(path)])
        outcomes["accepted" if accepted else "refused"] += 1

    count()
    assert outcomes["refused"] > outcomes["not TOML"]
    assert outcomes["accepted"] > 5
