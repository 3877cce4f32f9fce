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

# what tiny-wan was trained for: clips of 17 frames, all of which the verifier sees
CONFIG = {"seconds_first": 2.0, "seconds_next": 2.0}
VLM = {"vlm": vlm.MODEL, "verify_fps": 8.0}
WAN = {"vgm": str(HERE / "tiny-wan"), "fps": 8, "sampling_steps": 12, "guidance_scale": 1.0}
OPTIONS = [x for k, v in (CONFIG | VLM | WAN).items() for x in (f"--{k.replace('_', '-')}", str(v))]


def main(argv=None) -> int:
    """Exit status of collabvr.main; SystemExit with status 2 if a path is wrong."""
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
    if args.strip and not (Path(args.strip).parent.is_dir() and not Path(args.strip).is_dir()):
        parser.exit(2, f"run.py: --strip {args.strip}: that is no file in a folder that exists\n")
    maze, image, out, task = None, args.image, args.out, args.task
    try:
        if image is None:
            maze = world.make(6, 3, np.random.default_rng([2026, args.maze_seed]))
            out = out or f"runs/maze-{args.maze_seed}"
            image = str(Path(out, f"maze-{args.maze_seed}.png"))
            Path(out).mkdir(parents=True, exist_ok=True)
            iio.imwrite(image, world.draw(maze))
            task = task or world.task(maze)
        world.read(collabvr.load_image(image))
    except (collabvr.Problem, OSError, ValueError) as error:
        hint = "; without --image there is a maze to try" * bool(args.image)
        parser.exit(2, f"run.py: {str(error).rstrip('.')}{hint}\n")

    with vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status = collabvr.main([
            "--image", image, "--task", task or "Move the circle to the goal square.",
            *(["--out", out] if out else []),
            *OPTIONS, "--vlm-url", f"http://127.0.0.1:{server.server_port}/v1", *others])
        server.shutdown()
    if status == 0 and maze and Path(out, "video.mp4").exists():
        s = world.score(iio.imread(Path(out, "video.mp4"), plugin="pyav"), maze)
        said = f"{'solved' if s.solved else 'not solved'}, {s.progress:.0%} of the way"
        print(f"{'by rule':17} {said}")
    if status == 0 and args.strip and Path(out, "trace.json").exists():
        draw_strip(Path(out)).save(args.strip, "PNG")
    return status


def draw_strip(out: Path, frames: int = 7) -> Image.Image:
    """A run folder as a picture: a row of frames per attempt, framed by its verdict."""
    attempts, rows = [], []
    for call in json.loads((out / "trace.json").read_text())["calls"]:
        if "clip" in call:
            attempts.append(call | {"verdict": "unverified", "reason": ""})
        elif call["role"] == "verifier":
            attempts[-1] |= call.get("reply", {})  # of the clip just made
    for i, a in enumerate(attempts):
        clip = iio.imread(out / a["clip"], plugin="pyav")
        picks = clip[np.linspace(0, len(clip) - 1, frames).round().astype(int)]
        picks = np.pad(picks, ((0, 0), (0, 0), (2, 2), (0, 0)), constant_values=255)
        strip = Image.fromarray(np.concatenate(picks, 1))
        colour = {"accept": "#2e9e4f", "reject": "#d23f31"}.get(a["verdict"], "grey")
        j = sum(x["t"] == a["t"] for x in attempts[: i + 1])
        above, below = (textwrap.fill(text, strip.width // 6) for text in (
            f"step {a['t']}, attempt {j}: {a['prompt']}", f"{a['verdict']}: {a['reason']}"))
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
