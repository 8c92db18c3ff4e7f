import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

import torchtitan
from torchtitan import cli
from torchtitan.errors import ConfigError, DataError


def run(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torchtitan", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands():
    done = run("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name, (_, text) in cli.COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert text in done.stdout


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from torchtitan.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'datasets'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_no_command_shows_the_help_and_fails():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: torchtitan <command>")


def test_version():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"torchtitan {torchtitan.__version__}\n")


def test_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian", "--help"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    allowed = ", ".join(sorted(cli.COMMANDS))
    assert captured.err == (
        f"error: unknown command 'trian'. Did you mean 'train'? Allowed: {allowed}.\n"
    )


def test_a_command_gets_its_arguments_and_gives_the_exit_code(monkeypatch):
    received = []

    def main(argv):
        received.append(argv)
        return 3

    monkeypatch.setitem(sys.modules, "a_command", types.SimpleNamespace(main=main))
    monkeypatch.setitem(cli.COMMANDS, "run", ("a_command", "runs"))
    assert cli.main(["run", "--x", "1"]) == 3
    monkeypatch.setattr(sys, "argv", ["torchtitan", "run"])
    assert cli.main() == 3
    assert received == [["--x", "1"], []]


@pytest.mark.parametrize("error", [ConfigError("steps: too few"), DataError("steps: too few")])
def test_a_users_mistake_is_one_line_and_exit_code_2(error, capsys):
    with pytest.raises(SystemExit) as caught, cli.exit_on_user_error():
        raise error
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: steps: too few\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.exit_on_user_error():
        raise ZeroDivisionError


def test_ctrl_c_is_shown_in_one_line_and_ends_the_process_by_its_signal(tmp_path):
    program = tmp_path / "program.py"  # Python 3.13 exits with 1 if it is an argument, `-c`
    program.write_text("""
import signal, sys
import torchtitan.cli as cli
cli.COMMANDS = {"models": ("torchtitan.cli", "")}
cli._import = lambda name: signal.raise_signal(signal.SIGINT)
cli.main(["models"])
""")
    command = [sys.executable, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert re.fullmatch(r"interrupted at torchtitan/cli\.py:\d+, in main\n", done.stderr)


def test_other_errors_are_shown_as_before_once_ctrl_c_was_handled(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    with pytest.raises(KeyboardInterrupt), cli.exit_on_user_error():
        raise KeyboardInterrupt
    error = ValueError("another")
    sys.excepthook(ValueError, error, None)
    assert shown == [(ValueError, error, None)] and not capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["plan", "--help"]])
def test_output_that_nobody_reads_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "torchtitan", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_other_broken_pipes_are_errors():
    with pytest.raises(BrokenPipeError), cli.exit_when_unread():
        raise BrokenPipeError


def test_windows_is_told_what_to_use(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as caught:
        cli.main(["train"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error: torchtitan runs on Linux and macOS; on Windows, start it in WSL\n"
    )
