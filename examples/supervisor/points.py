"""Decision points as files: questions with their pictures and clips, replies, labels.

Nothing outside of the folder is read, whatever its files name, and nothing in it is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import imageio.v3 as iio
from pydantic import BaseModel, Field, model_validator

import collabvr
from collabvr import Clip, Problem, explained
from examples import runs


def store(folder: Path, part) -> Any:
    """A text as it is; a picture or clip, exact, as a file in folder/media, once."""
    if isinstance(part, str):
        return part
    is_clip = isinstance(part, Clip)
    name = collabvr.digest(part)[:16] + (".mkv" if is_clip else ".png")
    path = folder / "media" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        png_or_mkv = collabvr.lossless(part) if is_clip else iio.imwrite(
            "<bytes>", part, extension=".png")
        collabvr.write_file(path, png_or_mkv)
    return {"clip": name, "fps": part.fps} if is_clip else {"picture": name}


def restore(folder: Path, part) -> Any:
    """What `store` was given. Raises Problem."""
    if isinstance(part, str):
        return part
    with explained(f"{folder}/points.jsonl names {part}, which is no picture or clip in "
                   f"{folder}/media", Exception):  # whatever it is
        name = part["clip"] if "clip" in part else part["picture"]
        path = runs.inside(folder / "media" / name, folder / "media")
        if path is None:
            raise FileNotFoundError(name)
        if "clip" in part:
            return Clip(runs.read_frames(path.read_bytes(), "matroska"), float(part["fps"]))
        return runs.read_picture(path.read_bytes())


def read_objects(path: Path) -> list[dict]:
    """The lines of a file, each an object with an id. Raises Problem."""
    found = []
    with explained(f"{path} cannot be read", OSError):
        for number, value in runs.read_lines(path):
            if not (isinstance(value, dict) and isinstance(value.get("id"), str)):
                raise Problem(f"{path}, line {number}: no object with an id.")
            found.append(value)
    return found


def read_replies(path: Path) -> dict[str, dict | None]:
    """What export or ask wrote, by id; None: no usable reply. Raises Problem."""
    replies = {}
    for line in read_objects(path):
        if line.keys() not in ({"id", "reply"}, {"id", "fault"}):
            raise Problem(f"{path} holds no replies: {line['id']} has neither reply nor fault.")
        replies[line["id"]] = line.get("reply")
    return replies


class Label(BaseModel, strict=True, extra="forbid"):
    id: str
    steps: int | None = Field(None, ge=0)
    verdict: Literal["accept", "reject"] | None = None
    suggestion: str | None = None
    rating: int | None = Field(None, ge=1, le=3)

    @model_validator(mode="after")
    def is_of_one_kind(self):
        kinds = [{"steps"}, {"verdict"}, {"suggestion", "rating"}]
        if self.model_dump(exclude_none=True).keys() - {"id"} not in kinds:
            raise ValueError("beside id a label has steps, or verdict, or suggestion and rating")
        return self


def read_labels(path: Path) -> list[Label]:
    """Raises Problem for what is no label, or labels a point twice."""
    found: dict[tuple, Label] = {}
    for number, line in enumerate(read_objects(path), 1):
        with explained(f"{path}, label {number}, is none", ValueError):
            label = Label.model_validate(line)
            if (label.id, label.suggestion) in found:
                raise ValueError(f"{label.id} has this label already")
        found[label.id, label.suggestion] = label
    if not found:
        raise Problem(f"{path} holds no labels.")
    return list(found.values())
