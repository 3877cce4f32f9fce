"""A run as one animated WebP with captions, small enough for a README. report.py calls it."""

from __future__ import annotations

import io
import itertools
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import collabvr
from collabvr import Clip, Problem, explained
from examples.runs import Run

WIDTH, HEIGHT = 480, 270  # pixels of a frame; its caption stands below
MARGIN, LINE = 16, 24  # pixels around the caption; from a line of it to the next
LETTERS = 50  # of a line
HOLD = 2500  # ms that the last frame of a scene stays
LIMIT = 1_000_000  # bytes
TRIES = [(8, 90), (8, 60), (4, 60), (2, 40), (1, 20)]  # (fps, quality), until below LIMIT
COLOURS = {"good": "#1a7f4b", "fair": "#8a5a00", "bad": "#c3362b", "dim": "#444b53"}


Caption = list[tuple[str, str]]  # lines of (tone, text); the first one is larger


def film(run: Run, tried: list) -> bytes:
    """The film. tried: the run's attempts, report.Tried. Raises Problem if there is none."""
    if not tried:
        raise Problem(f"{run.folder} has no clip yet: there is nothing to film.")
    with explained(f"{run.folder} cannot be filmed", Exception):  # a clip is missing, say
        scenes = story(run, tried)
    for fps, quality in TRIES:
        encoded = encode(scenes, fps, quality)
        if len(encoded) < LIMIT:
            break
    return encoded


def encode(scenes: list[tuple[Clip, Caption]], fps: float, quality: int) -> bytes:
    """The scenes one after the other, again and again. A faster clip is thinned out."""
    rows = max(len(caption) for _, caption in scenes)
    pictures: list[Image.Image] = []
    times: list[int] = []  # ms
    for clip, caption in scenes:
        rate = min(fps, clip.fps)
        for i in collabvr.sample(clip, rate):
            pictures.append(drawn(clip.frames[i], caption, rows))
            times.append(round(1000 / rate))
        times[-1] = HOLD
    out = io.BytesIO()
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=times,
                     loop=0, quality=quality)
    return out.getvalue()


def story(run: Run, tried: list) -> list[tuple[Clip, Caption]]:
    """A rejected attempt, the corrected prompt, the accepted attempt, and the whole video.

    Of a run without such a pair: its first attempt, and the video.
    """
    pairs = [pair for pair in itertools.pairwise(tried)
             if [x.word for x in pair] == ["rejected", "accepted"]]
    scenes = []
    for x in pairs[0] if pairs else tried[:1]:
        clip = x.clip(run)
        planned, _, correction = x.call.prompt.partition(" Correction: ")
        about = wrapped("dim", planned)
        if correction:
            still = Clip(clip.frames[[0, 0]], clip.fps)
            corrected = [*about, *wrapped("fair", f"Correction: {correction}")]
            scenes.append((still, [("fair", "The prompt is corrected"), *corrected]))
        about += wrapped(x.tone, x.d.get("reason", ""))
        scenes.append((clip, [(x.tone, x.heading), *about]))
    frames, cost = run.frames(), run.cost()
    if frames is not None:
        about = wrapped("dim", f"{cost['clips']} clips in {cost['steps']} steps")
        if "by_rule" in run.facts:
            about += wrapped("dim", f"By rule: {run.facts['by_rule']}")
        scenes.append((Clip(frames, clip.fps), [("dim", "The whole video"), *about]))
    return scenes


def wrapped(tone: str, text: str) -> Caption:
    """A text in lines that fit, three of them at most."""
    lines = textwrap.wrap(text, LETTERS, max_lines=3, placeholder=" ..")
    return [(tone, line) for line in lines]


def drawn(frame: np.ndarray, caption: Caption, rows: int) -> Image.Image:
    """A frame with its caption below it, where there is room for so many rows."""
    page = Image.new("RGB", (WIDTH, HEIGHT + 2 * MARGIN + LINE * rows), "white")
    picture = ImageOps.contain(Image.fromarray(frame), (WIDTH, HEIGHT))
    page.paste(picture, ((WIDTH - picture.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    for row, (tone, line) in enumerate(caption):
        font = ImageFont.load_default(size=17 if row else 20)
        draw.text((MARGIN, HEIGHT + MARGIN + LINE * row), line, COLOURS[tone], font)
    return page
