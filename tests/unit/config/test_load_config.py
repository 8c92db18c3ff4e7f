import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.config import JobConfig, load_config, origin, to_toml
from torchtitan.config.optimizer import ParamRule
from torchtitan.errors import ConfigError
from torchtitan.models import MODEL_REGISTRY  # noqa: F401  (fills the registry)
from torchtitan.preflight.validate import validate
from torchtitan.protocols.train_spec import get_train_spec

GUIDE_TOML = """\
[job]
dump_folder = "./outputs"
description = "Your Model 8B training"

[model]
name = "your_model"
flavor = "8B"

[optimizer]
name = "AdamW"
lr = 3e-4

[training]
local_batch_size = 2
seq_len = 8192
steps = 1000
dataset = "c4"

[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
"""


@pytest.fixture
def write(tmp_path):
    """Writes a TOML file and returns the arguments that load it."""

    def write(text: str | bytes) -> list[str]:
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--job.config_file", str(path)]

    return write


def error_of(argv: list[str]) -> str:
    """The message for a wrong config, with the file's folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load_config(argv)
    folder = f"{Path(argv[1]).parent}{os.sep}" if argv[0] == "--job.config_file" else "\0"
    return str(caught.value).replace(folder, "")


def test_no_arguments_give_the_defaults():
    assert load_config([]) == JobConfig()


def test_the_guides_toml_loads(write):
    config = load_config(write(GUIDE_TOML))
    assert config.model.name == "your_model"
    assert config.optimizer.lr == 3e-4
    assert config.training.seq_len == 8192
    assert config.parallelism.data_parallel_shard_degree == -1


def test_a_tilde_is_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load_config(write('[job]\ndump_folder = "~/runs"\n'))
    assert config.job.dump_folder == "/home/me/runs"
    config = load_config(["--checkpoint.folder", "~/checkpoints"])
    assert config.checkpoint.folder == "/home/me/checkpoints"


def test_a_chat_template_is_found_from_other_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(["--data.chat_template", "own.jinja"])
    assert config.data.chat_template == str(tmp_path / "own.jinja")


def test_command_line_wins_over_file_over_defaults(write):
    argv = write("[training]\nsteps = 20\nseq_len = 64\n")
    config = load_config([*argv, "--training.steps", "30"])
    assert (config.training.steps, config.training.seq_len) == (30, 64)
    assert config.training.local_batch_size == JobConfig().training.local_batch_size


@pytest.mark.parametrize(
    "argv",
    [["--training.seq_len", "7"], ["--training.seq_len=7"], ["--training.seq-len=7"]],
)
def test_spellings_of_an_option(argv):
    assert load_config(argv).training.seq_len == 7


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--checkpoint.enable"], True),
        (["--checkpoint.enable=false"], False),
        (["--checkpoint.enable", "True"], True),
    ],
)
def test_booleans_on_the_command_line(write, argv, value):
    for in_file in ("true", "false"):
        file = write(f"[checkpoint]\nenable = {in_file}\n")
        assert load_config([*file, *argv]).checkpoint.enable is value


@pytest.mark.parametrize("unset", ["None", "none"])
def test_lists_and_unset_values_on_the_command_line(write, unset):
    file = write("[lr_scheduler]\ndecay_ratio = 0.5\n")
    argv = ["--compile.components", "loss", "--lr_scheduler.decay_ratio", unset]
    config = load_config([*file, *argv])
    assert config.compile.components == ["loss"]
    assert config.lr_scheduler.decay_ratio is None
    assert load_config(["--compile.components"]).compile.components == []


def test_unset_values_in_a_file(write):
    config = load_config(write('[lr_scheduler]\ntotal_steps = "none"\ndecay_ratio = "None"\n'))
    assert config.lr_scheduler.total_steps is None and config.lr_scheduler.decay_ratio is None
    with pytest.raises(ConfigError, match="must be an integer, not 'none'"):
        load_config(write('[training]\nsteps = "none"\n'))


def test_an_integer_is_fine_for_a_float_and_becomes_one(write):
    lr = load_config(write("[optimizer]\nlr = 1\n")).optimizer.lr
    assert type(lr) is float
    assert lr == 1.0


def test_infinity_where_it_has_a_meaning(write):
    assert load_config(write("[training]\nmax_norm = inf\n")).training.max_norm == math.inf
    assert load_config(["--training.max_norm", "inf"]).training.max_norm == math.inf


def test_array_of_tables_and_inline_tables_are_alike(write):
    tables = write('[[optimizer.rules]]\npattern = "a"\n[[optimizer.rules]]\nlr_scale = 2\n')
    rules = load_config(tables).optimizer.rules
    assert rules == [ParamRule("a"), ParamRule(lr_scale=2.0)]
    inline = write('[optimizer]\nrules = [{pattern = "a"}, {lr_scale = 2}]\n')
    assert load_config(inline).optimizer.rules == rules
    dotted = write('optimizer.rules = [{pattern = "a"}, {lr_scale = 2}]\n')
    assert load_config(dotted).optimizer.rules == rules
    assert load_config([*tables, "--optimizer.rules.1.pattern", "b"]).optimizer.rules[1] == (
        ParamRule("b", lr_scale=2.0)
    )


def test_windows_files_load(write):
    argv = write(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert load_config(argv).training.steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[loss]\nchunk_size = 2\nchunksize = 5\n",
            "run.toml:3: [loss] chunksize: unknown key. Did you mean 'chunk_size'? "
            "Allowed: chunk_size, name, z_loss_weight.",
        ),
        (
            "[training]\nlr = 1\n",
            "run.toml:2: [training] lr: unknown key. It belongs to [optimizer]",
        ),
        (
            "[optimizer]\nsteps = 1\n",
            "run.toml:2: [optimizer] steps: unknown key. It belongs to [training] or [validation]",
        ),
        (
            "steps = 1\n[optimizer]\n",
            "run.toml:1: [steps]: stands before the first section. It belongs to [training] or "
            "[validation]",
        ),
        (
            "\n# comment\n[optimizer]\n[[optimizer.rules]]\npattern = 'a'\n"
            "[[optimizer.rules]]\n\npatern = 'b'\n",
            "run.toml:8: [optimizer] rules[1].patern: unknown key. Did you mean 'pattern'? "
            "Allowed: lr_scale, pattern, weight_decay.",
        ),
        (
            "[training]\nsteps = 'abc'\n",
            "run.toml:2: [training] steps: must be an integer, not 'abc'",
        ),
        (
            "[training]\nsteps = true\n",
            "run.toml:2: [training] steps: must be an integer, not true",
        ),
        (
            "[training]\nsteps = 1.0\n",
            "run.toml:2: [training] steps: must be an integer, not 1.0",
        ),
        ("[training]\nsteps = 0\n", "run.toml:2: [training] steps: must be >= 1, not 0"),
        (
            "[training]\nglobal_batch_size = 0\n",
            "run.toml:2: [training] global_batch_size: must be >= 1 and <= 2147483647 or -1, not 0",
        ),
        (
            "[checkpoint]\nenable = 1\n",
            "run.toml:2: [checkpoint] enable: must be true or false, not 1",
        ),
        ("[optimizer]\nlr = nan\n", "run.toml:2: [optimizer] lr: must be a number, not nan"),
        (
            "[optimizer]\nlr = inf\n",
            "run.toml:2: [optimizer] lr: must be finite and > 0 and <= 1e+30, not inf",
        ),
        (
            "[lr_scheduler]\ndecay_type = 'lineer'\n",
            "run.toml:2: [lr_scheduler] decay_type: 'lineer' is not allowed. Did you mean "
            "'linear'? Allowed: cosine, linear, sqrt.",
        ),
        (
            "[compile]\ncomponents = [\n  'model',\n  'los',\n]\n",
            "run.toml:2: [compile] components[1]: 'los' is not allowed. Did you mean 'loss'? "
            "Allowed: loss, model.",
        ),
        ("[compile]\ncomponents = 'model'\n", "run.toml:2: [compile] components: must be an array"
         ", not 'model'"),
        ("\ntraining = 5\n", "run.toml:2: [training]: must be a table, not 5"),
        ("[[training]]\nsteps = 5\n", "run.toml:1: [training]: must be a table, not an array"),
        (
            "[model]\nname = 1979-05-27\n",
            "run.toml:2: [model] name: must be a string, not a date",
        ),
        (
            "[model]\nname = 'a\\u0000'\nflavor = \"a\\u0000\"\n",
            "run.toml:3: [model] flavor: must be valid UTF-8 text without NUL characters, "
            "not 'a\\x00'",
        ),
        (
            "[debug]\nseed = 9223372036854775808\n",
            "run.toml:2: [debug] seed: must fit in 64 bits",
        ),
    ],
)  # fmt: skip
def test_message_for_a_wrong_value_in_the_file(write, text, message):
    assert error_of(write(text)) == message


def test_all_mistakes_of_a_file_are_told_at_once(write):
    text = (
        "[model]\nhf_assets_path = 'x'\n[training]\nstepz = 1\nlr = 1\n"
        "[training.dataloader]\nnum_workers = 0\n[experimental]\ncustom_import = 'x'\n"
        "[quantize.linear.float8]\nprecompute_float8_dynamic_scale_for_fsdp = true\n"
        "[memory_estimation]\nenable = false\nother = 1\n[trainin]\nsteps = 1\n"
        "[float8]\nfilter_fqns = []\n"
        "[optimizer]\nrules = [{pattern = 'a', patern = 'b', lr_scale = -1}]\n"
        "lr = 'fast'\nlrr = 1\n"
    )
    upstream = "unknown key, from upstream torchtitan. Here:"
    starts = [
        f"run.toml:2: [model] hf_assets_path: {upstream} model.tokenizer_path",
        "run.toml:4: [training] stepz: unknown key. Did you mean 'steps'? Allowed: ",
        "run.toml:5: [training] lr: unknown key. It belongs to [optimizer]",
        f"run.toml:6: [training] dataloader: {upstream} data.workers ",
        f"run.toml:9: [experimental] custom_import: {upstream} job.custom_import",
        "run.toml:11: [quantize] linear.float8.precompute_float8_dynamic_scale_for_fsdp: "
        f"{upstream} none",
        f"run.toml:13: [memory_estimation] enable: {upstream} torchtitan plan",
        f"run.toml:14: [memory_estimation] other: {upstream} torchtitan plan",
        "run.toml:15: [trainin]: unknown section. Did you mean 'training'?",
        f"run.toml:18: [float8] filter_fqns: {upstream} quantize.linear.float8",
        "run.toml:20: [optimizer] rules[0].patern: unknown key. Did you mean 'pattern'?",
        "run.toml:20: [optimizer] rules[0].lr_scale: must be >= 0 and <= 1e+06, not -1",
        "run.toml:21: [optimizer] lr: must be a number, not 'fast'",
        "run.toml:22: [optimizer] lrr: unknown key. Did you mean 'lr'?",
    ]
    lines = error_of(write(text)).split("\n")
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_values_that_upstream_calls_otherwise_are_told_what_to_be_here(write):
    upstream = "This value is from upstream torchtitan. Here:"
    path = write("[checkpoint]\nasync_mode = 'async_with_pinned_mem'")
    assert error_of(path) == (
        "run.toml:2: [checkpoint] async_mode: 'async_with_pinned_mem' is not allowed. "
        f"{upstream} async"
    )
    config = JobConfig()
    config.validation.enable, config.validation.dataset = True, "c4_test"
    with pytest.raises(ConfigError) as caught:
        validate(config, 1)
    assert str(caught.value) == (
        f'validation.dataset = "c4_test": no such dataset. {upstream} stdlib, or text with files '
        "of your own"
    )


@pytest.mark.parametrize(
    ("model", "flavor", "here"),
    [
        ("llama3", "8B_flex", "8B, and training.document_mask = true"),
        ("llama3", "debugmodel_varlen_attn", "debugmodel, and training.document_mask = true"),
        ("deepseek_v3", "debugmodel_flex_attn", "debugmodel, and training.document_mask = true"),
        ("llama4", "17bx16e", "109B-A17B, with the layers of upstream's _irope"),
        (
            "llama4",
            "17bx128e_irope",
            "400B-A17B, with the layers of upstream's _irope, and training.document_mask = true",
        ),
        ("llama3", "17bx16e", None),
        ("llama3", "9B_flex", None),
        ("llama3", "_flex", None),
    ],
)
def test_flavors_that_upstream_calls_otherwise(model, flavor, here):
    with pytest.raises(ConfigError) as caught:
        get_train_spec(model, flavor)
    start = f"model.flavor = {flavor!r}: {model} has no such flavor."
    if here:
        assert str(caught.value) == f"{start} This value is from upstream torchtitan. Here: {here}"
    else:
        assert str(caught.value).startswith(start) and " Allowed: " in str(caught.value)


def test_of_many_mistakes_some_are_told(write):
    lines = error_of(write("".join(f"key_{i} = 1\n" for i in range(5000)))).split("\n")
    assert len(lines) == 21
    assert lines[-1] == "(more mistakes not shown)"


def test_message_for_an_unknown_section(write):
    message = error_of(write("[model]\n\n[trainin]\nsteps = 5\n"))
    start = "run.toml:3: [trainin]: unknown section. Did you mean 'training'? Allowed: activation_"
    assert message.startswith(start)
    assert all(f.name in message for f in dataclasses.fields(JobConfig))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\nname = \n",
            "run.toml:2: not valid TOML: Invalid value (column 8). Write text in quotes, and true "
            "or false in lower case",
        ),
        ("[model]\nname = 'a", "run.toml:2: not valid TOML: "),
        (
            '[job]\ndump_folder = "C:\\new\\users"\n',
            "run.toml:2: not valid TOML: Invalid hex value (column 24). Write backslashes "
            "twice, or the string in single quotes",
        ),
        (
            '[job]\ndump_folder = "C:\\data"\n',
            "run.toml:2: not valid TOML: Unescaped '\\' in a string (column 20). Write ",
        ),
        (
            "[model]\nname = 'a'\nname = 'b'\n",
            "run.toml:3: not valid TOML: Cannot overwrite a value (column 11). The key is there "
            "twice",
        ),
        (b"[model]\n\nname = '\xff'\n", "run.toml:3: byte 0xff is not UTF-8 text"),
        pytest.param(
            f"a = {'[' * 100000}", "run.toml: not valid TOML: nested too deeply", id="nested"
        ),
        pytest.param(f"a = {'9' * 5000}", "run.toml:1: not valid TOML: ", id="many digits"),
    ],
)
def test_message_for_a_corrupt_file(write, text, message):
    assert error_of(write(text)).startswith(message)


def test_message_for_a_file_that_cannot_be_read(tmp_path):
    missing = tmp_path / "no.toml"
    with pytest.raises(ConfigError) as caught:
        load_config(["--job.config_file", str(missing)])
    expected = f"job.config_file = '{missing}': cannot read it: No such file or directory"
    assert str(caught.value) == expected
    with pytest.raises(ConfigError, match="cannot read it: Is a directory"):
        load_config(["--job.config_file", str(tmp_path)])
    missing.write_text("\n")  # the defaults are the job of nobody who wrote a file
    with pytest.raises(ConfigError, match=r"^job\.config_file = '.*no\.toml': the file is empty$"):
        load_config(["--job.config_file", str(missing)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.steps", "0"], "--training.steps: must be >= 1, not 0"),
        (
            [f"--comm.timeout_seconds={2**63 - 1}"],
            f"--comm.timeout_seconds: must be >= 1 and <= 1000000000, not {2**63 - 1}",
        ),
        (["--training.steps=-1"], "--training.steps: must be >= 1, not -1"),
        (
            [f"--training.seq_len={2**31}"],
            "--training.seq_len: must be >= 1 and <= 2147483647, not 2147483648",
        ),
        (
            [f"--training.global_batch_size={2**31}"],
            "--training.global_batch_size: must be >= 1 and <= 2147483647 or -1, not 2147483648",
        ),
        (
            ["--optimizer.muon_lr=1e300"],
            "--optimizer.muon_lr: must be > 0 and <= 1e+30, not 1e+300",
        ),
        (["--training.max_norm", "nan"], "--training.max_norm: must be a number, not nan"),
        (["--optimizer.beta1", "1"], "--optimizer.beta1: must be >= 0 and < 1, not 1.0"),
        (["--training.seed=3"], "--training.seed: unknown key. It belongs to [debug]"),
        (
            ["--training.warmup-steps", "3"],
            "--training.warmup-steps: unknown key. It belongs to [lr_scheduler]",
        ),
        (
            ["--model.hf_assets_path=x", "--training.dataloader.num-workers", "2"],
            "--model.hf_assets_path: unknown key, from upstream torchtitan. Here: "
            "model.tokenizer_path\n--training.dataloader.num-workers: unknown key, from upstream "
            "torchtitan. Here: data.workers (threads); batches always go through pinned memory",
        ),
        (
            ["--experimental.custom_import", "x"],
            "--experimental.custom_import: unknown key, from upstream torchtitan. Here: "
            "job.custom_import",
        ),
        (
            ["--no-checkpoint.enable"],
            "--no-checkpoint.enable: unknown key. Here: --checkpoint.enable false",
        ),
        (
            ["--checkpoint.no_last_save_model_only", "--optimizer.no-early_step_in_backward"],
            "--checkpoint.no_last_save_model_only: unknown key. Here: "
            "--checkpoint.last_save_model_only false\n--optimizer.no-early_step_in_backward: "
            "unknown key, from upstream torchtitan. Here: none",
        ),
        (
            ["--metrics.log_frq", "3"],
            "--metrics.log_frq: unknown key. Did you mean 'log_freq'? Allowed: block_norm_freq, "
            "enable_tensorboard, enable_wandb, log_freq, progress, save_tb_folder, "
            "straggler_freq.",
        ),
        (
            ["--optimizer.no_decay", "bias", "norms"],
            "--optimizer.no_decay.1: 'norms' is not allowed. Did you mean 'norm'? Allowed: bias, "
            "embedding, norm.",
        ),
        (
            ["--compile.components", "model,loss"],
            "--compile.components.0: 'model,loss' is not allowed. On the command line, separate "
            "names by spaces",
        ),
        (
            ["--loss.name", "l2"],
            "--loss.name: 'l2' is not allowed. Allowed: chunked_cross_entropy, cross_entropy.",
        ),
        (["--lr", "3e-4"], "--lr: unknown option. Write --optimizer.lr"),
        (
            ["--steps=5"],
            "--steps: unknown option. Write --training.steps or --validation.steps",
        ),
        (
            ["--optimizer.rules.0.lr_scale", "0.1"],
            "--optimizer.rules.0.lr_scale: options change only the tables of the file, and it has "
            "0 [[optimizer.rules]]",
        ),
        (["--debug.seed", str(2**64)], "--debug.seed: must fit in 64 bits"),
        (
            ["--tyro-print-completion", "zzz"],
            "--tyro-print-completion: unknown option",
        ),
        (
            ["--job.description", "\udcff"],
            "--job.description: must be valid UTF-8 text without NUL characters, not '\\udcff'",
        ),
    ],
)
def test_message_for_a_wrong_value_on_the_command_line(argv, message):
    assert error_of(argv) == message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--training.steps", "abc"], ["--training.steps: must be an integer, not 'abc'"]),
        (["--training.steps", "1e3"], ["--training.steps: must be an integer, not 1000.0"]),
        (
            ["--lr_scheduler.total_steps", "x"],
            ["--lr_scheduler.total_steps: must be an integer, not 'x'"],
        ),
        (["--training.steps"], ["--training.steps", "Missing"]),
        (["--job.config_file"], ["--job.config_file", "Missing"]),
        (["--checkpoint.enable", "maybe"], ["--checkpoint.enable", "true or false", "'maybe'"]),
        (["train.txt"], ["Unrecognized", "train.txt"]),
    ],
)
def test_a_command_line_that_cannot_be_parsed_exits_with_2(argv, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        load_config(argv)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert all(word in captured.err for word in words)
    assert "typing." not in captured.err


def option_paths(config, prefix: str = "") -> list[str]:
    """`training.steps`, and so on for nested tables."""
    paths = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inner = dataclasses.is_dataclass(value)
        path = f"{prefix}{field.name}"
        paths += option_paths(value, f"{path}.") if inner else [path]
    return paths


def test_help_lists_every_option_with_its_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for path in option_paths(JobConfig()):
        if path.rpartition(".")[2] not in ("rules", "sources", "phases"):  # tables: file only
            assert f"--{path} " in shown
    assert "Optimizer steps of the run. (default: 10000)" in shown


def test_print_config_prints_a_file_that_loads_to_the_same_config(write, capsys, tmp_path):
    argv = ["--training.steps", "5", "--optimizer.lr=1e-9"]
    with pytest.raises(SystemExit) as caught:
        load_config([*argv, "--job.print_config"])
    assert caught.value.code == 0
    expected = load_config(argv)
    again = load_config(write(capsys.readouterr().out))
    again.job.config_file = None
    assert again == expected


def test_print_config_hides_passwords(capsys):
    with pytest.raises(SystemExit):
        load_config(["--checkpoint.folder=sftp://me:hunter2@host/a", "--job.print_config"])
    assert 'folder = "sftp://me:***@host/a"' in capsys.readouterr().out


def test_only_one_rank_prints_the_config(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        load_config(["--job.print_config"])
    assert capsys.readouterr().out == ""


def test_print_config_in_a_file_stops_no_run(write, capsys):
    """As in upstream's files; a scheduler would take exit code 0 for a run that is done."""
    argv = write("[job]\nprint_config = true\n[training]\nsteps = 5")
    assert load_config(argv).job.print_config
    assert capsys.readouterr().out == ""  # of a command that plans the job, say
    assert not load_config([*argv, "--job.print_config=false"]).job.print_config
    with pytest.raises(SystemExit):
        load_config([*argv, "--job.print_config"])
    assert "steps = 5" in capsys.readouterr().out


def test_awkward_values_survive_the_round_trip(write):
    config = JobConfig()
    config.job.description = 'quotes " \\ \n\r\t \x7f \x01 é 😀 #'
    config.training.max_norm = math.inf
    config.optimizer.eps = 1e-300
    config.optimizer.no_decay = ["norm", "bias"]
    config.optimizer.rules = [ParamRule(r"layers\.0\..*", 0.5, 0.0), ParamRule("x")]
    config.lr_scheduler.decay_ratio = 0.25
    config.debug.seed = 2**63 - 1
    argv = write(to_toml(config))
    again = load_config(argv)
    assert again.job.config_file == argv[1]
    again.job.config_file = None
    assert again == config


def test_origin_names_the_line_or_the_key(write):
    argv = write("[training]\n\nsteps = 5\nseq_len = 64\n[[optimizer.rules]]\npattern = 'a'\n")
    config = load_config([*argv, "--training.seq_len", "32"])
    assert origin(config, "training.steps") == f"{argv[1]}:3: [training] steps = 5"
    assert origin(config, "training.seq_len") == "training.seq_len = 32"
    assert origin(config, "model.name") == 'model.name = "llama3"'
    rule = 'optimizer] rules[0].pattern = "a"'
    assert origin(config, "optimizer.rules.0.pattern") == f"{argv[1]}:6: [{rule}"
    assert origin(config, "optimizer.rules.0") == f"{argv[1]}:5: [optimizer] rules[0]"
    Path(argv[1]).unlink()
    assert origin(config, "training.steps") == "training.steps = 5"


def test_importing_the_config_does_not_import_torch():
    code = "import sys, torchtitan.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_file_may_stand_alone(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = 3\n")
    file = str(path)
    for argv in (
        [file, "--training.seq_len", "8"],
        ["--training.seq_len=8", file],
        ["--training.seq_len", "8", file],
    ):
        config = load_config(argv)
        assert (config.job.config_file, config.training.steps, config.training.seq_len) == (
            file,
            3,
            8,
        )
    assert load_config(["--job.description", file]).job.config_file is None
    for more in ([file], ["--job.config_file", "other.toml"], ["--job.config-file=other.toml"]):
        with pytest.raises(ConfigError, match="a run takes only one config file"):
            load_config([file, *more])


def test_a_field_of_a_source_on_the_command_line(tmp_path):
    path = tmp_path / "mix.toml"
    path.write_text('[[data.sources]]\ndataset = "stdlib"\nweight = 2\n' * 2)
    sources = load_config([str(path), "--data.sources.0.weight", "0.5"]).data.sources
    assert [source.weight for source in sources] == [0.5, 2]
