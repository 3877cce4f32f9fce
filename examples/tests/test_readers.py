"""The supervisor tried on the maze world: do the error rates that go in come out?

Runs CollabVR, and M2 alone, which is rejected more often, on held-out mazes with the oracle that
makes no mistakes; exports what it was asked; labels that by rule in place of people; and asks the
oracles that err at the rates of the paper's Table 6. For the table of the README:

    COLLABVR_SLOW=1 COLLABVR_MAZES=20 COLLABVR_READERS=runs/readers \\
        pytest -s examples/tests/test_readers.py
"""

import os
import re
from dataclasses import asdict
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from collabvr import Clip
from examples import runs
from examples.maze import pixels, rule, world
from examples.maze.compare import READERS
from examples.maze.foreign import held_out
from examples.maze.oracle import Oracle
from examples.maze.run import SECONDS, TinyWan
from examples.supervisor import __main__ as supervisor
from examples.supervisor import points

MAZES = int(os.environ.get("COLLABVR_MAZES", "2"))  # for each number of segments


def label(point: dict, parts: list, maze: world.Maze) -> dict:
    """By rule. Steps: the straight segments that are left, one on the last allowed step. Accept:
    the circle gets nearer to the target by a cell at least, and nothing else happens."""
    texts = [x for x in parts if isinstance(x, str)]
    pictures = [x for x in parts if isinstance(x, np.ndarray)]
    first = pixels.read(pictures[0])

    def cell(frame: np.ndarray) -> tuple:
        circle = pixels.read(frame, first).circle
        return world.nearest_corridor(maze.corridors, circle or maze.start)

    if point["role"] == "planner":
        left = world.segments(
            world.shortest_path(maze.corridors, cell(pictures[-1]), maze.goal))
        last = any("last allowed step" in x for x in texts)
        return {"id": point["id"], "steps": min(1, len(left)) if last else len(left)}
    frames = next(x for x in parts if isinstance(x, Clip)).frames
    found = re.search(r"row (\d+), column (\d+)", texts[-2])
    target = (int(found[1]) - 1, int(found[2]) - 1) if found else maze.goal  # M2 has none: the goal
    begin = cell(frames[0])
    score = rule.score(frames, world.Maze(maze.corridors, begin, target, maze.look))
    moved = score.end and world.nearest_corridor(maze.corridors, score.end) != begin
    good = moved and score.value > 0
    return {"id": point["id"], "verdict": "accept" if good else "reject"}


@pytest.mark.skipif("COLLABVR_SLOW" not in os.environ, reason="runs mazes: COLLABVR_SLOW=1")
def test_error_rates_that_go_in_come_out(tmp_path, capsys):
    """The oracle without mistakes agrees with the rule, the others less."""
    from examples.bench.run import main

    out = Path(os.environ.get("COLLABVR_READERS", tmp_path))  # the same one goes on
    options = ["--seconds-first", str(SECONDS), "--seconds-next", str(SECONDS)]
    mazes = {f"{k}-{i}": held_out(k, i, 0) for i in range(MAZES) for k in (1, 2, 3)}
    data = out / "mazes"
    data.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, maze in mazes.items():
        iio.imwrite(data / f"{name}.png", world.draw(maze))
        lines.append({"id": name, "image": f"{name}.png", "task": world.task(maze)})
    runs.write_lines(data / "mazes.jsonl", lines)

    for method in ("collabvr", "m2"):
        where = ["--data", str(data / "mazes.jsonl"), "--out", str(out / method)]
        assert main(vgm=TinyWan, vlm=Oracle, argv=[*where, "--method", method, *options]) == 0
    folder = out / "points"
    assert supervisor.main(["export", str(out), "--out", str(folder)], vlm=Oracle) == 0
    labels = []
    for point in points.read_objects(folder / "points.jsonl"):
        parts = [points.restore(folder, x) for x in point["parts"]]
        labels.append(label(point, parts, mazes[point["id"].split("/")[2]]))
    runs.write_lines(out / "labels.jsonl", labels)
    assert {x["verdict"] for x in labels if "verdict" in x} == {"accept", "reject"}
    oracles = {"perfect": Oracle(), **READERS}
    for name, oracle in oracles.items():
        asked = ["ask", str(folder), "--name", name]
        for field, value in asdict(oracle).items():
            asked += [f"--{field.replace('_', '-')}", str(value)]
        assert supervisor.main(asked, vlm=Oracle) == 0

    replies = [str(folder / "replies" / f"{name}.jsonl") for name in oracles]
    capsys.readouterr()
    assert supervisor.main(["score", str(out / "labels.jsonl"), *replies]) == 0
    text = capsys.readouterr().out
    with capsys.disabled():
        print(f"\n{text}")
    depth, verdicts = [x.splitlines()[1:] for x in text.split("\n\n")[:2]]
    exact = {row.split("  ")[0]: re.findall(r"([\d.]+) %", row) for row in depth}
    overall = {row.split("  ")[0]: re.findall(r"([\d.]+) %", row) for row in verdicts}
    assert exact["perfect"][0] == "100.0"
    assert float(overall["perfect"][2]) > 95 > float(overall["qwen9b"][2])
