"""What the scripts here share: commands and their options, methods by name, optional imports."""
from __future__ import annotations

import importlib
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from baselines import METHODS

import collabvr
from collabvr import CollabVR, Problem, explained


def needed(name: str):
    """An import that only some of this needs. Raises Problem."""
    with explained(f"{name} is needed: pip install -r examples/requirements.txt", ImportError):
        return importlib.import_module(name)


def method(name: str) -> type[CollabVR]:
    """A method by its name in baselines.py, or as FILE.py:NAME. Raises Problem."""
    file, colon, attribute = name.rpartition(":")
    if not colon and name in METHODS:
        return METHODS[name]
    with explained(f"--method {name} cannot be had; it takes FILE.py:NAME or one of "
                   f"{', '.join(METHODS)}", Exception):  # whatever the file raises
        sys.path.append(str(Path(file).resolve().parent))  # for what lies beside it
        found = runpy.run_path(file, run_name="method")[attribute]
        if not callable(getattr(found, "run", None)):
            raise TypeError("a method is a class with run(I0, q)")
        return found


def guarded(prog: str, action: Callable[[], int]) -> int:
    """The exit status that action() returns; 2 after bad input, in one sentence on stderr; 130
    after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        return action()
    except KeyboardInterrupt:
        status, said = 130, "Interrupted. The same command goes on from here."
    except (Problem, OSError) as error:
        status, said = 2, " ".join(str(error).split())
    print(f"{prog}: {collabvr.clean(said)}", file=sys.stderr)
    return status


def run(prog: str, help: str, kinds: dict[str, type], argv: list[str] | None) -> int:
    """Runs `PROG NAME OPTIONS`, guarded: kinds[NAME] is a dataclass of its options, with a run()
    that returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]

    def action() -> int:
        if name in ("-h", "--help"):
            print(help)
            return 0
        if name not in kinds:
            raise Problem(f"{name!r:.99} is none of {', '.join(kinds)}.")
        return collabvr.parse(rest, kinds[name], f"{prog} {name}").run()

    return guarded(prog, action)
