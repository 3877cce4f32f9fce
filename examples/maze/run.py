"""The main job, offline: a maze picture and a task go through collabvr.py's own main().

    python -m examples.maze.run                      a 6x6 maze with three straight segments
    python -m examples.maze.run --maze-seed 7        another one
    python -m examples.maze.run --image maze.png     your own, square, 16 pixels a cell
    python -m examples.maze.run --vlm-url http://localhost:8000/v1 --vlm NAME     by a VLM

It shows how to bring two models of one's own: TinyWan, a checkpoint that runs on a CPU, and
Oracle, a Python function. All other options are collabvr.py's; image and task need not be given.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    raise SystemExit("Run it as: python -m examples.maze.run")

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import imageio.v3 as iio
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

import collabvr
from examples import cli
from examples.maze import rule, world
from examples.maze.oracle import Oracle


@settings
class TinyWan(collabvr.Wan):
    """A checkpoint of 12 MB that knows mazes only."""

    vgm: str = str(Path(__file__).resolve().parent / "tiny-wan")
    fps: Annotated[int, Field(ge=1, le=240)] = 8
    sampling_steps: Annotated[int, Field(ge=1)] = 12
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0


SECONDS = 2.0  # of every clip: tiny-wan has learned no other length


@settings
class VLM(collabvr.OpenAIVLM):
    """A VLM that sees every frame of those clips."""

    verify_fps: Annotated[float, Field(gt=0)] = 8.0


def supervisor(argv: list[str]) -> type:
    """The VLM if the options name one, or else the oracle."""
    return VLM if any(word.startswith("--vlm") for word in argv) else Oracle


@settings
class Options:
    maze_seed: Annotated[int, Field(ge=0)] = 5
    image: Path | None = None
    out: Path | None = None


def run(argv: list[str]) -> int:
    import tyro

    if "--help" in argv:
        print(__doc__)
        return collabvr.main(TinyWan, supervisor(argv), argv)
    options, others = tyro.cli(Options, args=argv, return_unknown_args=True)
    stem = options.image.stem if options.image else f"maze-{options.maze_seed}"
    out = options.out or Path("runs", stem)
    with tempfile.TemporaryDirectory() as drawings:
        image = options.image or Path(drawings, f"{stem}.png")
        if options.image is None:
            iio.imwrite(image, world.draw(world.make(6, 3, rng_of(options.maze_seed))))
        with collabvr.explained(f"{image} shows no maze that can be read", ValueError):
            maze = rule.maze_of(collabvr.load_image(image))
        status = collabvr.main(TinyWan, supervisor(argv), [
            "--image", str(image), "--task", world.task(maze), "--out", str(out),
            "--seconds-first", str(SECONDS), "--seconds-next", str(SECONDS), *others])
    if status == 0:
        print(f"{'by rule':17} {add_score(out, maze)}")
        print(f"{'page':17} python -m examples.report {out}")
    return status


def rng_of(maze_seed: int) -> np.random.Generator:
    return np.random.default_rng([2026, maze_seed])


def add_score(out: Path, maze: world.Maze) -> str:
    """Writes into the run's trace what the rule says of its video."""
    frames = iio.imread(out / "video.mp4", plugin="pyav")
    score = rule.score(frames, maze)
    trace = json.loads((out / "trace.json").read_bytes())
    trace["method"] = "collabvr"
    trace["by_rule"] = rule.verdict(score)
    trace["score"] = score.value
    collabvr.write_file(out / "trace.json", json.dumps(trace, indent=2).encode())
    return trace["by_rule"]


def main(argv: list[str] | None = None) -> int:
    """The exit status of collabvr.main; 2 with a sentence if the picture is no maze."""
    return cli.guarded(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
