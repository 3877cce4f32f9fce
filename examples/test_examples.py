"""Tests of the examples. The maze world: its pictures can be read back, its rule is strict, and its
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
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "maze"), str(HERE), str(HERE.parent)]

import baselines
import compare
import run
import vlm
import world

import collabvr as c

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
    for maze in mazes(100):
        seen = world.read(worn(world.draw(maze), rng))
        near = np.abs(np.subtract(seen.circle, maze.start)).max() < 0.2 and seen.goal == maze.goal
        right += bool((seen.open == maze.open).all() and near and seen.circles == 1)
        names += world.colour_word(seen.circle_colour) == nearest(world.CIRCLES, maze.look.circle)
    assert right >= 98 and names >= 98


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
    for maze in mazes(10, 3):
        path = world.shortest_path(maze.open, maze.start, maze.goal)
        whole = world.film(maze, path, 33)
        assert solved(whole, maze) and world.score(whole, maze).progress > 0.95
        assert not solved(world.film(maze, path[:-1], 33), maze)
        assert not solved(whole[[0, -1]], maze), "a jump"
        other = world.draw(maze, path[-2])
        painted = np.abs(other - np.array(maze.look.circle)).max(-1, keepdims=True) < 30
        both = [np.where(painted, other, whole[4])] * 3
        assert not solved([*whole[:5], *both, *whole[5:]], maze), "two circles"


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
    models, h = c.Models(None, reader(url)), c.CollabVR
    p = h.FirstPlan(observation="", remaining_goal="", task_complete=False,
                    instruction="Move the red circle right 2 cells.", estimated_steps_remaining=1,
                    target_state="the red circle is in row 1, column 3")
    v, d = h(models).verify(world.draw(CORRIDOR), "t", c.History(), film, p.instruction, p, 1)
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


@pytest.mark.parametrize("video_input", ["frames", "video"])
def test_the_loop_solves_mazes_with_a_generator_that_heeds_corrections(url, video_input):
    for maze in mazes(3, 3, seed=5):
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
        reply = vlm.planner(vlm.Request(c.CollabVR.PLANNER, lines, pictures))
        schema = c.CollabVR.Plan if done else c.CollabVR.FirstPlan
        assert schema.model_validate(reply).task_complete is done


def test_a_port_that_is_taken_gets_one_sentence_and_status_2(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match="2"):
            vlm.main(["--port", port])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"port {port}" in err and "choose another" in err


# --------------------------------------------------------------------------------- the baselines


class Gambler:
    """A generator that goes the whole way with every third seed, else only a part of it; some of
    its calls fail."""

    def __init__(self, maze, fail=()):
        self.maze, self.fail, self.calls = maze, fail, []

    def __call__(self, frame, prompt, seconds, seed):
        self.calls.append((prompt, seconds, seed))
        if len(self.calls) in self.fail:
            raise RuntimeError("out of memory")
        path = world.shortest_path(self.maze.open, self.maze.start, self.maze.goal)
        path = path if seed % 3 == 0 else path[: 1 + len(path) // 2]
        return c.Clip(world.film(self.maze, path, int(8 * seconds) + 1), 8)

    def seeds(self):
        return [seed for *_, seed in self.calls]


def go(method, maze, vgm, vlm, seed=0, **config):
    """(result, cost) of a baseline; vlm: an endpoint's URL or a callable."""
    models = c.Models(vgm, vlm if callable(vlm) else reader(vlm), seed=seed)
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    result = baselines.METHODS[method](models, config).run(world.draw(maze), world.task(maze))
    return result, models.cost()


class Script:
    """A VLM that answers from a list and keeps the schemas that it was given."""

    def __init__(self, *replies):
        self.replies, self.schemas = list(replies), []

    def __call__(self, instructions, parts, schema):
        self.schemas.append(schema.model_json_schema())
        return {"text": json.dumps(self.replies.pop(0))}


def planned(left=1, done=False):
    return {"observation": "", "remaining_goal": "", "task_complete": done,
            "instruction": "" if done else "Go.", "target_state": "" if done else "There.",
            "estimated_steps_remaining": left}


def judged(verdict, progress="none"):
    return {"reason": "seen", "action_executed": verdict == "accept", "progress": progress,
            "good_fraction": 0.5, "suggestion": "Go on.", "confidence": "low", "verdict": verdict}


def routed(action):
    return {"reason": "so", "action": action, "suggestion": "Go far.", "estimated_steps": 0}


def test_single_is_one_clip_with_seed_1_and_asks_nobody(url):
    (maze,) = mazes(1, 2)
    vgm = Gambler(maze)
    result, cost = go("single", maze, vgm, url, seed=7)
    assert vgm.calls == [(world.task(maze), 2, 1)] and [*cost["calls"]] == ["vgm"]
    assert (cost["clips"], cost["vgm_seconds"]) == (1, 2)
    assert (result.status, result.unverified_steps) == ("unverified", [1])


def test_pass_at_k_takes_the_seeds_1_to_k_and_the_one_call_picks_the_one_that_arrives(url):
    for maze in mazes(4, 2):
        vgm = Gambler(maze)
        result, cost = go("pass4", maze, vgm, url, seed=7)
        assert vgm.seeds() == [1, 2, 3, 4] and world.score(result.video.frames, maze).solved
        assert cost["calls"] == {"vgm": 4, "picker": 1} and cost["vgm_seconds"] == 8


@pytest.mark.parametrize("fail", [1, 2, 3, 4])
def test_pass_at_k_compares_k_different_clips_also_after_a_generator_error(url, fail):
    (maze,) = mazes(1, 2)
    vgm = Gambler(maze, fail=[fail])
    _, cost = go("pass4", maze, vgm, url)
    made = [seed for n, seed in enumerate(vgm.seeds(), 1) if n != fail]
    assert len(set(made)) == 4 and (cost["clips"], cost["generator_errors"]) == (4, 1)


def test_a_pick_that_does_not_exist_is_not_in_the_schema_and_is_asked_for_again():
    (maze,) = mazes(1, 2)
    script = Script(*({"reason": "best", "best": k} for k in (3, 2)))
    vgm = Gambler(maze)
    result, cost = go("pass2", maze, vgm, script)
    assert cost["calls"]["picker"] == 2
    assert script.schemas[0]["properties"]["best"]["maximum"] == 2
    assert (result.video.frames == vgm(None, "", 2, 2).frames).all()


def test_videotpo_makes_two_rounds_of_two_seeds_and_a_last_clip_with_the_rewritten_prompt(url):
    (maze,) = mazes(1, 2)
    vgm = Gambler(maze)
    _, cost = go("videotpo", maze, vgm, url)
    assert vgm.seeds() == [1, 2, 1, 2, 1]
    assert cost["calls"] == {"vgm": 5, "critic": 2} and cost["vgm_seconds"] == 10
    assert vgm.calls[0][0] == vgm.calls[1][0] == world.task(maze)
    assert vgm.calls[4][0].startswith(world.task(maze)) and "Correction" in vgm.calls[4][0]


def test_preplanning_asks_once_and_then_chains_one_clip_a_milestone(url):
    for maze in mazes(4, 3):
        vgm = Obedient(maze, careless=False)
        result, cost = go("preplan", maze, vgm, url)
        assert world.score(result.video.frames, maze).solved
        assert (result.status, result.unverified_steps) == ("unverified", [1, 2, 3])
        assert cost["calls"] == {"planner": 1, "vgm": 3} and cost["steps"] == 3
        assert cost["vgm_seconds"] == 3 * 2.0  # what Obedient makes, whatever it is asked for


def test_more_milestones_than_allowed_are_not_in_the_schema_and_are_asked_for_again():
    step = {"instruction": "Move.", "target_state": "there"}
    script = Script(*({"observation": "", "milestones": [step] * k} for k in (3, 0, 2)))
    (maze,) = mazes(1, 2)
    vgm = Gambler(maze)
    assert go("preplan", maze, vgm, script, N_max=2)[1]["clips"] == 2
    assert script.schemas[0]["properties"]["milestones"]["maxItems"] == 2
    assert [seconds for _, seconds, _ in vgm.calls] == [2, 1]


def test_m1_alone_stops_when_the_planner_sees_the_circle_in_the_goal(url):
    for maze in mazes(5, 2, seed=6):
        result, cost = go("m1", maze, Obedient(maze, careless=False), url)
        assert (result.status, result.unverified_steps) == ("complete", [1, 2])
        assert cost["calls"] == {"planner": 3, "vgm": 2}


def test_m1_alone_ends_at_the_step_cap_whatever_the_last_plan_hoped_for():
    (maze,) = mazes(1, 2)
    script = Script(planned(2), planned(1))
    result, cost = go("m1", maze, Gambler(maze), script, N_max=2)
    assert (result.status, result.unverified_steps) == ("step_cap", [1, 2])
    assert cost["clips"] == 2 and not script.replies


def test_m2_alone_asks_no_planner_and_its_action_is_the_task():
    (maze,) = mazes(1, 2)
    vgm = Gambler(maze)
    script = Script(judged("reject"), judged("accept", "complete"))
    result, cost = go("m2", maze, vgm, script)
    q = world.task(maze)
    assert [prompt for prompt, *_ in vgm.calls] == [q, f"{q} Correction: Go on."]
    assert (result.status, result.unverified_steps) == ("complete", [])
    assert cost["calls"] == {"vgm": 2, "verifier": 2} and cost["steps"] == 1


def test_m2_alone_is_complete_only_if_the_accepted_clips_progress_is():
    (maze,) = mazes(1, 2)
    result, cost = go("m2", maze, Gambler(maze), Script(judged("accept", "partial")))
    assert result.status == "step_cap" and cost["clips"] == 1


@pytest.mark.parametrize("action, replies, status, unverified", [
    ("regen", [judged("accept", "complete")], "complete", []),
    ("regen", [judged("reject")], "step_cap", [1]), ("fallback", [], "fallback", [1])])
def test_m2_alone_goes_on_from_its_rejections_with_regen_or_fallback_and_never_a_split(
        action, replies, status, unverified):
    (maze,) = mazes(1, 2)
    script = Script(judged("reject"), routed("split"), routed(action), *replies)
    result, cost = go("m2", maze, Gambler(maze), script, M=1)
    assert (result.status, result.unverified_steps) == (status, unverified)
    assert cost["calls"]["router"] == 2 and cost["clips"] == 2 and not script.replies
    assert script.schemas[1]["properties"]["action"]["enum"] == ["regen", "fallback"]


def test_m2_alone_can_go_on_with_the_best_attempt():
    (maze,) = mazes(1, 2)
    result, cost = go("m2", maze, Gambler(maze), Script(judged("reject")), M=1, on_exhausted="best")
    assert (result.status, result.unverified_steps) == ("step_cap", [1]) and cost["clips"] == 1


# -------------------------------------------------------------------------------------- maze/run


def test_an_enlarged_video_scores_like_its_frames():
    for maze in mazes(5, 3, seed=8):
        path = world.shortest_path(maze.open, maze.start, maze.goal)
        for walked in (path, path[:-2]):
            clip = c.Clip(world.film(maze, walked, 33), 8)
            seen = iio.imread(c.encode_video(clip), plugin="pyav", extension=".mp4")
            assert len(seen) == len(clip.frames) and len(seen[0]) >= 256 > len(clip.frames[0])
            whole, again = (world.score(x, maze) for x in (clip.frames, seen))
            assert again.solved == whole.solved == (walked is path)
            assert abs(again.progress - whole.progress) < 0.02


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


def test_a_run_folder_that_cannot_be_made_gets_one_sentence_and_status_2(tmp_path, capsys):
    (tmp_path / "file").touch()
    refused(["--out", str(tmp_path / "file")], "File exists", capsys)


def refused(argv, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(argv)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("run.py: ") and err.count("\n") == 1 and said in err


# --------------------------------------------------------------------- compare, and wrong readers


def test_a_reader_that_is_told_to_err_errs_at_about_that_rate_and_always_in_the_same_way():
    wrong = vlm.Errors(accept_recall=0.8, reject_recall=0.4)
    for verdict, rate in (("accept", 0.8), ("reject", 0.4)):
        right = judged(verdict, "partial" if verdict == "accept" else "none")
        said, again = ([wrong.applied(right, vlm.Request(lines=[str(i)])) for i in range(1000)]
                       for _ in range(2))
        share = sum(reply["verdict"] == verdict for reply in said) / 1000
        assert said == again and abs(share - rate) < 0.05
        for reply in said:
            d = c.CollabVR.Verification.model_validate(reply)
            assert d.action_executed == (d.progress != "none") == (d.verdict == "accept")


def test_a_wrong_reject_says_the_action_once_however_often_the_prompt_was_corrected():
    prompt = "Move it. Correction: Move it and keep it inside the corridor."
    request = vlm.Request(lines=[f"Planned action: {prompt}"])
    reply = vlm.Errors(accept_recall=0).applied(judged("accept", "complete"), request)
    assert reply["suggestion"] == "Move it and keep it inside the corridor."


def test_held_out_mazes_are_repeatable_and_have_the_segments_that_were_asked_for():
    one, two = compare.held_out(3, 5, 0), compare.held_out(3, 5, 0)
    assert (one.open == two.open).all() and one.look == two.look
    way = world.shortest_path(one.open, one.start, one.goal)
    assert len(world.segments(way)) == 3


def test_foreign_mazes_can_be_read_and_solved_though_this_project_did_not_draw_them():
    for i in range(12):
        maze, picture = compare.foreign(i, 0)
        seen = world.read(picture)
        assert (seen.open == maze.open).all() and seen.goal == maze.goal
        assert np.abs(np.subtract(seen.circle, maze.start)).max() < 0.1
        assert world.shortest_path(maze.open, maze.start, maze.goal)


@pytest.mark.parametrize("argv", [
    "--segments 0", "--segments x", "--methods no", "--mazes 0", "--workers 0", "--seed -1",
    "--vgm nowhere"])
def test_a_comparison_that_cannot_be_made_is_refused_before_it_starts(argv, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main([*argv.split(), "--out", str(tmp_path / "out")])
    assert "error: " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_intervals_hold_the_mean_and_shrink_with_the_sample():
    rng = np.random.default_rng(0)
    few, many = (rng.random(n) < 0.7 for n in (20, 2000))
    for kind in ("solved", "clips"):
        widths = []
        for x in (few, many):
            low, high = compare.interval(x, kind)
            assert low < x.mean() < high
            widths.append(high - low)
        assert widths[1] < widths[0] / 5
    assert compare.interval([1.0] * 20, "solved")[0] < 0.9  # all of 20 is not certainty


# ----------------------------------------------------------------------------- maze/tiny-wan, slow


slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="set COLLABVR_SLOW=1")


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
    methods = ",".join(compare.METHODS)
    assert compare.main(["--methods", methods, "--segments", "2", "--mazes", "1",
                         "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    rows = {r["method"]: r for r in map(json.loads, lines)}
    assert set(rows) == set(compare.METHODS)
    assert (rows["pass4"]["clips"], rows["videotpo"]["clips"]) == (4, 5)
    assert rows["single"]["vlm_calls"] == 0 and rows["steps1"]["steps"] == 1
    assert f"| qwen9b | {rows['qwen9b']['vgm_seconds']:.1f} |" in capsys.readouterr().out


@pytest.fixture
def one_core():
    """Models and loop get one core each, so that how many there are does not matter."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@slow
@pytest.mark.usefixtures("one_core")
def test_the_loop_and_its_files_take_less_than_five_percent_of_the_models_time(
        url, tmp_path, monkeypatch):
    """With clips of half a second's work. The wait for the disk is told apart: it is the disk's,
    and may be anything on a busy one."""
    vgm = c.Wan(**run.WAN)
    vgm.check(2)  # the weights are loaded
    took, waits, fsync = [], [], os.fsync

    def waiting(file):
        began = time.perf_counter()
        fsync(file)
        waits.append(time.perf_counter() - began)

    monkeypatch.setattr(os, "fsync", waiting)
    for i in range(6):
        waits.clear()
        maze = world.make(6, 3, np.random.default_rng([2026, 2]))
        models = c.Models(vgm, reader(url), tmp_path / str(i))
        began = time.perf_counter()
        c.CollabVR(models, CONFIG).run(world.draw(maze), world.task(maze))
        whole = time.perf_counter() - began
        waited = sum(models.cost()["wall_seconds"].values())
        took.append((whole - waited - sum(waits), sum(waits), waited))
    work, wait, waited = map(min, zip(*took, strict=True))  # what else the machine does only adds
    print(f"{waited:.2f} s of models, {1000 * work:.1f} ms of loop and files, "
          f"{1000 * wait:.1f} ms of waiting for the disk")
    assert len(waits) > 10 and work < 0.05 * waited


@slow
def test_kill_9_at_thirty_random_moments_changes_nothing_and_pays_for_nothing_twice(
        url, tmp_path, monkeypatch):
    asked, answer, chance = [], vlm.answer, random.Random(0)
    monkeypatch.setattr(vlm, "answer", lambda *args: asked.append(1) or answer(*args))
    maze = world.make(6, 3, np.random.default_rng([2026, 1]))
    Image.fromarray(world.draw(maze)).save(tmp_path / "maze.png")

    def start(out):
        return subprocess.Popen(
            [sys.executable, HERE.parent / "collabvr.py", "--image", tmp_path / "maze.png",
             "--task", world.task(maze), "--out", out, *run.OPTIONS, "--vlm-url", url],
            stdout=subprocess.DEVNULL, stderr=(tmp_path / f"{out.name}.log").open("a"))

    def outcome(out):
        trace = (out / "trace.json").read_text()
        made = (tmp_path / f"{out.name}.log").read_text().count("vgm: waiting")
        trace = re.sub(r'"wall_seconds": ({[^}]*}|[^,}]*)', "", trace)
        return trace, (out / "video.mp4").read_bytes(), made

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
            with start(tmp_path / f"run{n}") as process:
                try:
                    assert process.wait(chance.uniform(0.3, 1.2) * took) == 0
                    break
                except subprocess.TimeoutExpired:
                    process.kill()
                    kills += 1
        *found, made = outcome(tmp_path / f"run{n}")
        assert found == whole
        assert len(asked) <= calls + kills and made <= clips + kills  # the call under way, no more
        killed += kills
