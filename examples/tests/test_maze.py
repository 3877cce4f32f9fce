"""Tests of the maze world: its pictures can be read back, its rule is strict, and its
endpoint answers what the pictures show."""

import base64
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples import cli
from examples.maze import compare, foreign, run, vlm, world

slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")
CONFIG, URL = c.Config(**run.CONFIG), "http://127.0.0.1:{}/v1"


def mazes(count, pieces=None, seed=0, **look):
    """Random mazes of 4 to 8 cells a side."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield world.make(4 + i % 5, pieces, rng, world.make_look(rng, **look))


def worn(frame, rng):
    """A frame after JPEG and noise, as a generator and an encoder leave it."""
    noisy = np.clip(frame + rng.normal(0, 5, frame.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(noisy).save(out, "JPEG", quality=80)
    return np.array(Image.open(out))


# ------------------------------------------------------------------------------------ maze/world


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_a_maze_has_as_many_straight_segments_as_asked_for_and_corridors_one_cell_wide(pieces):
    for maze in mazes(15, pieces):
        path = world.shortest_path(maze.open, maze.start, maze.goal)
        assert len(world.segments(path)) == pieces
        assert (path[0], path[-1]) == (maze.start, maze.goal)
        wide = maze.open[:-1, :-1] & maze.open[1:, :-1] & maze.open[:-1, 1:] & maze.open[1:, 1:]
        assert not wide.any()


def test_what_is_drawn_can_be_read_back_from_worn_pixels():
    rng, right, names = np.random.default_rng(1), 0, 0
    for maze in mazes(50):
        seen = world.read(worn(world.draw(maze), rng))
        near = np.abs(np.subtract(seen.circle, maze.start)).max() < 0.2 and seen.goal == maze.goal
        right += bool((seen.open == maze.open).all() and near and seen.circles == 1)
        names += world.colour_word(seen.circle_colour) == nearest(world.CIRCLES, maze.look.circle)
    assert right >= 49 and names >= 49


def nearest(table, rgb):
    return min(table, key=lambda name: world.contrast(table[name], rgb))


def test_a_picture_that_is_no_maze_is_refused_in_one_sentence():
    flat, narrow = np.full((96, 96, 3), 200, np.uint8), np.zeros((50, 96, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    for picture in (flat, narrow, noise):
        with pytest.raises(ValueError):
            world.read(picture)


def solved(frames, maze):
    return world.score(np.stack(frames), maze).solved


def test_only_the_whole_way_inside_the_corridors_with_one_circle_counts_as_solved():
    for maze in mazes(3, 3):
        path = world.shortest_path(maze.open, maze.start, maze.goal)
        whole = world.film(maze, path, 33)
        assert solved(whole, maze) and world.score(whole, maze).progress > 0.95
        assert not solved(world.film(maze, path[:-1], 33), maze)
        assert not solved(whole[[0, -1]], maze), "a jump"
        other = world.draw(maze, path[-2])
        painted = np.abs(other - np.array(maze.look.circle)).max(-1, keepdims=True) < 30
        both = [np.where(painted, other, whole[4])] * 3
        assert not solved([*whole[:5], *both, *whole[5:]], maze), "two circles"


@slow
def test_a_straight_line_through_the_walls_is_not_solved():
    tried = 0
    for maze in mazes(30, 3, seed=3):
        line = np.linspace(maze.start, maze.goal, 50)[:, None]
        depth = np.abs(line - np.argwhere(maze.open)).max(-1).min(1).max()  # 0.5: on a wall's edge
        if depth > 0.8:
            tried += 1
            assert not solved(world.film(maze, [maze.start, maze.goal], 33), maze)
    assert tried > 15


# -------------------------------------------------------------------------------------- maze/vlm


@pytest.fixture(scope="module")
def url():
    with vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield URL.format(server.server_port)
        server.shutdown()


def post(url, body):
    """(status, JSON) of a chat request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", data, kind)
    try:
        with urllib.request.urlopen(request) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_endpoint_lists_its_model_and_says_what_it_is(url):
    with urllib.request.urlopen(f"{url}/models") as reply:
        (model,) = json.load(reply)["data"]
    assert model["id"] == "maze-reader" and "not a vision-language model" in model["owned_by"]


def test_what_the_endpoint_cannot_understand_gets_a_standard_error(url):
    def ask(*content, model=vlm.MODEL):
        return {"model": model, "messages": [{"role": "user", "content": list(content)}]}

    def picture(address):
        return {"type": "image_url", "image_url": {"url": address}}

    hello, raw = {"type": "text", "text": "hello"}, base64.b64encode(b"no picture").decode()
    for body, status in [
        (b"{", 400), (b"[]", 400), ({"model": vlm.MODEL}, 400), (ask(hello, model="gpt"), 404),
        (ask(hello), 400), (ask({"type": "sound"}), 400),
        (ask(picture("http://example.org/x.png")), 400),
        (ask(picture(f"data:image/png;base64,{raw}")), 400),
    ]:
        code, reply = post(url, body)
        assert code == status and reply["error"]["type"] == "invalid_request_error"


ROWS = ["11111", "00101", "11101", "00001", "00001"]
CORRIDOR = world.Maze(np.array([list(row) for row in ROWS]) == "1", (0, 0), (4, 4))


def reader(url, **more):
    return c.OpenAIVLM(**run.VLM | {"vlm_url": url} | more)


def check(url, path, frames=None):
    """The verifier's reply to a film of that path, two cells to the right being the plan."""
    film = c.Clip(world.film(CORRIDOR, path) if frames is None else frames, 8)
    models = c.Models(None, reader(url))
    p = c.FirstPlan(observation="", remaining_goal="", task_complete=False,
                    instruction="Move the red circle right 2 cells.", estimated_steps_remaining=1,
                    target_state="the red circle is in row 1, column 3")
    loop, I0 = c.CollabVR(models), world.draw(CORRIDOR)
    v, d = loop.verify(I0, "t", c.History(), film, p.instruction, p, 1)
    assert models.cost()["tokens_in"]["verifier"] > 258 * 18 and v == d.verdict
    return d


def test_the_verifier_accepts_the_plan_done_and_the_plan_half_done(url):
    assert check(url, [(0, 0), (0, 2)]).progress == "complete"
    half = check(url, [(0, 0), (0, 1)])
    assert (half.verdict, half.progress) == ("accept", "partial")


@pytest.mark.parametrize("path, suggestion", [
    ([(0, 0), (0, 4)], "right 2 cells, not 4"), ([(0, 0), (0, 0)], "right 2 cells, not 0"),
    ([(0, 0), (1, 0)], "inside the corridor"), ([(0, 0), (0, 2), (2, 2)], "right 2 cells, not 4")])
def test_the_verifier_rejects_what_is_wrong_and_says_what_would_be_right(url, path, suggestion):
    d = check(url, path)
    assert d.verdict == "reject" and suggestion in d.suggestion and 0 <= d.good_fraction < 1


def test_the_good_fraction_ends_before_the_error(url):
    path = [(0, 0), (0, 4)]
    d = check(url, path)
    places = world.walk(path, 17)
    k = int(d.good_fraction * 16)
    assert places[k][1] <= 2.75 and k >= 4


def test_the_verifier_sees_a_jump_a_second_circle_and_a_vanished_one(url):
    film = world.film(CORRIDOR, [(0, 0), (0, 2)])
    jump = np.concatenate([film[:1]] * 8 + [film[-1:]] * 9)
    assert "without a jump" in check(url, None, frames=jump).suggestion
    gone = film.copy()
    gone[8:] = np.where(np.array(film[8:]) == 0, 0, world.draw(CORRIDOR, (9, 9)))
    assert "one whole circle" in check(url, None, frames=gone).suggestion


# --------------------------------------------------------------------- the loop over real HTTP


class Obedient:
    """A generator that draws what the prompt says, and goes too far in every first attempt."""

    def __init__(self, maze, careless=True):
        self.maze, self.careless, self.prompts = maze, careless, []

    def __call__(self, frame, prompt, seconds, seed):
        self.prompts.append(prompt)
        first = world.read(world.draw(self.maze))
        at = tuple(round(x) for x in world.read(frame, like=first).circle)
        direction, k = re.findall(r"(up|down|left|right) (\d+) cell", prompt)[-1]
        k = int(k) + (self.careless and "Correction" not in prompt)
        end = tuple(np.add(at, np.multiply(world.MOVES[direction], k)))
        return c.Clip(world.film(self.maze, [at, end]), 8)


@pytest.mark.parametrize("video_input", ["frames", pytest.param("video_url", marks=slow)])
def test_the_loop_solves_mazes_with_a_generator_that_heeds_corrections(url, video_input):
    for maze in mazes(2, 3, seed=5):
        vgm = Obedient(maze)
        models = c.Models(vgm, reader(url, video_input=video_input))
        result = c.CollabVR(models, CONFIG).run(world.draw(maze), "Reach the goal.")
        assert result.status == "complete" and world.score(result.video.frames, maze).solved
        assert models.cost()["clips"] == len(vgm.prompts) and models.cost()["regenerations"] >= 1


def test_before_a_first_clip_the_planner_plans_an_action_even_if_the_circle_is_in_the_goal():
    maze = world.Maze(CORRIDOR.open, (4, 4), (4, 4), world.Look(half=0.45))
    at_the_end = ["Step: 2 of at most 3", "Last frame of step 1:"]
    for lines, done in (["Step: 1 of at most 3"], False), (at_the_end, True):
        pictures = [("Input image:", world.draw(maze)), *((x, world.draw(maze)) for x in lines[1:])]
        reply = vlm.planner(vlm.Request(c.PLANNER, lines, pictures))
        schema = c.Plan if done else c.FirstPlan
        assert schema.model_validate(reply).task_complete is done


def test_a_port_that_is_taken_gets_one_sentence_and_status_2(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert vlm.main(["--port", port]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"port {port}" in err and "choose another" in err


def test_a_video_scores_like_its_exact_frames():
    """H.264 halves the colours of small pictures; the rule reads them all the same."""
    for maze in mazes(3, 3, seed=8):
        path = world.shortest_path(maze.open, maze.start, maze.goal)
        for walked in (path, path[:-2]):
            clip = c.Clip(world.film(maze, walked, 33), 8)
            seen = iio.imread(c.mp4(clip), plugin="pyav", extension=".mp4")
            assert seen.shape == clip.frames.shape
            exact, again = (world.score(frames, maze) for frames in (clip.frames, seen))
            assert again.solved == exact.solved == (walked is path)
            assert abs(again.progress - exact.progress) < 0.02


@pytest.mark.parametrize("picture, said", [
    (np.full((96, 96, 3), 200, np.uint8), "two backgrounds"),
    (np.zeros((50, 96, 3), np.uint8), "square"), (None, "cannot be read as a picture")])
def test_a_picture_that_is_no_maze_gets_one_sentence_and_status_2(picture, said, tmp_path, capsys):
    file, out = tmp_path / "x.png", tmp_path / "out"
    if picture is None:
        file.write_text("no picture")
    else:
        Image.fromarray(picture).save(file)
    refused(["--image", str(file), "--out", str(out)], said, capsys)
    assert not out.exists()


def refused(argv, said, capsys):
    assert run.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert err.startswith(f"{cli.program()}: ")


def test_a_run_folder_that_cannot_be_made_gets_one_sentence_and_status_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run.main(["--out", str(tmp_path / "file")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{tmp_path}/file cannot be used as a run folder" in err.splitlines()[-1]


def test_a_run_that_is_refused_has_written_nothing(tmp_path, capsys):
    """Not for a wrong option, and not through a link in the run folder. Its server has ended."""
    out, victim, threads = tmp_path / "out", tmp_path / "victim", threading.active_count()
    assert run.main(["--out", str(out), "--colour", "red"]) == 2 and not out.exists()
    assert run.main(["--out", str(out), "--fps", "0"]) == 2 and not out.exists()
    out.mkdir()
    (out / "maze-5.png").symlink_to(victim)
    assert run.main(["--out", str(out)]) == 2
    assert "maze-5.png is a link" in capsys.readouterr().err and not victim.exists()
    assert threading.active_count() <= threads


def test_help_says_where_the_other_options_are(capsys):
    assert run.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: {cli.program()} " in out and "`python collabvr.py --help` lists them" in out


def test_a_refusal_shows_no_older_run(tmp_path, capsys):
    """The result and the page of an earlier run are not this run's."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "calls.jsonl").touch()
    with pytest.raises(SystemExit, match="2"):
        run.run(["--out", str(out), "--colour", "red"])
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------- compare, and wrong readers


def judged(verdict, progress="none"):
    return {"reason": "seen", "action_executed": verdict == "accept", "progress": progress,
            "good_fraction": 0.5, "suggestion": "Go on.", "confidence": "low", "verdict": verdict}


def test_a_reader_that_is_told_to_err_errs_at_about_that_rate_and_always_in_the_same_way():
    wrong = vlm.Errors(accept_recall=0.8, reject_recall=0.4)
    for verdict, rate in (("accept", 0.8), ("reject", 0.4)):
        right = judged(verdict, "partial" if verdict == "accept" else "none")
        said, again = ([wrong.applied(right, vlm.Request(lines=[str(i)])) for i in range(1000)]
                       for _ in range(2))
        share = sum(reply["verdict"] == verdict for reply in said) / 1000
        assert said == again and abs(share - rate) < 0.05
        for reply in said:
            d = c.Verification.model_validate(reply)
            assert d.action_executed == (d.progress != "none") == (d.verdict == "accept")


def test_a_wrong_reject_says_the_action_once_however_often_the_prompt_was_corrected():
    prompt = "Move it. Correction: Move it and keep it inside the corridor."
    request = vlm.Request(lines=[f"Planned action: {prompt}"])
    reply = vlm.Errors(accept_recall=0).applied(judged("accept", "complete"), request)
    assert reply["suggestion"] == "Move it and keep it inside the corridor."


def test_held_out_mazes_are_repeatable_and_have_the_segments_that_were_asked_for():
    one, two = foreign.held_out(3, 5, 0), foreign.held_out(3, 5, 0)
    assert (one.open == two.open).all() and one.look == two.look
    way = world.shortest_path(one.open, one.start, one.goal)
    assert len(world.segments(way)) == 3


def test_foreign_mazes_can_be_read_and_solved_though_this_project_did_not_draw_them():
    for i in range(12):
        maze, picture = foreign.foreign(i, 0)
        seen = world.read(picture)
        assert (seen.open == maze.open).all() and seen.goal == maze.goal
        assert np.abs(np.subtract(seen.circle, maze.start)).max() < 0.1
        assert world.shortest_path(maze.open, maze.start, maze.goal)


@pytest.mark.parametrize("argv", [
    "--segments 0", "--segments x", "--methods no", "--mazes 0", "--workers 0", "--seed -1",
    "--vgm nowhere"])
def test_a_comparison_that_cannot_be_made_is_refused_before_it_starts(argv, tmp_path, capsys):
    assert compare.main([*argv.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- maze/tiny-wan, slow


@slow
def test_the_loop_with_tiny_wan_solves_three_segment_mazes_more_often_than_one_clip_does(url):
    vgm = c.Wan(**run.WAN)
    single = loop = seconds = 0
    rng = np.random.default_rng(2027)
    for i in range(20):
        maze = world.make(6, 3, rng)
        I0, q = world.draw(maze), world.task(maze)
        single += world.score(vgm(I0, q, 2.0, i).frames, maze).solved
        models = c.Models(vgm, reader(url), seed=i)
        loop += world.score(c.CollabVR(models, CONFIG).run(I0, q).video.frames, maze).solved
        seconds += models.cost()["vgm_seconds"] / 20
    print(f"solved: one clip {single}/20, the loop {loop}/20 at {seconds:.1f} s of video a maze")
    assert loop >= single + 3


@slow
def test_the_example_runs_scores_its_video_and_makes_a_page_of_every_attempt(tmp_path, capsys):
    out = tmp_path / "out"
    assert run.main(["--out", str(out)]) == 0
    said, trace = capsys.readouterr().out, json.loads((out / "trace.json").read_text())
    assert trace["status"] == "complete" and re.search("^by rule +solved, ", said, re.MULTILINE)
    assert trace["settings"].items() >= (run.CONFIG | run.VLM | run.WAN).items()
    page = (out / "report.html").read_text()
    assert f"page              {out / 'report.html'}" in said
    assert page.count("data:video/mp4") == trace["cost"]["clips"] + 1  # and the final video
    clips = sorted((out / "clips").iterdir())
    assert run.main(["--out", str(out), "--on-exhausted", "best"]) == 0  # it goes to collabvr.py
    trace = json.loads((out / "trace.json").read_text())
    assert trace["settings"]["on_exhausted"] == "best"
    assert sorted((out / "clips").iterdir()) == clips, "what the option does not touch is replayed"


@slow
def test_every_method_is_compared_on_the_same_maze(tmp_path, capsys):
    methods = [name for name in compare.METHODS if name != "routed"]  # the reader knows it not
    assert compare.main(["--methods", *methods, "--segments", "2", "--mazes", "1",
                         "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    rows = {r["method"]: r for r in map(json.loads, lines)}
    assert set(rows) == set(methods)
    assert (rows["pass4"]["clips"], rows["videotpo"]["clips"]) == (4, 5)
    assert rows["single"]["vlm_calls"] == 0 and rows["steps1"]["steps"] == 1
    assert f"| qwen9b | {rows['qwen9b']['vgm_seconds']:.1f} |" in capsys.readouterr().out


@slow
def test_kill_9_at_thirty_random_moments_changes_nothing_and_pays_for_nothing_twice(
        url, tmp_path, monkeypatch):
    asked, answer, chance = [], vlm.answer, random.Random(0)
    monkeypatch.setattr(vlm, "answer", lambda *args: asked.append(1) or answer(*args))
    maze = world.make(6, 3, np.random.default_rng([2026, 1]))
    Image.fromarray(world.draw(maze)).save(tmp_path / "maze.png")

    def start(out):
        return subprocess.Popen(
            [sys.executable, c.__file__, "--image", tmp_path / "maze.png",
             "--task", world.task(maze), "--out", out, *run.OPTIONS, "--vlm-url", url],
            stdout=subprocess.DEVNULL, stderr=(tmp_path / f"{out.name}.log").open("a"))

    def outcome(out):
        trace = (out / "trace.json").read_text()
        names = re.findall(r'"clip": "(.*)"', trace)
        clips = [c.digest(c.read_lossless((out / name).read_bytes())) for name in names]
        trace = re.sub(r'"wall_seconds": ({[^}]*}|[^,}]*)', "", trace)
        trace = re.sub(r'"sha256": "\w+"', "", trace)  # a Matroska file has random numbers in it
        made = len(re.findall("vgm: .*waiting", (tmp_path / f"{out.name}.log").read_text()))
        return trace, clips, (out / "video.mp4").read_bytes(), made

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    took, calls = time.monotonic() - began, len(asked)
    *whole, clips = outcome(tmp_path / "whole")
    assert clips >= 3 and calls >= 6
    killed = n = 0
    while killed < 30:
        n, kills = n + 1, 0
        asked.clear()
        while True:
            limit = chance.uniform(0.2, 0.9) * took
            if killed + kills == 30:  # on a machine that has got slower no run might end in time
                limit = None
            with start(tmp_path / f"run{n}") as process:
                try:
                    assert process.wait(limit) == 0
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
        *found, made = outcome(tmp_path / f"run{n}")
        assert found == whole
        assert len(asked) <= calls + kills and made <= clips + kills  # the call under way, no more
        killed += kills
