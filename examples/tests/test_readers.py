"""supervisor.py tried on the maze world: do the error rates that go into a reader come out of it?

    python examples/maze/readers.py --out runs/readers

Runs CollabVR, and M2 alone, which is rejected more often, on held-out mazes with the reader that
makes no mistakes; exports what it was asked; labels that by world.py's rule in place of people; and
asks the readers that err at the rates of the paper's Table 6. The same command goes on where it
stopped.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import benchmark
import imageio.v3 as iio
import numpy as np
import points
import supervisor
import vlm
import world
from compare import SUPERVISORS, held_out
from run import OPTIONS

from collabvr import Clip


def label(point: dict, parts: list, maze: world.Maze) -> dict:
    """By rule. Steps: the straight segments that are left, one on the last allowed step. Accept:
    the circle gets nearer to the target by a cell at least, and nothing else happens."""
    texts = [x for x in parts if isinstance(x, str)]
    pictures = [x for x in parts if isinstance(x, np.ndarray)]
    first = world.read(pictures[0])

    def cell(frame: np.ndarray) -> tuple:
        return world.nearest_open(maze.open, world.read(frame, first).circle or maze.start)

    if point["role"] == "planner":
        left = world.segments(world.shortest_path(maze.open, cell(pictures[-1]), maze.goal))
        last = any("last allowed step" in x for x in texts)
        return {"id": point["id"], "steps": min(1, len(left)) if last else len(left)}
    frames = next(x for x in parts if isinstance(x, Clip)).frames
    target = re.search(r"row (\d+), column (\d+)", texts[-2])  # M2 has none: the goal
    target = (int(target[1]) - 1, int(target[2]) - 1) if target else maze.goal
    begin = cell(frames[0])
    s = world.score(frames, world.Maze(maze.open, begin, target, maze.look))
    clean = s.one_circle and not s.left_corridors and not s.jumped
    moved = s.end is not None and world.nearest_open(maze.open, s.end) != begin
    good = clean and moved and s.progress > 0
    return {"id": point["id"], "verdict": "accept" if good else "reject"}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/readers"))
    parser.add_argument("--mazes", type=int, default=20, help="for each number of segments (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the mazes")
    args = parser.parse_args(argv)
    mazes = {f"{k}-{i}": held_out(k, i, args.seed) for i in range(args.mazes) for k in (1, 2, 3)}
    data, folder = args.out / "mazes", args.out / "points"
    data.mkdir(parents=True, exist_ok=True)
    for name, maze in mazes.items():
        iio.imwrite(data / f"{name}.png", world.draw(maze))
    points.write_lines(data / "mazes.jsonl", [
        {"id": name, "image": f"{name}.png", "task": world.task(maze)}
        for name, maze in mazes.items()])

    def served(errors: vlm.Errors) -> list[str]:
        server = vlm.serve(errors=errors)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return ["--vlm-url", f"http://127.0.0.1:{server.server_port}/v1"]

    for method in ("collabvr", "m2"):
        if status := benchmark.main([
                "run", "--data", str(data / "mazes.jsonl"), "--out", str(args.out / method),
                "--method", method, *OPTIONS, *served(vlm.Errors())]):
            return status
    if status := supervisor.main(["export", str(args.out), "--out", str(folder)]):
        return status
    points.write_lines(args.out / "labels.jsonl", [
        label(x, [points.restore(folder, y) for y in x["parts"]], mazes[x["id"].split("/")[2]])
        for x in points.lines(folder / "points.jsonl")])
    for name, errors in {"perfect": vlm.Errors(), **SUPERVISORS}.items():
        if status := supervisor.main(["ask", str(folder), "--name", name, "--vlm", vlm.MODEL,
                                      "--verify-fps", "8", *served(errors)]):
            return status
    print(json.dumps({k: [e.depth_match, e.accept_recall, e.reject_recall]
                      for k, e in SUPERVISORS.items()}))
    return supervisor.main(["score", str(args.out / "labels.jsonl"), *(
        str(folder / "replies" / f"{k}.jsonl") for k in ("perfect", *SUPERVISORS))])


if __name__ == "__main__":
    sys.exit(main())
