"""Tests of the maze world, by file."""

import io
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

import collabvr
from collabvr import Call, Clip, CollabVR, Config, Models, Plan, Routing, Verification
from examples import baselines
from examples.maze import compare, foreign, moves, pixels, rule, run, world
from examples.maze.oracle import Oracle, Scene
from examples.tests.conftest import accept, plan, reject

CONFIG = Config(seconds_first=run.SECONDS, seconds_next=run.SECONDS)
slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")


def mazes(count, pieces=None, seed=0):
    """Random mazes of 4 to 8 cells a side."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield world.make(4 + i % 5, pieces, rng)


# ------------------------------------------------------------------------------
# world.py, foreign.py


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_a_maze_has_the_segments_asked_for(pieces):
    """And corridors one cell wide."""
    for maze in mazes(15, pieces):
        path = maze.path()
        assert len(world.segments(path)) == pieces
        assert (path[0], path[-1]) == (maze.start, maze.goal)
        rows = maze.corridors[:-1] & maze.corridors[1:]
        assert not (rows[:, :-1] & rows[:, 1:]).any()


def test_held_out_mazes_are_repeatable():
    one, two = foreign.held_out(3, 5, 0), foreign.held_out(3, 5, 0)
    assert (one.corridors == two.corridors).all() and one.look == two.look
    assert len(world.segments(one.path())) == 3


def test_foreign_mazes_can_be_read_and_solved():
    """Though this project did not draw them."""
    for i in range(12):
        maze, picture = foreign.foreign(i, 0)
        seen = pixels.read(picture)
        assert (seen.corridors == maze.corridors).all() and seen.goal == maze.goal
        assert seen.circle and world.distance(seen.circle, maze.start) < 0.1
        assert maze.path()


# ------------------------------------------------------------------------------
# pixels.py


def worn(frame, rng):
    """A frame after JPEG and noise, as a generator and an encoder leave it."""
    noisy = np.clip(frame + rng.normal(0, 5, frame.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).save(out, "JPEG", quality=80)
    return np.array(Image.open(out))


def test_worn_pixels_can_be_read():
    rng = np.random.default_rng(1)
    right = names = 0
    for maze in mazes(50):
        seen = pixels.read(worn(world.draw(maze), rng))
        near = seen.circle and world.distance(seen.circle, maze.start) < 0.2
        same = (seen.corridors == maze.corridors).all() and seen.goal == maze.goal
        right += bool(near and same and seen.circles == 1)
        listed = min(world.CIRCLES.items(), key=lambda x: world.distance(x[1], maze.look.circle))
        names += moves.colour_word(seen.look.circle) == listed[0]
    assert right >= 49 and names >= 49


def test_a_picture_that_is_no_maze_is_refused():
    flat, narrow = np.full((96, 96, 3), 200, np.uint8), np.zeros((50, 96, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    for picture in (flat, narrow, noise):
        with pytest.raises(ValueError):
            pixels.read(picture)


# ------------------------------------------------------------------------------
# rule.py


def solved(frames, maze):
    return rule.score(np.stack(frames), maze).solved


def test_only_the_whole_way_counts_as_solved():
    """Inside the corridors, and with one circle."""
    for maze in mazes(3, 3):
        path = maze.path()
        whole = world.film(maze, path, 33)
        assert solved(whole, maze) and rule.score(whole, maze).progress > 0.95
        assert not solved(world.film(maze, path[:-1], 33), maze)
        assert not solved(whole[[0, -1]], maze), "a jump"
        other = world.draw(maze, path[-2])
        painted = np.abs(other - np.array(maze.look.circle)).max(-1, keepdims=True) < 30
        both = [np.where(painted, other, whole[4])] * 3
        assert not solved([*whole[:5], *both, *whole[5:]], maze), "two circles"


def test_a_line_through_the_walls_is_not_solved():
    tried = 0
    for maze in mazes(12, 3, seed=3):
        line = np.linspace(maze.start, maze.goal, 50)[:, None]
        cells = np.argwhere(maze.corridors)
        depth = np.abs(line - cells).max(-1).min(1).max()  # 0.5: on a wall's edge
        if depth > 0.8:
            tried += 1
            film = world.film(maze, [maze.start, maze.goal], 33)
            assert rule.score(film, maze).left_corridors and not solved(film, maze)
    assert tried > 5


def test_a_video_scores_like_its_exact_frames():
    """H.264 halves the colours of small pictures; the rule reads them all the same."""
    for maze in mazes(3, 3, seed=8):
        for walked in (maze.path(), maze.path()[:-2]):
            film = world.film(maze, walked, 33)
            seen = iio.imread(collabvr.mp4(Clip(film, 8)), plugin="pyav", extension=".mp4")
            exact, again = rule.score(film, maze), rule.score(seen, maze)
            assert again.solved == exact.solved == (walked == maze.path())
            assert abs(again.progress - exact.progress) < 0.02


def test_the_verdict_says_why():
    maze = next(mazes(1, 3))
    film = world.film(maze, maze.path())
    assert rule.verdict(rule.score(film, maze)) == "solved, 100 % of the way"
    film[4:7] = world.board(maze)
    said = rule.verdict(rule.score(film, maze))
    assert said == "not solved, 100 % of the way: no circle in frames 4-6 of 17"
    said = rule.verdict(rule.score(film[:1], maze))
    assert said.startswith("not solved, 0 % of the way: it ends in row ")


def test_a_maze_is_known_by_its_picture():
    for maze in mazes(5):
        seen = rule.maze_of(world.draw(maze))
        assert (seen.corridors == maze.corridors).all()
        assert (seen.start, seen.goal) == (maze.start, maze.goal)
        assert world.task(seen) == world.task(maze)


# ------------------------------------------------------------------------------
# oracle.py

ROWS = ["11111", "00101", "11101", "00001", "00001"]
CORRIDOR = world.Maze(np.array([list(row) for row in ROWS]) == "1", (0, 0), (4, 4))


def check(path, frames=None):
    """The verifier's reply to a film of that path, two cells to the right being the plan."""
    frames = world.film(CORRIDOR, path) if frames is None else frames
    models = Models(None, Oracle())
    p = Plan.model_validate(plan() | {"target_state": "the red circle is in row 1, column 3"})
    I0, a_t = world.draw(CORRIDOR), "Move the red circle right 2 cells."
    _, d = CollabVR(models).verify(I0, "t", collabvr.History(), Clip(frames, 8), a_t, p, 1)
    return d


def test_the_oracle_accepts_a_plan_done_or_half_done():
    assert check([(0, 0), (0, 2)]).progress == "complete"
    half = check([(0, 0), (0, 1)])
    assert (half.verdict, half.progress) == ("accept", "partial")


@pytest.mark.parametrize("path, suggestion", [
    ([(0, 0), (0, 4)], "right 2 cells, not 4"), ([(0, 0), (0, 0)], "right 2 cells, not 0"),
    ([(0, 0), (1, 0)], "inside the corridor"), ([(0, 0), (0, 2), (2, 2)], "right 2 cells, not 4")])
def test_the_oracle_rejects_what_is_wrong(path, suggestion):
    """And says what would be right."""
    d = check(path)
    assert d.verdict == "reject" and suggestion in d.suggestion and 0 <= d.good_fraction < 1


def test_the_good_fraction_ends_before_the_error():
    path = [(0, 0), (0, 4)]
    k = int(check(path).good_fraction * 16)
    assert world.walk(path, 17)[k][1] <= 2.75 and k >= 4


def test_the_oracle_sees_jumps_and_other_circles():
    film = world.film(CORRIDOR, [(0, 0), (0, 2)])
    jump = np.concatenate([film[:1]] * 8 + [film[-1:]] * 9)
    assert "without a jump" in check(None, jump).suggestion
    film[8:] = world.board(CORRIDOR)
    assert "one whole circle" in check(None, film).suggestion


class Obedient:
    """A generator that draws what the prompt says. A careless one first goes too far."""

    def __init__(self, maze, careless=False):
        self.maze = maze
        self.careless = careless

    def __call__(self, frame, prompt, seconds, seed):
        first = pixels.read(world.draw(self.maze))
        circle = pixels.read(frame, like=first).circle
        assert circle is not None
        begin = pixels.cell_of(circle)
        way = re.findall(r"(up|down|left|right) (\d+) cell", prompt)
        if not way:  # the whole task
            return Clip(world.film(self.maze, self.maze.path()), 8)
        direction, count = way[-1][0], int(way[-1][1])
        count += self.careless and "Correction" not in prompt
        end = np.add(begin, np.multiply(world.MOVES[direction], count))
        return Clip(world.film(self.maze, [begin, end]), 8)


def test_the_loop_solves_mazes():
    """With a generator that heeds corrections."""
    for maze in mazes(2, 3, seed=5):
        models = Models(Obedient(maze, careless=True), Oracle())
        result = CollabVR(models, CONFIG).run(world.draw(maze), "Reach the goal.")
        assert result.status == "complete" and solved(result.video.frames, maze)
        assert models.cost()["regenerations"] >= 1


@pytest.mark.parametrize("good, allowed, action", [
    (0.5, "regen, split, fallback", "regen"), (0.1, "regen, split, fallback", "split"),
    (0.1, "regen, fallback", "fallback")])
def test_the_router_keeps_what_is_right(good, allowed, action):
    """And asks for the cells that are left."""
    clip = Clip(world.film(CORRIDOR, [(0, 0), (0, 4)]), 8)
    parts = [
        world.draw(CORRIDOR), clip, "Suggestion: Move the red circle right 3 cells, not 4.",
        f"Good fraction: {good:.2f}", f"Allowed actions: {allowed}"]
    r = Routing.model_validate_json(Oracle()("", parts, Routing)["text"])
    assert r.action == action
    if action == "regen":
        assert r.suggestion == "From here move the red circle right 1 cell and stop."


@pytest.mark.parametrize("name", baselines.METHODS)
def test_the_oracle_knows_the_roles_of(name):
    maze = next(mazes(1, 3, seed=5))
    models = Models(Obedient(maze), Oracle())
    baselines.METHODS[name](models, CONFIG).run(world.draw(maze), world.task(maze))
    assert not any(call.fault for call in models.calls)


def test_a_first_plan_has_an_action_even_at_the_goal():
    maze = world.Maze(CORRIDOR.corridors, (4, 4), (4, 4), world.Look(half=0.45))
    I0 = world.draw(maze)
    begin = ["Step: 1 of at most 3", I0]
    for parts, done in (begin, False), ([*begin, "Last frame of step 1:", I0], True):
        p = Plan.model_validate_json(Oracle()("", parts, Plan)["text"])
        assert p.task_complete is done


def rate(oracle, reply, schema, field):
    """How often what the oracle makes of many alike replies is the right one."""
    scene = Scene([world.draw(CORRIDOR)])
    said = []
    for i in range(1000):
        scene.parts = [f"Call {i}", "Planned action: go"]
        said.append(oracle.with_errors(reply, scene))
        schema.model_validate(said[-1])
    assert oracle.with_errors(reply, scene) == said[-1], "always in the same way"
    return np.mean([each[field] == reply[field] for each in said])


def test_the_oracle_errs_at_the_rates_that_it_is_told():
    oracle = Oracle(accept_recall=0.8, reject_recall=0.4, depth_match=0.6)
    assert abs(rate(oracle, accept(), Verification, "verdict") - 0.8) < 0.05
    assert abs(rate(oracle, reject(), Verification, "verdict") - 0.4) < 0.05
    for left in (1, 2, 3):
        field = "estimated_steps_remaining"
        assert abs(rate(oracle, plan(left=left), Plan, field) - 0.6) < 0.05


def test_a_wrong_reject_says_the_action_once():
    """However often the prompt was corrected."""
    action = "Move it. Correction: Move it and keep it inside the corridor."
    clip = Clip(world.film(CORRIDOR, [(0, 0), (0, 2)]), 8)
    parts = [world.draw(CORRIDOR), f"Planned action: {action}", "Target state: row 1, column 3"]
    reply = json.loads(Oracle(accept_recall=0)("", [*parts, clip], Verification)["text"])
    assert reply["suggestion"] == "Move it and keep it inside the corridor."


# ------------------------------------------------------------------------------
# moves.py


def test_tiny_wan_knows_every_word_of_the_oracle():
    tokenizer = Tokenizer.from_file(f"{run.TinyWan.vgm}/tokenizer/tokenizer.json")
    unknown = tokenizer.token_to_id("<unk>")
    assert unknown in tokenizer.encode("marmalade").ids
    for direction in world.MOVES:
        order = moves.move("the red circle", f"{direction} {moves.cells(3)}")
        ends = [moves.INSIDE, moves.WHOLE, moves.NO_JUMP, moves.but_not(2), moves.but_not("up")]
        texts = [f"{order}{end}." for end in ends]
        texts += [moves.rest("the red circle", f"{direction} {moves.cells(1)}")]
        texts += moves.whole_tasks("the red circle", "green")
        for text in texts:
            assert unknown not in tokenizer.encode(f"{text} Correction: {text}").ids, text


# ------------------------------------------------------------------------------
# run.py


class Server(ThreadingHTTPServer):
    """A VLM's endpoint that plans one step and accepts everything."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # names of schemas
        self.options = ["--vlm-url", f"http://127.0.0.1:{self.server_port}/v1", "--vlm", "stub"]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["response_format"]["json_schema"]["name"]
        self.server.asked.append(name)
        reply = plan("Move the circle.") if name.endswith("Plan") else accept()
        message = {"role": "assistant", "content": json.dumps(reply)}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "stub",
                  "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_vlm_steers_and_the_rule_scores(stub, tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main([*stub.options, "--out", str(out), "--sampling-steps", "1"]) == 0
    trace = json.loads((out / "trace.json").read_text())
    assert stub.asked == ["FirstPlan", "Verification"] and trace["status"] == "complete"
    assert trace["score"] < 1 and trace["by_rule"].startswith("not solved, ")
    assert trace["settings"]["verify_fps"] == 8 and trace["settings"]["seconds_next"] == 2
    ending = capsys.readouterr().out.splitlines()[-2:]
    assert ending[0] == f"by rule           {trace['by_rule']}"
    assert ending[1] == f"page              python -m examples.report {out}"


@slow
def test_a_maze_is_solved_offline(tmp_path, capsys):
    """And a picture of it is another maze of one's own."""
    assert run.main(["--out", str(tmp_path / "one")]) == 0
    assert "by rule           solved, 100 % of the way" in capsys.readouterr().out
    image = str(tmp_path / "one.png")
    assert run.main(["--image", image, "--out", str(tmp_path / "two")]) == 0
    one, two = (json.loads((tmp_path / x / "trace.json").read_text()) for x in ("one", "two"))
    requests = [[call["request"] for call in trace["calls"]] for trace in (one, two)]
    assert requests[0] == requests[1] and one["score"] == two["score"] == 1


@pytest.mark.parametrize("picture, said", [
    (np.full((96, 96, 3), 200, np.uint8), "two backgrounds"),
    (np.zeros((50, 96, 3), np.uint8), "square")])
def test_a_picture_without_a_maze_gets_a_sentence(picture, said, tmp_path, capsys):
    file, out = tmp_path / "x.png", tmp_path / "out"
    Image.fromarray(picture).save(file)
    assert run.main(["--image", str(file), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err and not out.exists()


def test_help_shows_what_tiny_wan_was_trained_for(capsys):
    assert run.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--maze-seed" in out and "--accept-recall" in out
    assert "12 MB" in out and re.search(r"--sampling-steps INT\s[^-]*\(default: 12\)", out)


# ------------------------------------------------------------------------------
# compare.py


@pytest.mark.slow
def test_a_vlm_stands_between_floor_and_ceiling(stub, tmp_path, capsys):
    argv = [*stub.options, "--methods", "single", "collabvr", "--segments", "1", "--mazes", "1",
            "--workers", "1", "--out", str(tmp_path)]
    assert compare.main(argv) == 0
    table = capsys.readouterr().out
    rows = re.findall(r"^\| (\w+) \| .* s?.*? \| (\d+) %", table, re.MULTILINE)
    assert [name for name, _ in rows] == ["single", "collabvr", "still", "ceiling"]
    assert dict(rows)["still"] == "0" and dict(rows)["ceiling"] == "100"
    asked = len(stub.asked)
    assert compare.main(argv) == 0 and len(stub.asked) == asked, "it goes on from its folders"
    assert capsys.readouterr().out == table


def job(method, vlm, out):
    return compare.Job(method, "1", 0, 0, Path(run.TinyWan.vgm), vlm, out)


def useless(instructions, parts, schema):
    return "I cannot."


def no_endpoint(instructions, parts, schema):
    raise collabvr.Problem("no endpoint")


def test_unusable_replies_are_a_failed_run(tmp_path):
    row = job("collabvr", useless, tmp_path).run()
    assert (row["status"], row["score"], row["vlm_calls"]) == ("failed", 0, 3)
    with pytest.raises(collabvr.Problem, match="no endpoint"):
        job("collabvr", no_endpoint, tmp_path / "other").run()


def test_a_run_says_by_whom_it_was_made(tmp_path):
    row = job("still", Oracle(), tmp_path).run()
    trace = json.loads((tmp_path / "still" / "1-0" / "trace.json").read_text())
    assert trace["method"] == "still" and trace["score"] == row["score"] == 0
    assert trace["by_rule"].startswith("not solved, 0 % of the way: it ends in row ")


@pytest.mark.parametrize("argv", [
    "--segments 0", "--methods no", "--mazes 0", "--workers 0", "--seed -1", "--vgm nowhere"])
def test_what_cannot_be_compared_is_refused(argv, tmp_path, capsys):
    assert compare.main([*argv.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("calls, found", [
    ("1a", []), ("1r 1a", []), ("1r 1r 1f", [("fallback", None)]),
    ("1r 1r 1g 1a 2a", [("regen", True)]), ("1r 1r 1g 1r 2a", [("regen", False)]),
    ("1r 1r 1s 2r 2a", [("split", False)]), ("1r 1r 2a", [("best", True)]),
    ("1r 1r 2r 2r", [("best", False), ("best", None)])])
def test_compare_counts_an_exhausted_step(calls, found):
    """With its route, and what came next."""
    routes = {"g": "regen", "s": "split", "f": "fallback"}
    told = []
    j = 0
    for word in calls.split():
        t, kind = int(word[0]), word[1]
        if kind in routes:
            told.append(Call(t=t, role="router", reply={"action": routes[kind]}))
            continue
        j = j + 1 if told and told[-1].t == t else 1
        told.append(Call(t=t, j=j, role="vgm", seconds=2))
        told.append(Call(t=t, role="verifier", reply=accept() if kind == "a" else reject()))
    assert compare.exhausted(told, Config(M=2, on_exhausted="best")) == found
