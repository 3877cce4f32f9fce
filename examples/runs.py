"""Run folders, and other files that somebody else may have made.

Nothing outside the folder is read, nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image
from pydantic import BaseModel, FiniteFloat

import collabvr
from collabvr import Call, Clip, Models, explained


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


# ------------------------------------------------------------------------------
# Files


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
    with av.open(io.BytesIO(data), "r", format=kind) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def read_json(path: Path | None) -> dict:
    """The object in a file; {} if there is none. Raises ValueError, TypeError."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise TypeError(f"{path.name} holds no object")
    return found


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file's lines, each with its line number. Raises Problem, OSError."""
    with open(path, "rb") as file:  # as bytes: a text's U+2028 is no end of a line
        for number, line in enumerate(file, 1):
            if line.strip():
                with explained(f"{path}, line {number}, is no JSON in UTF-8", ValueError):
                    value = json.loads(line)
                yield number, value


def write_lines(path: Path, rows: list) -> None:
    """A JSON value on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    collabvr.write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


# ------------------------------------------------------------------------------
# Runs


class Trace(BaseModel, extra="allow"):
    """What is read in trace.json; all else in it is kept as it is."""

    task: str = ""
    status: str | None = None  # None: the run is not over
    unverified_steps: list[int] = []
    score: FiniteFloat | None = None
    calls: list[Call] = []


@dataclass
class Run:
    """A run folder of collabvr.py, as it was read."""

    folder: Path
    status: str  # a key of STATUS, or a word of somebody's own method
    notes: list[str]  # sentences that belong to the status
    calls: list[Call]
    facts: dict  # what else trace.json says: task, settings, score, ..

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
        """The final video of a finished run."""
        return self.file("video.mp4") if self.facts.get("status") else None

    def frames(self) -> np.ndarray | None:
        """The frames of the final video. Raises Problem."""
        path = self.video()
        if path is None:
            return None
        with explained(f"{path} is no MP4", Exception):  # whatever a damaged file raises
            return read_frames(path.read_bytes(), "mp4")

    def clip(self, call: Call) -> Clip | None:
        """The clip of a call to the generator; None if it is missing, elsewhere or damaged."""
        path = self.file(call.clip) if call.clip else None
        if path is None or call.size is None:
            return None
        with contextlib.suppress(Exception):  # whatever a damaged file raises
            return Clip(read_frames(path.read_bytes(), "matroska"), call.size[2])
        return None


def load_run(folder: Path, root: Path | None = None) -> Run:
    """Reads a run folder, which lies in `root` if one is given. Raises Problem."""
    with explained(f"{folder} holds no run of collabvr.py", Exception):  # whatever it holds
        trace = Trace.model_validate(read_json(inside(folder / "trace.json", root or folder)))
    facts = trace.model_dump(exclude={"calls"}, exclude_unset=True)
    notes = []
    status = trace.status
    if status is not None:
        if trace.unverified_steps:
            steps = ", ".join(map(str, trace.unverified_steps))
            notes.append(f"In the video without an accept: step {steps}.")
    elif not trace.calls:
        status = "unanswered"
    elif trace.calls[-1].fault:
        status = "failed"
        notes.append(f"{trace.calls[-1].role}: {trace.calls[-1].fault}")
    else:
        status = "unfinished"
    return Run(folder, status, notes, trace.calls, facts)


class Verdict(NamedTuple):
    """What the verifier said of one clip."""

    t: int  # step
    j: int  # attempt at the step
    accepted: bool


def verdicts(calls: list[Call]) -> list[Verdict]:
    """One for each clip that was verified, in order. If the verifier was asked several times
    about a clip, most of its replies decide."""
    found: list[tuple[Call, list[bool]]] = []  # clips, each with its replies
    for call in calls:
        if call.role == "vgm":
            found.append((call, []))
        elif call.role == "verifier" and call.reply and found:
            found[-1][1].append(call.reply.get("verdict") == "accept")
    return [Verdict(clip.t, clip.j or 1, sum(replies) > len(replies) / 2)
            for clip, replies in found if replies]
