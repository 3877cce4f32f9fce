"""What the command lines of the examples share."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

import tyro

from collabvr import Problem, explained


def needed(name: str):
    """A package that only some of this needs, imported. The name is ours, never from data."""
    with explained(f"{name} is needed: pip install -r examples/requirements.txt", ImportError):
        return importlib.import_module(name)


def program() -> str:
    """What the user typed: `python -m examples.report`, or `python mine.py`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return f"python {sys.argv[0]}"
    return f"python -m {spec.name.removesuffix('.__main__')}"


def guarded(action: Callable[[], int]) -> int:
    """The exit status of action(): after a Problem 2, after Ctrl-C 130, each with a sentence."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")  # they do not fit tyro's box
    try:
        return action()
    except SystemExit as end:  # of tyro, which has said what is wrong; or --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        status, sentence = 130, "Interrupted. The same command goes on from here."
    except (Problem, OSError) as error:
        status, sentence = 2, " ".join(str(error).split())
    print(f"{program()}: {sentence}", file=sys.stderr)
    return status


def command(doc: str | None, kinds: type | dict[str, type], argv: list[str] | None) -> int:
    """A guarded command line. A dataclass is its options, and has a run() -> exit status.

    A dict holds one for each subcommand.
    """
    parse: Callable = tyro.cli
    if isinstance(kinds, dict):
        parse = tyro.extras.subcommand_cli_from_dict
    options = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return guarded(lambda: parse(
        kinds, prog=program(), description=doc, args=argv, config=options).run())
