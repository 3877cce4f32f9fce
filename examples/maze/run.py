"""The main job, offline: a maze picture and a task go through collabvr.py's own main().

    python examples/maze/run.py                      a held-out 6x6 maze with three straight segments
    python examples/maze/run.py --seed 3 --out DIR   any option of collabvr.py goes on to it
    python examples/maze/run.py --maze-seed 7        another maze; --image and --task bring your own

The planner, verifier and router are asked over HTTP, at an endpoint that this script starts (vlm.py);
the clips come from diffusers' WanImageToVideoPipeline with the checkpoint in tiny-wan/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import collabvr  # noqa: E402
import numpy as np  # noqa: E402
import vlm  # noqa: E402
import world  # noqa: E402


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="run folder (default: runs/maze-<maze seed>)")
    parser.add_argument("--maze-seed", type=int, default=1, help="which maze (default: 1)")
    parser.add_argument("--image", help="a maze picture of your own, 16 pixels a cell")
    parser.add_argument("--task", help="what is to be done in it")
    args, others = parser.parse_known_args(argv)
    out = args.out or Path("runs") / f"maze-{args.maze_seed}"

    with tempfile.TemporaryDirectory() as folder, vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        image, task = args.image, args.task
        if image is None:
            maze = world.make(6, 3, np.random.default_rng([2026, args.maze_seed]))
            image = str(Path(folder) / "maze.png")
            save(world.draw(maze), image)
            circle, goal = world.colour_word(maze.look.circle), world.colour_word(maze.look.goal)
            task = task or f"Move the {circle} circle through the maze to the {goal} square without crossing walls."
        status = collabvr.main([
            "--image", image, "--task", task or "Move the circle through the maze to the goal square without crossing walls.",
            "--out", str(out), "--vlm", vlm.MODEL, "--vlm-url", f"http://127.0.0.1:{server.server_port}/v1",
            "--vgm", str(HERE / "tiny-wan"), *others])
        server.shutdown()
    if status == 0 and args.image is None and "--dry-run" not in others:
        judge(out / "video.mp4", maze)
    return status


def save(frame, path) -> None:
    from PIL import Image

    Image.fromarray(frame).save(path)


def judge(video: Path, maze: world.Maze) -> None:
    """The score by the world's own rule, which no model has seen."""
    import imageio.v3 as iio

    s = world.score(iio.imread(video, plugin="pyav"), maze)
    print(f"by rule    {'solved' if s.solved else 'not solved'}: {s.progress:.0%} of the way")


if __name__ == "__main__":
    sys.exit(main())
