"""Run folders, and other files that somebody else may have made.

Nothing outside the folder is read, nothing in it is executed.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image

import collabvr
from collabvr import Clip, Models, explained


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
    with explained(f"{folder} holds no run of collabvr.py", Exception):  # whatever it holds
        facts = read_json(inside(folder / "trace.json", root or folder))
        calls = [collabvr.Call.model_validate(call) for call in facts.pop("calls", [])]
        if not isinstance(facts.get("task", ""), str):
            raise TypeError("the task is no text")
        if not math.isfinite(facts.get("score", 0)):  # TypeError: it is no number
            raise ValueError("the score is no number")
        notes = []
        status = facts.get("status")
        if status is not None:
            status = str(status)
            steps = ", ".join(str(t) for t in facts["unverified_steps"])
            if steps:
                notes.append(f"In the video without an accept: step {steps}.")
        elif not calls:
            status = "unanswered"
        elif calls[-1].fault:
            status = "failed"
            notes.append(f"{calls[-1].role}: {calls[-1].fault}")
        else:
            status = "unfinished"
        return Run(folder, status, notes, calls, facts)
