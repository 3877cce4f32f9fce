"""Data sets as samples, one after the other: VBVR-Bench, Gen-ViRe, a JSONL, a folder of pictures.

    for x in samples("VBVR-Bench"):
        print(x.id, x.task, x.seconds)
"""
from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from commands import needed

from collabvr import Problem, explained

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Sample:
    id: str  # its place below runs/ and videos/, of one part or several
    image: str | bytes  # a path, or what a picture's file holds
    task: str
    category: str = ""
    seconds: float | None = None  # of every clip; None: as Config says
    folders: tuple[str, ...] = ("",)  # in videos/, {} being the method


def samples(data: str, task: str = "") -> Iterator[Sample]:
    """One after the other, pictures unread. Raises Problem."""
    path = Path(data)
    trees = (path / "VBVR-Bench.json").exists() or any(path.glob("*/*/*/first_frame.png"))
    saved = any((path / x).exists() for x in ("dataset_dict.json", "state.json"))
    kind = vbvr if trees else jsonl if path.is_file() else pictures
    if saved or not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        kind = gen_vire
    with explained(f"{data} cannot be read as a data set", OSError, KeyError, ValueError, TypeError,
                   av.FFmpegError):
        for x in kind(path, task):
            if not isinstance(x.task, str) or not x.task.strip():
                raise Problem(f"{data}: sample {x.id} has no task.")
            yield replace(x, task=x.task.strip())


def named(*parts) -> str:
    """An id that stays below its folder and is kept as it is, for evaluators look for it."""
    for part in map(str, parts):
        if not part.strip(". ") or set("/\\") & set(part) or not part.isprintable() or (
                len(part.encode()) > 200):
            raise Problem(f"{part[:99]!r} is no sample id: it must be a file's name of 1 to 200 "
                          "bytes, without slashes and not of dots only.")
    return "/".join(map(str, parts))


def vbvr(root: Path, _) -> Iterator[Sample]:
    """VBVR-Bench. Every clip is as long as the sample's ground truth (App. A.1)."""
    if (root / "VBVR-Bench.json").exists():
        entries = json.loads((root / "VBVR-Bench.json").read_bytes())
    else:
        found = sorted(root.glob("*/*/*/first_frame.png"))
        entries = ({"first_frame_path": str(x.relative_to(root)),
                    "prompt": x.with_name("prompt.txt").read_text()} for x in found)
    for x in entries:
        split, task, index = Path(x["first_frame_path"]).parts[-4:-1]
        image: str | bytes = str(place := root / x["first_frame_path"])
        if not place.exists():
            image = base64.b64decode(x["first_image"].rpartition(",")[2])
        truth = Path(root, split, task, index, "ground_truth.mp4")
        with av.open(root / x.get("ground_truth_video_path", truth)) as file:
            stream = file.streams.video[0]
            seconds = round(float(stream.duration * stream.time_base), 3)
        yield Sample(named(split, task, index.zfill(5)), image, x["prompt"], split, seconds)


def gen_vire(path: Path, _) -> Iterator[Sample]:
    """Gen-ViRe. Its scripts want five run folders: each gets a copy of the one run."""
    datasets = needed("datasets")
    with explained(f"{path} cannot be loaded", Exception):  # whatever hub and files raise
        load = datasets.load_from_disk if path.exists() else datasets.load_dataset
        rows = load(str(path))
        rows = rows["train"] if isinstance(rows, dict) else rows
        rows = rows.cast_column("image", datasets.Image(decode=False))
    folders = tuple(f"0_generated_videos/{{0}}/{{0}}_{k}" for k in range(5))
    for x in rows:
        yield Sample(named(x["main_category"], x["sub_category"], x["id"]),
                     x["image"]["bytes"] or x["image"]["path"], x["i2v_prompt"], x["main_category"],
                     folders=folders)


def jsonl(path: Path, _) -> Iterator[Sample]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with explained(f"{path} cannot be read, line {number}", ValueError, KeyError,
                               TypeError):
                    x = json.loads(line)
                    sample = Sample(named(x["id"]), str(path.parent / x["image"]), x["task"],
                                    str(x.get("category") or ""))
                yield sample


def pictures(path: Path, task: str) -> Iterator[Sample]:
    for x in sorted(path.iterdir()):
        hidden = x.name.startswith(".") or not x.is_file()
        if not hidden and x.suffix.lower() in PICTURES:
            yield Sample(named(x.stem), str(x), task)
