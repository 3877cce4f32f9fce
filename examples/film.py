"""A run as one animated WebP with captions, small enough for a README. report.py calls it."""

from __future__ import annotations

import io
import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import collabvr
from collabvr import Clip, Problem, explained
from examples.runs import Run

WIDTH, HEIGHT = 480, 270  # pixels of a frame; its caption stands below
MARGIN, LINE = 16, 24  # pixels around the caption; from a line of it to the next
LETTERS = 50  # of a line
FPS = 8  # a faster clip is thinned out
HOLD = 2500  # ms that the last frame of a scene stays
LIMIT = 1_000_000  # bytes
COLOURS = {"good": "#1a7f4b", "fair": "#8a5a00", "bad": "#c3362b", "dim": "#444b53"}


@dataclass
class Scene:
    """A clip and its caption: lines of (tone, text), the first one larger."""

    clip: Clip
    caption: list[tuple[str, str]]


def write(run: Run, tried: list) -> Path:
    """Writes film.webp into the run's folder. tried: its attempts, report.Tried.

    Raises Problem, OSError.
    """
    if not tried:
        raise Problem(f"{run.folder} has no clip yet: there is nothing to film.")
    with explained(f"{run.folder} cannot be filmed", Exception):  # a clip is missing, say
        scenes = story(run, tried)
    rows = max(len(scene.caption) for scene in scenes)
    pictures: list[Image.Image] = []
    times: list[int] = []  # ms
    for scene in scenes:
        fps = min(FPS, scene.clip.fps)
        for i in collabvr.sample(scene.clip, fps):
            pictures.append(drawn(scene.clip.frames[i], scene.caption, rows))
            times.append(round(1000 / fps))
        times[-1] = HOLD
    for quality in (90, 75, 50, 25, 5):
        out = io.BytesIO()
        pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=times,
                         loop=0, quality=quality)
        if out.tell() < LIMIT:
            break
    path = run.folder / "film.webp"
    path.unlink(missing_ok=True)  # it may be a link
    path.write_bytes(out.getvalue())
    return path


def story(run: Run, tried: list) -> list[Scene]:
    """A rejected attempt, the corrected prompt, the accepted attempt, and the whole video.

    Of a run without such a pair: its first attempt, and the video.
    """
    pairs = [pair for pair in itertools.pairwise(tried)
             if [x.word for x in pair] == ["rejected", "accepted"]]
    scenes = []
    for x in pairs[0] if pairs else tried[:1]:
        clip = x.clip(run)
        planned, _, correction = x.call.prompt.partition(" Correction: ")
        if correction:
            corrected = [*wrapped("dim", planned), *wrapped("fair", f"Correction: {correction}")]
            still = Clip(clip.frames[[0, 0]], clip.fps)
            scenes.append(Scene(still, [("fair", "The prompt is corrected"), *corrected]))
        said = [*wrapped("dim", planned), *wrapped(x.tone, x.d.get("reason", ""))]
        scenes.append(Scene(clip, [(x.tone, x.heading), *said]))
    frames = run.frames()
    if frames is not None:
        cost, by_rule = run.cost(), run.facts.get("by_rule")
        about = wrapped("dim", f"{cost['clips']} clips in {cost['steps']} steps")
        about += wrapped("dim", f"By rule: {by_rule}") if by_rule else []
        video = Clip(frames, scenes[0].clip.fps)
        scenes.append(Scene(video, [("dim", "The whole video"), *about]))
    return scenes


def wrapped(tone: str, text: str) -> list[tuple[str, str]]:
    """A text in lines that fit, three of them at most."""
    lines = textwrap.wrap(text, LETTERS, max_lines=3, placeholder=" ..")
    return [(tone, line) for line in lines]


def drawn(frame: np.ndarray, caption: list[tuple[str, str]], rows: int) -> Image.Image:
    """A frame with its caption below it, where there is room for so many rows."""
    page = Image.new("RGB", (WIDTH, HEIGHT + 2 * MARGIN + LINE * rows), "white")
    picture = ImageOps.contain(Image.fromarray(frame), (WIDTH, HEIGHT))
    page.paste(picture, ((WIDTH - picture.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    for row, (tone, line) in enumerate(caption):
        font = ImageFont.load_default(size=17 if row else 20)
        draw.text((MARGIN, HEIGHT + MARGIN + LINE * row), line, COLOURS[tone], font)
    return page
