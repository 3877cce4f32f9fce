"""The main job, offline: a maze picture and a task go through collabvr.py's own main().

    python examples/maze/run.py                      a 6x6 maze with three straight segments
    python examples/maze/run.py --maze-seed 7        another one
    python examples/maze/run.py --image maze.png     your own, square, 16 pixels a cell
    python examples/maze/run.py --strip strip.png    also draw every attempt as a film strip

Any other option goes on to collabvr.py. The planner, verifier and router are asked over HTTP, at an
endpoint that this script starts (vlm.py); the clips come from diffusers' WanImageToVideoPipeline
with the checkpoint in tiny-wan/.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import imageio.v3 as iio
import numpy as np
import vlm
import world
from PIL import Image, ImageDraw

import collabvr


def main(argv=None) -> int:
    """Exit status of collabvr.main."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="run folder (runs/maze-SEED, or collabvr.py's default)")
    parser.add_argument("--maze-seed", type=int, default=5, help="which maze (5)")
    parser.add_argument("--image", help="a maze picture of your own instead")
    parser.add_argument("--task", help="what is to be done in it")
    parser.add_argument("--strip", help="a PNG to be drawn of the run's attempts")
    args, others = parser.parse_known_args(argv)
    if args.strip and args.image and not args.out:
        parser.error("--strip needs --out when the picture is your own")

    with vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        maze, image, out, task = None, args.image, args.out, args.task
        if image is None:
            maze = world.make(6, 3, np.random.default_rng([2026, args.maze_seed]))
            out = out or f"runs/maze-{args.maze_seed}"
            image = str(Path(out, f"maze-{args.maze_seed}.png"))
            Path(out).mkdir(parents=True, exist_ok=True)
            iio.imwrite(image, world.draw(maze))
            task = task or world.task(maze)
        status = collabvr.main([
            "--image", image, "--task", task or "Move the circle to the goal square.",
            *(["--out", out] if out else []),
            "--vlm", vlm.MODEL, "--vlm-url", f"http://127.0.0.1:{server.server_port}/v1",
            "--vgm", str(HERE / "tiny-wan"), *others])
        server.shutdown()
    if status == 0 and maze and Path(out, "video.mp4").exists():
        s = world.score(iio.imread(Path(out, "video.mp4"), plugin="pyav"), maze)
        print(f"by rule    {'solved' if s.solved else 'not solved'}, {s.progress:.0%} of the way")
    if status == 0 and args.strip and out:
        draw_strip(Path(out)).save(args.strip)
    return status


def draw_strip(out: Path, frames: int = 7) -> Image.Image:
    """A run folder as a picture: a row of frames per attempt, framed by its verdict."""
    colours = {"accept": "#2e9e4f", "reject": "#d23f31"}
    rows = []
    for step in json.loads((out / "trace.json").read_text())["steps"]:
        for a in step["attempts"]:
            if a["clip"] is None:
                continue
            clip = iio.imread(out / a["clip"], plugin="pyav")
            picks = clip[np.linspace(0, len(clip) - 1, frames).round().astype(int)]
            picks = np.pad(picks, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255)
            strip = Image.fromarray(np.concatenate(picks, 1))
            colour = colours.get(a["status"], "grey")
            above, below = (textwrap.fill(text, strip.width // 6) for text in (
                f"step {step['t']}, attempt {a['j']}: {a['prompt']}",
                f"{a['status']}: {a.get('reason', '')}"))
            top = 12 + 14 * (above.count("\n") + 1)
            size = strip.width + 24, top + strip.height + 22 + 14 * below.count("\n")
            row = Image.new("RGB", size, "white")
            pen = ImageDraw.Draw(row)
            pen.text((10, 6), above, "black")
            pen.rectangle((8, top - 4, strip.width + 15, top + strip.height + 3), colour)
            row.paste(strip, (12, top))
            pen.text((10, top + strip.height + 6), below, colour)
            rows.append(row)
    picture = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        picture.paste(row, (0, sum(r.height for r in rows[:i])))
    return picture


if __name__ == "__main__":
    sys.exit(main())
