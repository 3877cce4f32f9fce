"""The supervisor tried on the maze world: do the error rates that go into a reader come out of it?

Runs CollabVR, and M2 alone, which is rejected more often, on held-out mazes with the reader that
makes no mistakes; exports what it was asked; labels that by world.py's rule in place of people; and
asks the readers that err at the rates of the paper's Table 6. For the table of the README:

    COLLABVR_SLOW=1 COLLABVR_MAZES=20 COLLABVR_READERS=runs/readers \\
        pytest -s examples/tests/test_readers.py
"""

import os
import re
import threading
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

from collabvr import Call, Clip, Config
from examples import runs
from examples.maze import vlm, world
from examples.maze.compare import SUPERVISORS, exhausted
from examples.maze.foreign import held_out
from examples.supervisor import __main__ as supervisor
from examples.supervisor import points

MAZES = int(os.environ.get("COLLABVR_MAZES", "2"))  # for each number of segments
READERS = {"perfect": vlm.Errors(), **SUPERVISORS}


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
    found = re.search(r"row (\d+), column (\d+)", texts[-2])
    target = (int(found[1]) - 1, int(found[2]) - 1) if found else maze.goal  # M2 has none: the goal
    begin = cell(frames[0])
    s = world.score(frames, world.Maze(maze.open, begin, target, maze.look))
    clean = s.one_circle and not s.left_corridors and not s.jumped
    moved = s.end is not None and world.nearest_open(maze.open, s.end) != begin
    good = clean and moved and s.progress > 0
    return {"id": point["id"], "verdict": "accept" if good else "reject"}


def served(errors: vlm.Errors) -> list[str]:
    """The options that ask a reader with these errors."""
    server = vlm.serve(errors=errors)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return ["--vlm-url", f"http://127.0.0.1:{server.server_port}/v1"]


def rates(reply: dict, field: str, errors: vlm.Errors) -> float:
    said = [errors.applied(reply, vlm.Request("", [str(i)], [])) for i in range(2000)]
    return np.mean([x[field] == reply[field] for x in said])


def test_readers_err_at_the_rates_that_they_are_told():
    errors = vlm.Errors(accept_recall=0.8, reject_recall=0.4, depth_match=0.6)
    base = {"verdict": "accept", "reason": "", "suggestion": ""}
    assert abs(rates(base, "verdict", errors) - 0.8) < 0.03
    assert abs(rates(base | {"verdict": "reject"}, "verdict", errors) - 0.4) < 0.035
    for steps in (1, 2, 3):
        plan = {"estimated_steps_remaining": steps}
        assert abs(rates(plan, "estimated_steps_remaining", errors) - 0.6) < 0.035


@pytest.mark.skipif("COLLABVR_SLOW" not in os.environ, reason="runs mazes: COLLABVR_SLOW=1")
def test_error_rates_that_go_in_come_out(tmp_path, capsys):
    """The reader without mistakes agrees with the rule, the others less."""
    from examples.bench.run import main
    from examples.maze.run import CONFIG, VLM, WAN

    out = Path(os.environ.get("COLLABVR_READERS", tmp_path))  # the same one goes on
    options = []
    for name, value in (CONFIG | VLM | WAN).items():
        options += [f"--{name.replace('_', '-')}", str(value)]
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
        assert main(argv=[*where, "--method", method, *options, *served(vlm.Errors())]) == 0
    folder = out / "points"
    assert supervisor.main(["export", str(out), "--out", str(folder)]) == 0
    labels = []
    for point in points.read_objects(folder / "points.jsonl"):
        parts = [points.restore(folder, x) for x in point["parts"]]
        labels.append(label(point, parts, mazes[point["id"].split("/")[2]]))
    runs.write_lines(out / "labels.jsonl", labels)
    assert {x["verdict"] for x in labels if "verdict" in x} == {"accept", "reject"}
    for name, errors in READERS.items():
        asked = ["ask", str(folder), "--name", name, "--vlm", vlm.MODEL, "--verify-fps", "8"]
        assert supervisor.main([*asked, *served(errors)]) == 0

    replies = [str(folder / "replies" / f"{name}.jsonl") for name in READERS]
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


@pytest.mark.parametrize("calls, found", [
    ("1a", []), ("1r 1a", []), ("1r 1r 1f", [("fallback", None)]),
    ("1r 1r 1g 1a 2a", [("regen", True)]), ("1r 1r 1g 1r 2a", [("regen", False)]),
    ("1r 1r 1s 2r 2a", [("split", False)]), ("1r 1r 2a 2", [("best", True)]),
    ("1r 1r 2r 2r", [("best", False), ("best", None)])])
def test_compare_counts_an_exhausted_step(calls, found):
    """With its route, and what came next."""
    words = {
        "a": ("verifier", {"verdict": "accept"}), "r": ("verifier", {"verdict": "reject"}),
        "g": ("router", {"action": "regen"}), "s": ("router", {"action": "split"}),
        "f": ("router", {"action": "fallback"}), "": ("vgm", None),
    }
    told = []
    for x in calls.split():
        role, reply = words[x[1:]]
        told.append(Call(t=int(x[0]), role=role, reply=reply))
    assert exhausted(told, Config(M=2, on_exhausted="best")) == found
