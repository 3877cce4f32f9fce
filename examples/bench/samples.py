"""Data sets as samples: what is read, and where the official evaluators look for the videos.

    for x in samples("VBVR-Bench"):
        print(x.id, x.task, x.seconds)

examples/bench/README.md has the layouts. Five independent runs of a sample (--seeds 5) fill
Gen-ViRe's five folders and V-ReasonBench's five seeds. Elsewhere each run has a folder seed<N>/.
Names that begin with a dot are no data: an archive from a Mac holds a ._NAME for each NAME.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
from PIL import Image

from collabvr import Picture, Problem, explained, load_image
from examples.cli import needed
from examples.runs import read_lines

LAYOUTS = (
    "VBVR-Bench (VBVR-Bench.json or folders with first_frame.png and prompt.txt), Gen-ViRe (hub "
    "id, parquet files or a saved copy), VideoThinkBench (canonical_manifest.jsonl), V-ReasonBench "
    "(prompts.txt), a JSONL of id, image and task, or a folder of pictures with --task"
)


@dataclass(frozen=True)
class Sample:
    id: str  # its place below runs/ and videos/, of one part or several
    task: str
    image: str = ""  # path of the picture, or
    content: bytes = b""  # what its file holds
    category: str = ""
    seconds: float = 0.0  # of every clip; 0: as Config says
    layout: str = "plain"  # how its videos are named
    name: tuple[str, str] = ("", "")  # V-ReasonBench: the task, and what follows the model

    def data(self) -> bytes:
        """The picture's file as it is. Raises OSError."""
        return self.content or Path(self.image).read_bytes()

    def picture(self) -> Picture:
        """The input image. Raises Problem."""
        source: Any = io.BytesIO(self.content) if self.content else self.image
        return load_image(source)


def places(x: Sample, method: str, seed: int, seeds: int) -> list[str]:
    """Where in OUT/videos the evaluators look for run `seed` (from 1) of `seeds`."""
    if x.layout == "gen_vire":
        runs = range(5) if seeds == 1 else [seed - 1]  # its scripts want five folders
        return [f"0_generated_videos/{method}/{method}_{k}/{x.id}.mp4" for k in runs]
    if x.layout == "v_reason":
        task, rest = x.name
        return [f"{task}_{method.replace('_', '-')}_{rest}_seed{seed}.mp4"]
    folder = "" if seeds == 1 else f"seed{seed}/"
    if x.layout == "video_think":
        return [f"{folder}{x.id}/generated.mp4", f"{folder}{x.id}/last_frame.png"]
    return [f"{folder}{x.id}.mp4"]


def samples(data: str, task: str = "") -> Iterator[Sample]:
    """One after the other, each id once. Raises Problem."""
    path, seen = Path(data), set()
    with explained(f"{data} cannot be read", OSError, UnicodeError):
        for x in reader(path)(path, task):
            if not isinstance(x.task, str) or not x.task.strip():
                raise Problem(f"{data}: sample {x.id} has no task.")
            if x.id in seen:
                raise Problem(f"{data} holds two samples {x.id}.")
            seen.add(x.id)
            yield replace(x, task=x.task.strip())
    if not seen:
        raise Problem(f"{data} holds no samples.")


def reader(path: Path):
    """What reads it: a function of path and task. Raises Problem."""
    if path.suffix == ".parquet" or not path.exists():
        return gen_vire  # files of rows, or a hub id
    if path.is_file():
        return {".json": vbvr_json, ".jsonl": lines}.get(path.suffix, lines)
    if (path / "VBVR-Bench.json").exists():
        return vbvr_json
    if (path / "canonical_manifest.jsonl").exists() or files(path, "**/data.json"):
        return video_think
    if prompts_of(path):
        return v_reason
    if any((path / x).exists() for x in ("dataset_dict.json", "state.json")) or parquets(path):
        return gen_vire
    if files(path, "**/first_frame.png"):
        return tree
    return pictures


def files(root: Path, *patterns: str) -> list[Path]:
    """What fits one of the patterns, in order. Names that begin with a dot are no data."""
    found = {path for pattern in patterns for path in root.glob(pattern)}
    return sorted(path for path in found
                  if not any(part.startswith(".") for part in path.relative_to(root).parts))


def identifier(*parts) -> str:
    """An id that stays below its folder. It is kept as it is, for evaluators look for it."""
    for part in parts:
        if not isinstance(part, str):
            raise Problem(f"The sample id {part!r:.99} is no text.")
        plain = part.strip() and part.isprintable() and not set("/\\") & set(part)
        if not plain or part.startswith(".") or len(part.encode()) > 200:
            raise Problem(f"{part[:99]!r} is no sample id: it must be a file's name of 1 to 200 "
                          "bytes, without slashes, and not begin with a dot.")
    return "/".join(parts)


def read_text(path: Path) -> str:
    """UTF-8 with or without a byte-order mark, in any locale."""
    return path.read_text(encoding="utf-8-sig")


def entries(path: Path, what: str) -> list:
    """The list in a JSON file. Raises Problem; `what` says what it should hold."""
    with explained(f"{path} is no JSON in UTF-8", ValueError):
        found = json.loads(read_text(path))
    if not isinstance(found, list):
        raise Problem(f"{path} is no list of entries with {what}.")
    return found


# ------------------------------------------------------------------------------
# VBVR-Bench and InferKit


def vbvr_json(path: Path, _) -> Iterator[Sample]:
    """VBVR-Bench.json, or the folder that it lies in."""
    if path.is_dir():
        path = path / "VBVR-Bench.json"
    for number, x in enumerate(entries(path, "prompt and first_frame_path"), 1):
        with explained(f"{path}, entry {number}, needs the texts prompt and first_frame_path, and "
                       "its picture as that file or as first_image in base64",
                       LookupError, TypeError, ValueError, AttributeError):
            frame = path.parent / x["first_frame_path"]
            split, task, index = Path(x["first_frame_path"]).parts[-4:-1]
            truth = frame.with_name("ground_truth.mp4")
            if x.get("ground_truth_video_path"):
                truth = path.parent / x["ground_truth_video_path"]
            content = b""
            if not frame.exists():
                content = base64.b64decode(x["first_image"].rpartition(",")[2])
            sample = Sample(
                identifier(split, task, index.zfill(5)), x["prompt"], str(frame), content, split)
        yield replace(sample, seconds=length(truth))


def tree(root: Path, _) -> Iterator[Sample]:
    """Folders with first_frame.png and prompt.txt, in VBVR-Bench's or InferKit's depth."""
    found = files(root, "**/first_frame.png")
    depths = {len(x.relative_to(root).parts) - 1 for x in found}
    depth = max(depths)
    split = root.resolve().name
    if len(depths) > 1 or depth not in (2, 3):
        raise Problem(f"{root} has first_frame.png {depth} folders deep: expected is VBVR-Bench, "
                      "<split>/<task>/<idx>/first_frame.png, or <domain>_task/<id>/first_frame.png."
                      f" Give the folder above or below: one is {found[0].parent}.")
    if depth == 2 and re.search(r"(?i)^(in|out-of)[-_]domain", split):
        raise Problem(f"{root} is one split of VBVR-Bench: give the folder above, {root}/.. .")
    for frame in found:
        *above, index = frame.relative_to(root).parts[:-1]
        prompt = frame.with_name("prompt.txt")
        if not prompt.exists():
            raise Problem(f"{prompt} is missing: it holds the task of the picture beside it.")
        truth = frame.with_name("ground_truth.mp4")
        seconds = length(truth) if depth == 3 or truth.exists() else 0.0
        name = index.zfill(5) if depth == 3 else index
        yield Sample(identifier(*above, name), read_text(prompt), str(frame),
                     category=above[0], seconds=seconds)


def length(video: Path) -> float:
    """Seconds of a ground truth: as long as that is every clip of its sample (App. A.1)."""
    # the format is named, because ffmpeg would also follow a playlist to other files
    with explained(f"{video} cannot be read as the ground truth's video", OSError, av.FFmpegError,
                   LookupError, TypeError), av.open(str(video), format="mp4") as file:
        stream: Any = file.streams.video[0]
        return round(float(stream.duration * stream.time_base), 3)


# ------------------------------------------------------------------------------
# Gen-ViRe


def parquets(path: Path) -> list[Path]:
    """Files of rows, as the hub's client leaves them: data/train-00000-of-00001.parquet."""
    if path.suffix == ".parquet":
        return [path]
    return files(path, "*.parquet", "data/*.parquet")


def gen_vire(path: Path, _) -> Iterator[Sample]:
    """By hub id, as a snapshot of parquet files, or as `save_to_disk` left it."""
    if not path.exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        raise Problem(f"{path} does not exist. Expected is {LAYOUTS}.")
    datasets = needed("datasets")
    with explained(f"{path} is no file or folder here and cannot be loaded from the hub"
                   if not path.exists() else f"{path} cannot be loaded", Exception):
        found = [str(x) for x in parquets(path)]
        if found:
            rows = datasets.Dataset.from_parquet(found)
        elif path.exists():
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(str(path))
        if isinstance(rows, dict):
            rows = rows["train"]
        rows = rows.cast_column("image", datasets.Image(decode=False))
    for number, x in enumerate(rows, 1):
        with explained(f"{path}, row {number}, needs main_category, sub_category, id, image and "
                       "i2v_prompt, as in Gen-ViRe", LookupError, TypeError):
            name = identifier(x["main_category"], x["sub_category"], x["id"])
            image = x["image"]
            sample = Sample(name, x["i2v_prompt"], image["path"] or "", image["bytes"] or b"",
                            x["main_category"], layout="gen_vire")
        yield sample


# ------------------------------------------------------------------------------
# VideoThinkBench and V-ReasonBench


def video_think(root: Path, _) -> Iterator[Sample]:
    """canonical_manifest.jsonl, or the older <task>/data.json."""
    manifest = root / "canonical_manifest.jsonl" if root.is_dir() else root
    if manifest.exists():
        for number, x in read_lines(manifest):
            yield manifest_line(manifest, number, x)
        return
    for file in files(root, "**/data.json"):
        for number, x in enumerate(entries(file, "id, image and ti2v_prompt"), 1):
            with explained(f"{file}, entry {number}, needs the texts id, image and ti2v_prompt or "
                           "prompt", LookupError, TypeError, AttributeError):
                prompt = x.get("ti2v_prompt") or x["prompt"]
                sample = Sample(identifier(x["id"]), prompt, str(file.parent / x["image"]),
                                category=file.parent.name, layout="video_think")
            yield sample


def manifest_line(file: Path, number: int, x) -> Sample:
    with explained(f"{file}, line {number}, needs the texts id, task_type, prompts.ti2v and "
                   "assets.puzzle_image", LookupError, TypeError):
        image = file.parent / x["assets"]["puzzle_image"]  # an absolute path stays as it is
        return Sample(identifier(x["id"]), x["prompts"]["ti2v"], str(image),
                      category=x["task_type"], layout="video_think")


def prompts_of(path: Path) -> Path | None:
    """prompts.txt of V-ReasonBench, given its repository or its folder dataset/."""
    if files(path, "*.png") or (path / "dataset").is_dir():
        for file in (path / "prompts.txt", path.parent / "prompts.txt"):
            if file.exists():
                return file
    return None


def v_reason(root: Path, _) -> Iterator[Sample]:
    """<task>[_<subtype>]_<idx>.png beside the prompts of all tasks."""
    file: Any = prompts_of(root)
    prompts = read_prompts(file)
    folder = root / "dataset" if (root / "dataset").is_dir() else root
    for image in files(folder, "*.png"):
        found = prompt_of(image.stem, prompts)
        if found is None:
            raise Problem(f"{image} has no prompt in {file}: add a line '{image.stem}:' and below "
                          "it what is to be done.")
        task, prompt = found
        yield Sample(identifier(image.stem), prompt, str(image), category=task,
                     layout="v_reason", name=(task, image.stem[len(task) + 1:]))


def read_prompts(file: Path) -> dict[str, tuple[int, str]]:
    """Of each paragraph 'Name:' its words in the names of pictures: {start of a name: (letters of
    it that are the task, prompt)}. A heading 'SUDOKU PROMPTS' stands before its subtypes."""
    prompts: dict[str, tuple[int, str]] = {}
    section, name = "", ""
    text: list[str] = []
    for line in [*read_text(file).split("\n"), "end:"]:
        heading = re.fullmatch(r"\s*(.+) PROMPTS\s*", line)
        title = re.fullmatch(r"\s*(\w+):\s*", line)
        if (heading or title) and name and text:
            start = f"{section}_{name}" if section else name
            prompts[start] = (len(section or name), " ".join(text))
        if heading:
            section = "" if heading[1] == "TASK" else heading[1].strip().lower().replace(" ", "_")
            name = ""
        elif title:
            name, text = title[1].lower(), []
        elif line.strip("= \t\r"):
            text.append(line.strip())
    return prompts


def prompt_of(stem: str, prompts: dict[str, tuple[int, str]]) -> tuple[str, str] | None:
    """(task as the picture's name spells it, prompt) of the longest start that fits."""
    name = stem.lower()
    grid = re.fullmatch(r"sudoku_\w+_([23])_\d+", name)  # its base: 2 is a grid of 4x4, 3 of 9x9
    if grid:
        name = f"sudoku_{int(grid[1]) ** 2}x{int(grid[1]) ** 2}_"
    for start in sorted(prompts, key=len, reverse=True):
        letters, prompt = prompts[start]
        plural = re.match(rf"{re.escape(start)}(s?)_", name + "_")
        if plural:
            return stem[:letters + (len(plural[1]) if letters == len(start) else 0)], prompt
    return None


# ------------------------------------------------------------------------------
# One's own


def lines(path: Path, _) -> Iterator[Sample]:
    """A JSONL of id, image, task and perhaps category; or VideoThinkBench's manifest."""
    for number, x in read_lines(path):
        if isinstance(x, dict) and "assets" in x:
            yield manifest_line(path, number, x)
            continue
        with explained(f"{path}, line {number}, needs the texts id, image and task, and perhaps "
                       "category", LookupError, TypeError):
            image = str(path.parent / x["image"])
            sample = Sample(identifier(x["id"]), x["task"], image, category=x.get("category") or "")
        yield sample


def pictures(path: Path, task: str) -> Iterator[Sample]:
    """A folder of them, with one task for all."""
    Image.init()
    formats = {k for k, v in Image.registered_extensions().items() if v in Image.OPEN}
    found = [x for x in files(path, "*") if x.is_file() and x.suffix.lower() in formats]
    skipped = [x.name for x in files(path, "*") if x not in found]
    if not found:
        raise Problem(f"{path} holds no samples. Expected is {LAYOUTS}.")
    if not task.strip():
        raise Problem(f"{path} is a folder of pictures: say with --task what is to be done.")
    if skipped:
        print(f"No pictures, skipped: {', '.join(skipped)}", file=sys.stderr)
    for x in found:
        yield Sample(identifier(x.stem), task, str(x))
