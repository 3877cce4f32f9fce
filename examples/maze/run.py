"""The main job, offline: a maze picture and a task go through collabvr.py's own main().

    python examples/maze/run.py                      a 6x6 maze with three straight segments
    python examples/maze/run.py --maze-seed 7        another one
    python examples/maze/run.py --image maze.png     your own, square, 16 pixels a cell

Any other option goes on to collabvr.py. The planner, verifier and router are asked over HTTP, at an
endpoint that this script starts (vlm.py); the clips come from diffusers' WanImageToVideoPipeline
with the checkpoint in tiny-wan/.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import imageio.v3 as iio
import numpy as np
import report
import vlm
import world

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
    parser.add_argument("--out", help="run folder (runs/maze-SEED or runs/NAME of the picture)")
    parser.add_argument("--maze-seed", type=int, default=5, help="which maze (5)")
    parser.add_argument("--image", help="a maze picture of your own instead")
    parser.add_argument("--task", help="what is to be done in it")
    args, others = parser.parse_known_args(argv)
    if args.maze_seed < 0:
        parser.error("--maze-seed must not be negative")
    maze, image, out, task = None, args.image, args.out, args.task
    try:
        if image is None:
            maze = world.make(6, 3, np.random.default_rng([2026, args.maze_seed]))
            out = out or f"runs/maze-{args.maze_seed}"
            image = str(Path(out, f"maze-{args.maze_seed}.png"))
            Path(out).mkdir(parents=True, exist_ok=True)
            iio.imwrite(image, world.draw(maze))
            task = task or world.task(maze)
        out = out or f"runs/{Path(image).stem}"
        world.read(collabvr.load_image(image))
    except (collabvr.Problem, OSError, ValueError) as error:
        hint = "; without --image there is a maze to try" * bool(args.image)
        parser.exit(2, f"run.py: {str(error).rstrip('.')}{hint}\n")

    with vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status = collabvr.main([
            "--image", image, "--task", task or "Move the circle to the goal square.",
            "--out", out, *OPTIONS,
            "--vlm-url", f"http://127.0.0.1:{server.server_port}/v1", *others])
        server.shutdown()
    if status == 0 and maze and Path(out, "video.mp4").exists():
        s = world.score(iio.imread(Path(out, "video.mp4"), plugin="pyav"), maze)
        said = f"{'solved' if s.solved else 'not solved'}, {s.progress:.0%} of the way"
        print(f"{'by rule':17} {said}")
    if Path(out, "calls.jsonl").exists():  # also of a run that failed
        print(f"{'page':17} {report.write(Path(out))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
