"""Commands by name, fast help, and bad input as one line."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hsd.cli import __main__ as cli

HELP = """
import sys
from hsd.cli.__main__ import main
code = main({argv})
heavy = sorted({{"torch", "transformers", "trl", "datasets", "matplotlib"}} & set(sys.modules))
sys.exit(f"imported {{heavy}}" if heavy else code)
"""


@pytest.mark.parametrize("argv", [["--help"], ["-h"]])
def test_help_imports_nothing_heavy(argv):
    done = subprocess.run([sys.executable, "-c", HELP.format(argv=argv)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


def test_no_command_shows_the_commands_and_fails(capsys):
    assert cli.main([]) == 2
    assert "train" in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    assert cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: command: expected one of init, train, ") and "'trian'" in error


@pytest.fixture
def command(monkeypatch):
    """`hsd train` replaced by a command that raises what it is told to."""
    module = SimpleNamespace(HELP="help", add_arguments=lambda parser: parser.add_argument("--n", type=int))
    monkeypatch.setattr(cli, "load", lambda name: module)
    return module


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, ModuleNotFoundError])
def test_bad_input_is_one_line(error, command, capsys, monkeypatch):
    def run(args):
        raise error("name: expected this,\n  got that")

    command.run = run
    assert cli.main(["train"]) == 2
    assert capsys.readouterr().err == "error: name: expected this, got that\n"
    with pytest.raises(error):
        cli.main(["train", "--traceback"])
    monkeypatch.setenv("HSD_TRACEBACK", "1")
    with pytest.raises(error):
        cli.main(["train"])
    monkeypatch.setenv("HSD_TRACEBACK", "0")
    assert cli.main(["train"]) == 2


def test_ctrl_c_is_one_line(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command.run = run
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["train", "--traceback"])


def test_a_bug_keeps_its_traceback(command):
    def run(args):
        raise RuntimeError("training stopped")

    command.run = run
    with pytest.raises(RuntimeError):
        cli.main(["train"])


def test_bad_arguments_are_one_line_and_exit_codes_pass_through(command, capsys):
    command.run = lambda args: 143
    assert cli.main(["train", "--n", "3"]) == 143
    assert cli.main(["train", "--n", "x"]) == 2
    assert cli.main(["train", "--m", "3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "--n" in lines[0] and "--m" in lines[1]


def test_a_reader_that_has_enough_is_no_error():
    program = "import os, sys; from hsd.cli.__main__ import main; sys.exit(main(['--help']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_of_another_kind_is_an_error(command, capsys):
    def run(args):
        raise BrokenPipeError(32, "Broken pipe", "the child's stdin")

    command.run = run
    assert cli.main(["train"]) == 2
    assert "the child's stdin" in capsys.readouterr().err
