"""What the examples share: intervals, tables, run folders, words for statuses, command lines."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

import collabvr
from collabvr import Clip, Models, Problem, explained

# ------------------------------------------------------------------------------
# Intervals of 95 %, and a table as text


def wilson(hits) -> tuple[float, float]:
    """Of a share, from its zeros and ones (Wilson's interval)."""
    x, z = np.asarray(list(hits), float), 1.96
    n, p = len(x), x.mean()
    middle = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return float((middle - half) / (1 + z**2 / n)), float((middle + half) / (1 + z**2 / n))


def bootstrap(statistic: Callable[..., float], *columns) -> tuple[float, float]:
    """Of any statistic of one or more columns, whose rows are drawn together 2,000 times."""
    arrays = [np.asarray(list(column)) for column in columns]
    n = len(arrays[0])
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    values = [statistic(*(x[draw] for x in arrays)) for draw in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def paired(first, second) -> tuple[float, float, float]:
    """The mean of second minus first, pair by pair, and its interval."""
    differences = np.asarray(list(second), float) - np.asarray(list(first), float)
    return float(differences.mean()), *bootstrap(np.mean, differences)


def percent(hits, digits: int = 0) -> str:
    """A share with its interval: '57 % (47-66)', or '-' of nothing."""
    hits = list(hits)
    if not hits:
        return "-"
    low, high = wilson(hits)
    return f"{100 * np.mean(hits):.{digits}f} % ({100 * low:.0f}-{100 * high:.0f})"


def estimate(statistic: Callable[..., float], *columns, digits: int = 3) -> str:
    """A statistic with its interval: '0.366 (0.30-0.42)', or '-' of fewer than two rows."""
    arrays = [np.asarray(list(column)) for column in columns]
    if len(arrays[0]) < 2:
        return "-"
    low, high = bootstrap(statistic, *arrays)
    return f"{statistic(*arrays):.{digits}f} ({low:.2f}-{high:.2f})"


@dataclass
class Table:
    """Numbers and texts under a head. The first column is the name of a row."""

    title: str  # "": none is printed
    head: list[str]
    rows: list[list]

    def cells(self) -> list[list[str]]:
        """All as text, the head first."""
        return [self.head] + [[shown(x) for x in row] for row in self.rows]

    def text(self) -> str:
        """For a terminal: columns of equal width."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.title] if self.title else []
        for name, *values in cells:
            row = [name.ljust(widths[0])]
            row += [x.rjust(width) for x, width in zip(values, widths[1:], strict=True)]
            lines.append("  ".join(row).rstrip())
        return "\n".join([*lines, ""])

    def markdown(self) -> str:
        """For a README."""
        lines = [f"**{self.title}**", ""] if self.title else []
        for number, row in enumerate(self.cells()):
            cells = [" ".join(x.replace("|", "\\|").split()) for x in row]
            lines.append(f"| {' | '.join(cells)} |")
            if number == 0:
                lines.append("|---|" + "---:|" * (len(self.head) - 1))
        return "\n".join([*lines, ""])


def shown(x) -> str:
    """A cell: what is unknown is a dash, a fraction has three decimals."""
    if x is None:
        return "-"
    if isinstance(x, str):
        return x
    return f"{x:,}" if isinstance(x, int) else f"{x:,.3f}"


# ------------------------------------------------------------------------------
# Files of others: nothing outside the folder is read, nothing in it is run


class Status(NamedTuple):
    word: str  # for people
    tone: str  # good, fair, bad or dim
    meaning: str


STATUS = {  # of a run, from good to bad
    "complete": Status("complete", "good", "The models call the task done."),
    "step_cap": Status("step limit", "fair", "The last allowed step is over, the task not done."),
    "unverified": Status("not verified", "fair", "The method that made the video checks nothing."),
    "fallback": Status("fallback", "fair", "One clip for the whole task, which nothing checked."),
    "best_attempt": Status("nothing accepted", "bad", "The video is the best rejected attempt."),
    "unfinished": Status("unfinished", "dim", "No result yet; the same command goes on from here."),
    "unanswered": Status("no call was answered yet", "dim", "The same command tries it again."),
    "failed": Status("failed", "bad", "The last call failed; the same command tries it again."),
    "unreadable": Status("unreadable", "bad", "The folder is damaged."),
}


def inside(path: Path, root: Path) -> Path | None:
    """The file, if there is one and it really lies in `root`: no link and no '..' leads out."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a loop of links, a null byte
        real = path.resolve()
        if real.is_relative_to(root.resolve()) and real.is_file():
            return real
    return None


def read_picture(data: bytes) -> np.ndarray:
    """A PNG, uint8 RGB, and nothing else: other formats start programs or name other files."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return np.array(image.convert("RGB"))


def read_frames(data: bytes, kind: str) -> np.ndarray:
    """A video of that kind, uint8 RGB (T, H, W, 3), and no playlist, which names other files."""
    with av.open(io.BytesIO(data), format=kind) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def read_json(path: Path | None) -> dict:
    """The object in a file; {} if there is none. Raises ValueError, TypeError."""
    if path is None:
        return {}
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise TypeError(f"{path.name} holds no object")
    return found


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file's lines, each with its line number. Raises Problem, OSError."""
    with open(path, "rb") as file:  # as bytes: a text's U+2028 is no end of a line
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                with explained(f"{path}, line {number}, is no JSON in UTF-8", ValueError):
                    value = json.loads(line.decode())
                yield number, value


def write_lines(path: Path, rows: list) -> None:
    """A JSON value on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    collabvr.write_file(path, "".join(json.dumps(x) + "\n" for x in rows).encode())


@dataclass
class Run:
    """A run folder of collabvr.py, as it was read."""

    folder: Path
    status: str  # a key of STATUS, or a word of somebody's own method
    notes: list[str]  # sentences that belong to the status
    calls: list  # of collabvr.Call; all that there are if the run is unfinished
    facts: dict  # what start.json and trace.json say: task, settings, score, ..

    def file(self, name: str) -> Path | None:
        """A file of the folder; None if it is missing or leads elsewhere."""
        return inside(self.folder / name, self.folder)

    def cost(self) -> dict:
        models = Models(None, None)
        models.calls = self.calls
        return models.cost()

    def picture(self) -> np.ndarray | None:
        """The input image. Raises Problem."""
        path = self.file("input.png")
        if path is None:
            return None
        with explained(f"{path} is no PNG", Exception):  # whatever a damaged file raises
            return read_picture(path.read_bytes())

    def video(self) -> Path | None:
        """The final video of a finished run; beside no trace.json it would be an older run's."""
        return self.file("video.mp4") if "status" in self.facts else None

    def frames(self) -> np.ndarray | None:
        """The frames of the final video. Raises Problem."""
        path = self.video()
        if path is None:
            return None
        with explained(f"{path} is no MP4", Exception):  # whatever a damaged file raises
            return read_frames(path.read_bytes(), "mp4")

    def clip(self, call) -> Clip | None:
        """The clip of a call to the generator; None if it is missing, elsewhere or damaged."""
        path = self.file(call.clip) if call.clip else None
        if path is None:
            return None
        try:
            return Clip(read_frames(path.read_bytes(), "matroska"), call.size[2])
        except Exception:  # noqa: BLE001  whatever a damaged file raises
            return None


def load_run(folder: Path, root: Path | None = None) -> Run:
    """Reads a run folder, which lies in `root` if one is given. Raises Problem."""
    root = root or folder
    start_file, trace_file, journal = [
        inside(folder / name, root) for name in ("start.json", "trace.json", "calls.jsonl")]
    with explained(f"{folder} holds no run of collabvr.py", Exception):  # whatever it holds
        start, trace = read_json(start_file), read_json(trace_file)
        notes = []
        if trace:
            calls = [collabvr.Call.model_validate(x) for x in trace["calls"]]
            status = str(trace["status"])
            steps = ", ".join(str(t) for t in trace["unverified_steps"])
            if steps:
                notes.append(f"In the video without an accept: step {steps}.")
            if start.get("settings") != trace.get("settings"):
                notes.append("A later start with other settings is unfinished.")
        else:
            calls, status = [], "unfinished"
            *lines, _ = (journal.read_bytes() if journal else b"").split(b"\n")  # _: torn
            for line in lines:
                if line.strip():
                    calls.append(collabvr.Call.model_validate(json.loads(line)))
            if not calls:
                status = "unanswered"
            elif calls[-1].error or calls[-1].fault:
                status = "failed"
                notes.append(f"{calls[-1].role}: {calls[-1].error or calls[-1].fault}")
        facts = start | trace
        if not isinstance(facts.get("task", ""), str):
            raise TypeError("the task is no text")
        if not math.isfinite(facts.get("score", 0)):  # TypeError: it is no number
            raise ValueError("the score is no number")
        return Run(folder, status, notes, calls, facts)


# ------------------------------------------------------------------------------
# Command lines


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


class Output:
    """Standard output. That nobody reads it, or that it has no room, does not spoil the work."""

    def __init__(self, stream):
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # no file name stops a print
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # what is still to come goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def guarded(action: Callable[[], int]) -> int:
    """The exit status of action(); after a Problem 2, and 130 after SIGINT or SIGTERM, each with
    a sentence on stderr."""
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")  # they do not fit tyro's box
    ours = threading.current_thread() is threading.main_thread()
    if ours:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.redirect_stdout(Output(sys.stdout or io.StringIO())):  # type: ignore
            return action()
    except SystemExit as end:  # of tyro, which has said what is wrong; or --help
        return int(end.code or 0)
    except KeyboardInterrupt:
        status, sentence = 130, "Interrupted. The same command goes on from here."
    except (Problem, OSError) as error:
        status, sentence = 2, " ".join(str(error).split())
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
    print(collabvr.clean(f"{program()}: {sentence}"), file=sys.stderr)
    return status


def command(doc: str | None, kinds: type | dict[str, type], argv: list[str] | None) -> int:
    """A guarded command line. A dataclass is its options, and has a run() -> exit status; a dict
    holds one for each subcommand."""
    import tyro
    how: dict = {
        "prog": program(), "description": doc, "args": argv,
        "config": (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    }

    def action() -> int:
        if isinstance(kinds, dict):
            return tyro.extras.subcommand_cli_from_dict(kinds, **how).run()
        return tyro.cli(kinds, **how).run()

    return guarded(action)
