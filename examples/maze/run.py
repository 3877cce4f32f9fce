"""The main job, offline: a maze picture and a task go through collabvr.py's own main().

    python -m examples.maze.run                      a 6x6 maze with three straight segments
    python -m examples.maze.run --maze-seed 7        another one
    python -m examples.maze.run --image maze.png     your own, square, 16 pixels a cell

All other options are those of collabvr.py: `python collabvr.py --help` lists them.

The planner, verifier and router are asked over HTTP, at an endpoint that this program starts
(vlm.py). The clips come from diffusers' WanImageToVideoPipeline with the checkpoint in tiny-wan/.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import imageio.v3 as iio
import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

import collabvr
from examples import cli, runs
from examples.maze import rule, vlm, world
from examples.report import pages

# what tiny-wan was trained for: clips of 17 frames, all of which the verifier sees
CONFIG = {"seconds_first": 2.0, "seconds_next": 2.0}
VLM = {"vlm": vlm.MODEL, "verify_fps": 8.0}
WAN = {
    "vgm": str(Path(__file__).resolve().parent / "tiny-wan"),
    "fps": 8,
    "sampling_steps": 12,
    "guidance_scale": 1.0,
}
OPTIONS = []  # of collabvr.py
for name, value in (CONFIG | VLM | WAN).items():
    OPTIONS += [f"--{name.replace('_', '-')}", str(value)]
TASK = "Move the circle to the goal square."


@settings
class Options:
    out: Path | None = None  # run folder (default: runs/maze-SEED, or runs/NAME of the picture)
    maze_seed: Annotated[int, Field(ge=0)] = 5  # which maze
    image: Path | None = None  # a maze picture of your own instead
    task: str | None = None  # what the video should show (default: the circle moves to the goal)


@dataclass
class Job:
    """A picture, what is to be done, and where the run goes."""

    image: Path
    task: str
    out: Path
    maze: world.Maze | None  # known when the maze is ours


def prepare(options: Options, drawings: Path) -> Job:
    """Draws the maze into that folder, or checks the picture that was given. Raises Problem."""
    if options.image is not None:
        out = options.out or Path("runs", options.image.stem)
        with collabvr.explained(f"{options.image} shows no maze that can be read; without --image "
                                "there is one to try", ValueError):
            world.read(collabvr.load_image(options.image))
        return Job(options.image, options.task or TASK, out, None)
    maze = world.make(6, 3, np.random.default_rng([2026, options.maze_seed]))
    out = options.out or Path(f"runs/maze-{options.maze_seed}")
    image = drawings / f"maze-{options.maze_seed}.png"
    iio.imwrite(image, world.draw(maze))
    return Job(image, options.task or world.task(maze), out, maze)


def run(argv: list[str] | None) -> int:
    import tyro

    options, others = tyro.cli(
        Options, description=__doc__, args=argv, prog=cli.program(), return_unknown_args=True)
    # the picture waits elsewhere: only collabvr.main knows whether the run folder may be used
    with tempfile.TemporaryDirectory() as drawings, vlm.serve() as server:
        job = prepare(options, Path(drawings))
        arguments = ["--image", str(job.image), "--task", job.task, "--out", str(job.out), *OPTIONS]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            status = collabvr.main(argv=[*arguments, "--vlm-url", url, *others])
        finally:  # also when an option is wrong: a server that was closed only would spin
            server.shutdown()
    if status == 0 and job.maze is not None:
        collabvr.show({"by rule": rule.verdict(runs.load_run(job.out).frames(), job.maze)})
    if status in (0, 1, 130) and (job.out / "calls.jsonl").exists():
        collabvr.show({"page": collabvr.clean(str(pages.write(job.out)))})
    return status


def main(argv: list[str] | None = None) -> int:
    """The exit status of collabvr.main; 2 with a sentence if the picture is no maze."""
    return cli.guarded(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
