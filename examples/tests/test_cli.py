"""Command lines of the examples."""

import importlib.machinery
import sys
import types
from dataclasses import dataclass

import pytest

from collabvr import Problem
from examples import cli


@dataclass
class Say:
    word: str = "hello"
    loud: bool = False

    def run(self) -> int:
        if self.word == "wrong":
            raise Problem("This word\nis wrong.")
        if self.word == "stop":
            raise KeyboardInterrupt
        print(self.word.upper() if self.loud else self.word)
        return 0


def test_a_command_runs_and_returns_its_status(capsys):
    assert cli.command("Doc.", Say, ["--loud"]) == 0
    assert cli.command("Doc.", {"one": Say, "two": Say}, ["two", "--word", "x"]) == 0
    assert capsys.readouterr().out == "HELLO\nx\n"


@pytest.mark.parametrize("word, status, sentence", [
    ("wrong", 2, "This word is wrong."),
    ("stop", 130, "Interrupted. The same command goes on from here."),
])
def test_what_ends_a_command_is_one_sentence(word, status, sentence, capsys):
    assert cli.command("Doc.", Say, ["--word", word]) == status
    assert capsys.readouterr().err == f"{cli.program()}: {sentence}\n"


def test_a_wrong_option_is_status_2_and_help_is_0(capsys):
    assert cli.command("Doc.", Say, ["--bogus"]) == 2
    assert "--bogus" in capsys.readouterr().err
    assert cli.command("Doc.", Say, ["--help"]) == 0
    assert "Doc." in capsys.readouterr().out


@pytest.mark.parametrize("module, typed", [
    ("examples.report.__main__", "python -m examples.report"),
    ("examples.maze.run", "python -m examples.maze.run"), (None, "python mine.py")])
def test_messages_name_the_program_as_it_was_typed(module, typed, monkeypatch, capsys):
    """In usage lines of subcommands, too."""
    main = types.ModuleType("__main__")
    main.__spec__ = module and importlib.machinery.ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["mine.py"])
    assert cli.command("Doc.", {"one": Say, "two": Say}, ["two", "--help"]) == 0
    assert f"usage: {typed} two " in capsys.readouterr().out


def test_a_missing_package_says_what_to_install():
    with pytest.raises(Problem, match="no_such is needed: pip install -r examples/requirements"):
        cli.needed("no_such")
