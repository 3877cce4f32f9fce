"""Tests of benchmark.py, samples.py and summary.py: quick ones with scripted models; with
COLLABVR_SLOW=1 tiny-wan on mazes in VBVR-Bench's and Gen-ViRe's layouts, each way it can run."""

import base64
import csv
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "maze"), str(HERE), str(HERE.parent)]

import benchmark
import run as maze_run
import samples
import simulate
import summary
import vlm
import world

import collabvr as c

SINGLE = ["--method", "single", "--seconds-first", "1"]
slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="COLLABVR_SLOW=1 runs it")


# ------------------------------------------------------------------------------ data to run over


def mazes(count, seed=11):
    rng = np.random.default_rng(seed)
    for i in range(count):
        yield world.make(4 + i % 3, 1 + i % 3, rng)


def write_vbvr(root, count, as_json=False):
    """Mazes in VBVR-Bench's layout, ground truths of 2 s at 8 fps; or its JSON, pictures inside."""
    entries = []
    for i, maze in enumerate(mazes(count)):
        split = ("In-Domain_50", "Out-of-Domain_50")[i % 2]
        folder = root / split / f"G-{i // 10}_maze_data-generator" / f"{i // 2 % 5:05}"
        folder.mkdir(parents=True)
        iio.imwrite(folder / "first_frame.png", world.draw(maze))
        (folder / "prompt.txt").write_text(world.task(maze) + "\n")
        film = world.film(maze, world.shortest_path(maze.open, maze.start, maze.goal), 16)
        (folder / "ground_truth.mp4").write_bytes(c.encode_video(c.Clip(film, 8)))
        place = folder.relative_to(root)
        entries.append({"first_frame_path": str(place / "first_frame.png"), "prompt":
                        world.task(maze), "first_image": base64.b64encode((
                            folder / "first_frame.png").read_bytes()).decode(),
                        "ground_truth_video_path": str(place / "ground_truth.mp4")})
    if as_json:
        (root / "VBVR-Bench.json").write_text(json.dumps(entries))
        for x in entries:
            (root / x["first_frame_path"]).unlink()
    return root


def write_gen_vire(root, count):
    datasets = pytest.importorskip("datasets")
    rows = [{"main_category": f"Spatial Reasoning {i % 2}", "sub_category": "maze", "id": f"m_{i}",
             "image": Image.fromarray(world.draw(maze)), "i2v_prompt": world.task(maze),
             "frame_crop_mode": "full"} for i, maze in enumerate(mazes(count))]
    kinds = {k: datasets.Value("string") for k in rows[0]} | {"image": datasets.Image()}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    datasets.DatasetDict({"train": data}).save_to_disk(root)
    return root


def write_jsonl(root, count, **more):
    """Plain pictures, a JSONL of them, and a generator that notes when it is called."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        iio.imwrite(root / f"{i}.png", np.full((32, 48, 3), 5 * i, np.uint8))
        lines.append({"id": f"s{i}", "image": f"{i}.png", "task": f"Do {i}.",
                      "category": "ab"[i % 2]} | more)
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return root / "data.jsonl"


GENERATOR = '''
import os, threading, time
import numpy as np
from collabvr import Clip
busy, here = threading.Lock(), os.path.dirname(__file__)

class Painter:
    """Notes that it was built, and its calls; fails for pictures whose number is in `fail`."""
    def __init__(self, fail="", wait="0"):
        self.wait = float(wait)
        self.fail = os.path.join(here, fail)
        self.note("built")
    def note(self, text):
        with open(os.path.join(here, "notes"), "a") as file:
            file.write(text + "\\n")
    def __call__(self, frame, prompt, seconds, seed):
        assert busy.acquire(blocking=False), "called by two at once"
        try:
            number = str(frame[-1, 0, 0] // 5)  # of the picture; a clip paints its upper rows
            self.note(f"call {number}")
            time.sleep(self.wait)
            if os.path.isfile(self.fail) and number in open(self.fail).read().split():
                raise RuntimeError("out of memory")
            frames = np.repeat(frame[None], 1 + int(4 * seconds), 0)
            frames[1:, :8] = (37 * seed + len(prompt)) % 256
            return Clip(frames, 4)
        finally:
            busy.release()
'''


class Judge(simulate.NapVLM):
    """A VLM that wants two steps, and for pictures with an odd number a second attempt."""

    def __call__(self, instructions, parts, schema):
        answer = json.loads(super().__call__(instructions, parts, schema)["text"])
        said = "\n".join(x for x in parts if isinstance(x, str))
        if "estimated_steps_remaining" in answer:
            answer["estimated_steps_remaining"] = 1 + ("Step: 1" in said)
        odd = int(re.findall(r"Task prompt: Do (\d+)", said)[0]) % 2
        if "verdict" in answer and odd and "Correction" not in said:
            answer |= {"verdict": "reject", "suggestion": "Go left."}
        return {"text": json.dumps(answer), "tokens_in": 100, "tokens_out": 10}


def command(root, data, out, wait=0, fail="fail", **options):
    """A Run of the scripted models."""
    (root / "painter.py").write_text(GENERATOR)
    options = {"vlm": Judge(timeout=0.001), "config": c.Config(
        seconds_first=1, seconds_next=0.5)} | options
    return benchmark.Run(str(data), root / out, vgm=c.Wan(f"{root / 'painter.py'}:Painter"),
                         vgm_arg=[f"fail={fail}", f"wait={wait}"], **options)


def videos(folder):
    """Every final video by its place, hashed."""
    root = folder / "videos"
    return {str(x.relative_to(root)): hashlib.sha256(x.read_bytes()).hexdigest()
            for x in sorted(root.rglob("*")) if x.is_file()}


def notes(root):
    return (root / "notes").read_text().split("\n")[:-1] if (root / "notes").exists() else []


# ---------------------------------------------------------------------------------- samples.py


@pytest.mark.parametrize("as_json", [False, True])
def test_vbvr_bench_is_read_from_its_json_or_tree_and_clips_last_as_the_truth(tmp_path, as_json):
    found = list(samples.samples(str(write_vbvr(tmp_path, 4, as_json))))
    assert sorted(x.id for x in found) == sorted(
        f"{s}/G-0_maze_data-generator/0000{i}" for s in ("In-Domain_50", "Out-of-Domain_50")
        for i in (0, 1))
    assert {x.seconds for x in found} == {2.0} and all(x.task.endswith(".") for x in found)
    assert {x.category for x in found} == {"In-Domain_50", "Out-of-Domain_50"}
    assert {type(x.image) for x in found} == {bytes if as_json else str}


def test_gen_vire_goes_into_five_run_folders(tmp_path):
    found = list(samples.samples(str(write_gen_vire(tmp_path / "saved", 3))))
    assert [x.id for x in found] == [f"Spatial Reasoning {i % 2}/maze/m_{i}" for i in range(3)]
    run = command(tmp_path, tmp_path / "saved", "out", method="single")
    assert run.run() == 0
    assert [*videos(tmp_path / "out")] == sorted(
        f"0_generated_videos/single/single_{k}/{x.id}.mp4" for k in range(5) for x in found)


def test_a_folder_of_pictures_has_one_task_for_all(tmp_path):
    write_jsonl(tmp_path / "x", 3)
    (tmp_path / "x" / "data.jsonl").unlink()
    found = list(samples.samples(str(tmp_path / "x"), " Turn left. "))
    assert [(x.id, x.task) for x in found] == [(str(i), "Turn left.") for i in range(3)]


@pytest.mark.parametrize("bad", [
    "..", ".", "", " ", "../x", "a/b", "/etc/x", "a\\b", "x" * 201, "a\0b", "a\nb", "\ud800",
    "... "])
def test_a_sample_id_that_could_lead_out_of_the_folder_is_refused_in_one_sentence(
        tmp_path, bad, capsys):
    data = write_jsonl(tmp_path / "data", 1, id=bad)
    assert benchmark.main(["run", "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, word", [
    ("", "no samples"), ("{", "cannot be read"), ('{"id": 1}', "cannot be read"),
    ('[1]', "cannot be read"), ('{"id": 1, "image": "x", "task": " "}', "no task"),
    ('{"id": 1, "image": "x", "task": "t"}\n{"id": "1", "image": "y", "task": "t"}', "two")])
def test_bad_data_gets_one_sentence_before_any_model_is_called(tmp_path, text, word, capsys):
    (tmp_path / "data.jsonl").write_text(text)
    asked = ["run", "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    assert benchmark.main(asked) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, word", [
    (["--shard", "0/2"], "shard"), (["--shard", "x"], "shard"), (["--shard", "3/2"], "3/2"),
    (["--in-flight", "0"], "in_flight"), (["--M", "0"], "M"), (["--method", "magic"], "magic"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--bogus"], "--bogus")])
def test_bad_options_get_one_sentence_and_status_2(tmp_path, options, word, capsys):
    data = write_jsonl(tmp_path / "data", 2)
    asked = ["run", "--data", str(data), "--out", str(tmp_path / "out"), *options]
    assert benchmark.main(asked) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and len(said) < 300


# --------------------------------------------------------------------------------------- running


def test_every_sample_has_a_run_folder_and_a_video_and_no_clip_lies_among_the_videos(tmp_path):
    data = write_jsonl(tmp_path / "data", 4)
    assert command(tmp_path, data, "out").run() == 0
    assert [*videos(tmp_path / "out")] == [f"s{i}.mp4" for i in range(4)]
    for i in range(4):
        run = tmp_path / "out" / "runs" / f"s{i}"
        trace = json.loads((run / "trace.json").read_text())
        assert (trace["status"], trace["cost"]["steps"]) == ("complete", 2)
        assert trace["cost"]["clips"] == 2 + i % 2 and trace["method"] == "collabvr"
        assert (run / "video.mp4").read_bytes() == (
            tmp_path / "out" / "videos" / f"s{i}.mp4").read_bytes()
        assert {"input.png", "start.json", "calls.jsonl"} <= {x.name for x in run.iterdir()}


def test_what_is_finished_is_skipped_without_loading_a_model_until_a_setting_changes(tmp_path):
    data = write_jsonl(tmp_path / "data", 3)
    assert command(tmp_path, data, "out").run() == 0
    before = notes(tmp_path)
    assert command(tmp_path, data, "out").run() == 0 and notes(tmp_path) == before
    elsewhere = Judge(timeout=0.002, vlm_url="http://localhost:1/v1")  # the same model, moved
    assert command(tmp_path, data, "out", vlm=elsewhere).run() == 0 and notes(tmp_path) == before
    other = c.Config(seconds_first=1, seconds_next=0.75)
    assert command(tmp_path, data, "out", config=other).run() == 0
    assert notes(tmp_path).count("built") == 2
    assert len(notes(tmp_path)) - len(before) == 1 + 3  # the first steps' clips are replayed


def test_a_failed_sample_is_recorded_does_not_stop_the_rest_and_is_tried_again(tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", 4)
    (tmp_path / "fail").write_text("1")
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    assert command(tmp_path, data, "out").run() == 1
    failed = tmp_path / "out" / "runs" / "s1" / "failed.txt"
    assert "out of memory" in failed.read_text() and [*videos(tmp_path / "out")] == [
        "s0.mp4", "s2.mp4"]
    captured = capsys.readouterr()
    assert "2 done, 2 failed" in captured.out and "s3: " in captured.err
    (tmp_path / "fail").write_text("")
    iio.imwrite(tmp_path / "data" / "3.png", np.zeros((32, 48, 3), np.uint8))
    before = notes(tmp_path)
    assert command(tmp_path, data, "out").run() == 0 and not failed.exists()
    assert [*videos(tmp_path / "out")] == [f"s{i}.mp4" for i in range(4)]
    assert {"call 1", "call 0"} == {*notes(tmp_path)[len(before):]} - {"built"}  # 3.png is black


METHOD = """
from collabvr import CollabVR, Result

class Twice(CollabVR):
    def run(self, I0, q):
        self.models.generate(I0, q, 1.0)
        return Result(self.models.generate(I0, q, 1.0), "unverified", [1])
"""


def test_a_method_of_ones_own_runs_from_a_file_and_an_edited_one_makes_its_videos_anew(
        tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", 2)
    (tmp_path / "mine.py").write_text(METHOD)
    run = command(tmp_path, data, "out", method=f"{tmp_path}/mine.py:Twice")
    assert run.run() == 0 and len(notes(tmp_path)) == 5  # built once, two clips for each sample
    assert command(tmp_path, data, "out", method=run.method).run() == 0
    assert len(notes(tmp_path)) == 5 and "2 done" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text(METHOD.replace("q, 1.0), ", 'q + "!", 1.0), '))
    assert command(tmp_path, data, "out", method=run.method).run() == 0
    assert len(notes(tmp_path)) == 8  # the first clips are replayed
    with pytest.raises(c.Problem, match="takes FILE.py:NAME or one of single, "):
        command(tmp_path, data, "new", method=f"{tmp_path}/mine.py:Thrice").run()


def test_the_papers_routing_of_whole_samples_is_a_method_too(tmp_path):
    veo = f"{HERE / 'generators' / 'veo.py'}:Routed"
    data, content = write_jsonl(tmp_path / "data", 2), simulate.NapVLM(timeout=0.001)
    assert command(tmp_path, data, "out", method=veo, vlm=content).run() == 0
    for name in ("s0", "s1"):
        trace = json.loads((tmp_path / "out" / "runs" / name / "trace.json").read_text())
        assert trace["status"] == "complete" and trace["cost"]["clips"] == 1


def test_the_worst_case_of_all_that_is_left_is_told_before_the_first_call(tmp_path, capsys):
    assert command(tmp_path, write_jsonl(tmp_path / "data", 3), "out").run() == 0
    clips, seconds, calls = c.Config(seconds_first=1, seconds_next=0.5).worst_case()
    assert (f"At worst: {3 * clips} clips, {3 * seconds:.0f} s of generated video, {3 * calls} VLM "
            "calls") in capsys.readouterr().err


def test_another_method_or_data_set_in_the_same_folder_is_refused_but_data_may_grow(tmp_path):
    data = write_jsonl(tmp_path / "data", 2)
    assert command(tmp_path, data, "out").run() == 0
    with pytest.raises(c.Problem, match="another method or data set"):
        command(tmp_path, data, "out", method="single").run()
    assert command(tmp_path, write_jsonl(tmp_path / "data", 3), "out").run() == 0
    with pytest.raises(c.Problem, match="another method or data set"):
        command(tmp_path, write_jsonl(tmp_path / "data", 2), "out").run()
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in lines] == ["s0", "s1", "s2"]


@pytest.mark.parametrize("package, options", [
    ("ray", ["--ray", "2"]), ("datasets", ["--data", "somebody/some-data"])])
def test_a_missing_package_gets_one_sentence_that_says_what_to_install(
        tmp_path, package, options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    data = write_jsonl(tmp_path / "data", 2)
    asked = ["run", "--data", str(data), "--out", str(tmp_path / "out"), *SINGLE, *options]
    assert benchmark.main(asked) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{package} is needed: pip install -r examples/requirements.txt" in said


def test_shards_share_the_work_and_samples_in_flight_share_a_generator_with_the_same_videos(
        tmp_path):
    data = write_jsonl(tmp_path / "data", 7)
    assert command(tmp_path, data, "plain").run() == 0
    for i, ids in ((1, "036"), (2, "14"), (3, "25")):
        assert command(tmp_path, data, "shards", shard=f"{i}/3").run() == 0
        seen = {x.stem for x in (tmp_path / "shards" / "videos").iterdir()}
        assert {f"s{k}" for k in ids} <= seen
    began = time.monotonic()
    assert command(tmp_path, data, "flight", in_flight=3, wait=0.05).run() == 0
    lasted = time.monotonic() - began
    plain = videos(tmp_path / "plain")
    assert len(plain) == 7 and len(set(plain.values())) > 1
    assert videos(tmp_path / "shards") == videos(tmp_path / "flight") == plain
    walls = [x["wall_seconds"] for path in (tmp_path / "flight" / "runs").glob("*/trace.json")
             for x in json.loads(path.read_text())["calls"] if "clip" in x]
    assert 0.05 * len(walls) <= sum(walls) <= lasted  # no call counts its wait for the others


def test_samples_stream_and_no_more_are_read_than_are_at_work(tmp_path, monkeypatch):
    data, open_ = write_jsonl(tmp_path / "data", 8), []
    read, made = benchmark.samples, []
    monkeypatch.setattr(benchmark, "samples", lambda *x: (
        open_.append(s) or s for s in read(*x)))
    make = benchmark.Runner.make
    monkeypatch.setattr(benchmark.Runner, "make", lambda self, x: (
        made.append(len(open_) - 8 - len(made)), make(self, x))[1])
    assert command(tmp_path, data, "out").run() == 0
    assert len(made) == 8 and max(made) <= 3  # at work, in the queue, in the reader's hand


def start(root, data, out, *options, **env):
    """benchmark.py as a process of its own."""
    (root / "painter.py").write_text(GENERATOR)
    return subprocess.Popen(
        [sys.executable, HERE / "benchmark.py", "run", "--data", data, "--out", root / out, *map(
            str, options)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)} | env)


def test_after_sigkill_and_ctrl_c_the_same_command_goes_on(tmp_path):
    data = write_jsonl(tmp_path / "data", 14)  # more than enough to be interrupted twice
    options = [*SINGLE, "--vgm", f"{tmp_path / 'painter.py'}:Painter", "--vgm-arg", "wait=0.3"]
    for number, sign in enumerate((signal.SIGKILL, signal.SIGINT), 1):
        process = start(tmp_path, data, "out", *options)
        made = tmp_path / "out" / "videos"
        while len(list(made.glob("*.mp4"))) < 2 * number and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(sign)
        said, _ = process.communicate()
        assert process.returncode in (130, -signal.SIGKILL) and "Traceback" not in said, said
    process = start(tmp_path, data, "out", *options)
    said, _ = process.communicate()
    assert process.returncode == 0 and "14 samples: 14 done, 0 failed" in said, said
    assert len(videos(tmp_path / "out")) == 14
    calls = [x for x in notes(tmp_path) if x.startswith("call")]
    assert len(calls) <= 14 + 2  # the calls under way at the two ends


# ------------------------------------------------------------------------------------ summary.py


def vgm(t, seconds=2.0, wall=10.0):
    return {"t": t, "role": "vgm", "seconds": seconds, "wall_seconds": wall,
            "clip": "clips/001.mkv"}


def vlm_call(t, role, verdict=None, tokens=(100, 10), wall=1.0):
    reply = {"verdict": verdict} if verdict else {}
    return {"t": t, "role": role, "reply": reply, "tokens_in": tokens[0], "tokens_out": tokens[1],
            "wall_seconds": wall}


def write_results(root, runs, categories="xyy", size=(16, 16)):
    """Results by hand: for each sample a status and calls, or None for one without a video."""
    root.mkdir()
    lines = [{"id": f"s{i}", "category": k, "method": "collabvr"} for i, k in enumerate(categories)]
    (root / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for i, run in enumerate(runs):
        folder = root / "runs" / f"s{i}"
        (folder / "clips").mkdir(parents=True)
        rng = np.random.default_rng(i)
        picture = rng.integers(0, 256, (*size, 3), np.uint8)
        iio.imwrite(folder / "input.png", picture)
        clip = np.stack([picture, 255 - picture]) if i == 0 else np.stack([255 - picture] * 2)
        (folder / "clips" / "001.mkv").write_bytes(c.encode_video(c.Clip(clip, 1), lossless=True))
        if run:
            (folder / "video.mp4").write_bytes(b"a video")
            trace = {"status": run[0], "calls": run[1]}
            (folder / "trace.json").write_text(json.dumps(trace))
    return root


# steps 2, clips 3, calls 5; steps 1, clips 1, calls 2; a sample that has no video
BY_HAND = [
    ("complete", [vlm_call(1, "planner"), vgm(1), vlm_call(1, "verifier", "reject"), vgm(1),
                  vlm_call(1, "verifier", "accept"), vlm_call(2, "planner"), vgm(2),
                  vlm_call(2, "verifier", "reject")]),
    ("step_cap", [vlm_call(1, "planner", tokens=(300, 30), wall=4.0), vgm(1, 4.0, 30.0),
                  vlm_call(1, "verifier", "accept")]),
    None]


def table(folder, title):
    """A table of summary.csv as {row: {column: value}}."""
    rows, found = csv.DictReader((folder / "summary.csv").read_text().splitlines()), {}
    for x in rows:
        if x["table"].startswith(title):
            found.setdefault(x["row"], {})[x["column"]] = float(x["value"]) if x["value"] else None
    return found


def near(**values):
    return {k: None if v is None else pytest.approx(v) for k, v in values.items()}


def test_the_statistics_are_those_that_one_counts_by_hand(tmp_path, capsys):
    pytest.importorskip("skimage")
    one = write_results(tmp_path / "one", BY_HAND)
    (one / "scores.json").write_text('{"s0": 0.9, "s1": 0, "s2": 0.6}')  # s2, without video, is 0
    prices = ["--price-in", "1000", "--price-out", "10000", "--price-second", "0.5"]
    assert benchmark.main(["summary", str(one), *prices]) == 0
    stats = table(one, "Run statistics (Table 10)")
    assert stats["steps"] == near(mean=1, std=1, median=1, least=0, most=2)
    assert stats["re-generations"] == near(mean=1 / 3, std=3 ** -0.5, median=0, least=0, most=1)
    assert stats["clips"] == near(mean=4 / 3, std=(7 / 3) ** 0.5, median=1, least=0, most=3)
    assert stats["VLM calls"] == near(mean=7 / 3, std=(19 / 3) ** 0.5, median=2, least=0, most=5)
    assert table(one, "Samples by number of steps (Table 11)") == {
        str(k): near(samples=1, share=1 / 3) for k in (0, 1, 2)}
    assert table(one, "Samples by number of re-generations (Table 12)") == {
        "0": near(samples=2, share=2 / 3), "1": near(samples=1, share=1 / 3)}
    assert table(one, "Accepted by the verifier (Table 13)") == {
        "steps, at the first attempt": near(verified=3, accepted=1, share=1 / 3),
        "steps, in the end": near(verified=3, accepted=2, share=2 / 3),
        "verified clips": near(verified=4, accepted=2, share=1 / 2)}
    assert table(one, "Final reject rate per step (Table 14)") == {
        "1": near(verified=2, rejected=0, share=0), "2": near(verified=1, rejected=1, share=1)}
    calls = table(one, "Calls")  # wall: 3 + 30 of the first, 5 + 30 of the second
    assert calls["planner"] == {
        "calls/sample": 1, "tokens in/call": pytest.approx(500 / 3), "s/call": 2, "s/sample": 2,
        "tokens out/call": pytest.approx(50 / 3), "share of wall time": pytest.approx(6 / 70),
        "$/sample": pytest.approx((500 * 1e-3 + 50 * 1e-2) / 3)}
    assert calls["vgm"] == {
        "calls/sample": pytest.approx(4 / 3), "tokens in/call": None, "tokens out/call": None,
        "s/call": 15, "s/sample": 20, "share of wall time": pytest.approx(60 / 70),
        "$/sample": pytest.approx(10 * 0.5 / 3)}
    assert calls["all"]["share of wall time"] == 1
    means = table(one, "Means")
    assert [*means] == ["all", "x", "y"]
    assert {k: means["all"][k] for k in ("samples", "video", "complete", "score")} == near(
        samples=3, video=2 / 3, complete=1 / 3, score=0.3)
    assert {k: means["y"][k] for k in ("samples", "video", "score", "clips")} == near(
        samples=2, video=0.5, score=0, clips=0.5)
    ssim = table(one, "First-frame")["SSIM"]  # s0's frame 0 is its picture, s1's is its negative
    assert ssim["clips"] == 2 and ssim["mean"] < 0.6 and ssim["std"] > 0.5
    text, marked = capsys.readouterr().out, (one / "summary.md").read_text()
    assert "Table 10" in text and "| steps | 1.000 | 1.000 |" in marked


def test_two_results_are_compared_sample_by_sample(tmp_path, capsys):
    one = write_results(tmp_path / "one", BY_HAND)
    two = write_results(tmp_path / "two", [BY_HAND[0], None, BY_HAND[1]])
    assert benchmark.main(["summary", str(one), str(two)]) == 0
    found = table(one, "The second folder")
    assert found["video"] == near(**{
        "first": 2 / 3, "second": 2 / 3, "difference": 0, "95 % from": -1, "to": 1})
    assert "score" not in found and "dollars" not in found
    three = write_results(tmp_path / "three", BY_HAND[:2], categories="xy")
    capsys.readouterr()
    assert benchmark.main(["summary", str(one), str(three)]) == 2
    assert "different samples" in capsys.readouterr().err


def test_without_scikit_image_the_other_statistics_are_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    one = write_results(tmp_path / "one", BY_HAND)
    assert summary.Summary(one).run() == 0
    assert "SSIM needs scikit-image: see examples/requirements.txt" in table(one, "First-frame")
    assert table(one, "Run statistics")["clips"]["most"] == 3


def test_a_folder_without_results_gets_one_sentence(tmp_path, capsys):
    assert benchmark.main(["summary", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no results" in said and said.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        benchmark.main(["summary", "--help"])


@pytest.mark.parametrize("scores, said", [
    ('{"s0": "high", "s1": 1}', "s0"), ("[1]", "be an object"), ('{"s0": NaN, "s1": 1}', "s0"),
    ('{"s0": 0.5}', "lacks s1, which has a video"), ('{"s0": 1, "s1": 1, "x": 1}', "names")])
def test_scores_that_cannot_be_meant_get_one_sentence(scores, said, tmp_path, capsys):
    one = write_results(tmp_path / "one", BY_HAND)
    (one / "scores.json").write_text(scores)
    assert benchmark.main(["summary", str(one)]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_summary_of_runs_with_different_settings_says_so(tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", 2)
    for shard, seconds in (("1/2", 1), ("2/2", 2)):
        config = c.Config(seconds_first=seconds)
        assert command(tmp_path, data, "out", shard=shard, config=config).run() == 0
    assert benchmark.main(["summary", str(tmp_path / "out")]) == 0
    assert "holds runs of 2 different settings" in capsys.readouterr().err


def test_a_summary_of_a_real_run_counts_what_is_still_to_be_done(tmp_path):
    data = write_jsonl(tmp_path / "data", 4)
    assert command(tmp_path, data, "out", shard="1/2").run() == 0
    assert summary.Summary(tmp_path / "out").run() == 0
    means = table(tmp_path / "out", "Means")
    assert (means["all"]["samples"], means["all"]["video"], means["b"]["video"]) == (4, 0.5, 0)


# ------------------------------------------------------------------------------------------- Ray


def test_a_sample_that_kills_its_worker_three_times_is_given_up_for_this_start(tmp_path):
    run = command(tmp_path, write_jsonl(tmp_path / "data", 1), "out", method="single")
    (x,) = samples.samples(run.data)
    row, runner = {"sample": pickle.dumps(x), "start": "now"}, benchmark.Runner(run)
    tries = tmp_path / "out" / "runs" / "s0" / "tries"
    tries.parent.mkdir(parents=True)
    tries.write_text("then\n" * 5 + "now\n" * 3)  # what three dead workers left, and others
    assert "died three times" in runner(row)["error"]
    tries.write_text("now\n" * 2)
    assert runner(row) == {"error": "", "seconds": 1.0} and not tries.exists()


@slow
def test_ray_makes_the_same_videos_and_replaces_a_worker_that_is_killed(tmp_path):
    pytest.importorskip("ray", reason="pip install -r examples/requirements.txt")
    data = write_jsonl(tmp_path / "data", 8)
    options = [*SINGLE, "--vgm", f"{tmp_path / 'painter.py'}:Painter", "--vgm-arg", "wait=0.5"]
    assert start(tmp_path, data, "plain", *options).wait() == 0
    built = notes(tmp_path).count("built")
    process = start(tmp_path, data, "ray", "--ray", 2, *options)
    killed = None
    while process.poll() is None and not killed:
        time.sleep(0.05)
        if len(videos(tmp_path / "ray")) >= 2:
            killed = kill_a_ray_worker(process.pid)
    said, _ = process.communicate()
    assert process.returncode == 0 and killed and "8 done, 0 failed" in said, said
    assert videos(tmp_path / "ray") == videos(tmp_path / "plain")
    assert notes(tmp_path).count("built") == built + 3  # two actors and the one that came after


def kill_a_ray_worker(pid):
    """Kills a process below `pid` that is an actor with a pipeline."""
    psutil = pytest.importorskip("psutil")
    for x in psutil.Process(pid).children(recursive=True):
        if "MapWorker" in " ".join(x.cmdline()):
            x.kill()
            return x.pid
    return None


# ------------------------------------------------------------- the mazes, each way they can be run


@pytest.fixture(scope="module")
def mazes_run(tmp_path_factory):
    """A folder with both data sets, and what starts benchmark.py on them with tiny-wan."""
    root = tmp_path_factory.mktemp("mazes")
    write_vbvr(root / "vbvr", 20)
    write_gen_vire(root / "genvire", 6)
    with vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"

        def go(out, *options, data="vbvr"):
            return start(root, root / data, out, *maze_run.OPTIONS, "--vlm-url", url, *options,
                         OMP_NUM_THREADS="1")

        yield root, go
        server.shutdown()


def done(*processes):
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0 and " 0 failed" in said, said


@pytest.fixture(scope="module")
def plain(mazes_run):
    """The final videos of an undisturbed run."""
    root, go = mazes_run
    done(go("plain"))
    return videos(root / "plain")


@slow
def test_twenty_mazes_in_vbvr_benchs_layout_make_twenty_videos(mazes_run, plain):
    root, _ = mazes_run
    assert len(plain) == 20 and len(set(plain.values())) == 20
    for name in plain:
        split, task, index = name.split("/")
        assert (root / "vbvr" / split / task / index[:-4] / "ground_truth.mp4").exists()
        video = iio.imread(root / "plain" / "videos" / name, plugin="pyav")
        assert (len(video) - 1) % 4 == 0 and len(video) >= 17
    assert summary.Summary(root / "plain").run() == 0
    means = table(root / "plain", "Means")["all"]
    assert (means["samples"], means["video"]) == (20, 1) and means["vgm_seconds"] > 2


@slow
def test_mazes_interrupted_at_any_moment_and_resumed_make_the_same_videos(mazes_run, plain):
    root, go = mazes_run
    for share in (0.15, 0.4, 0.7):
        process = go("killed")
        while len(videos(root / "killed")) < share * 20 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3 * share)
        process.kill()
        process.communicate()
    done(go("killed"))
    assert videos(root / "killed") == plain
    for path in (root / "killed" / "runs").rglob("trace.json"):  # nothing was paid for twice
        lines = (path.parent / "calls.jsonl").read_text().splitlines()
        assert len(lines) == len(json.loads(path.read_text())["calls"])


@slow
def test_mazes_in_shards_and_in_flight_make_the_same_videos(mazes_run, plain):
    root, go = mazes_run
    done(go("shards", "--shard", "1/2"), go("shards", "--shard", "2/2"))
    assert videos(root / "shards") == plain
    done(go("flight", "--in-flight", 3))
    assert videos(root / "flight") == plain


@slow
def test_mazes_with_ray_make_the_same_videos(mazes_run, plain):
    pytest.importorskip("ray", reason="pip install -r examples/requirements.txt")
    root, go = mazes_run
    done(go("ray", "--ray", 2, "--in-flight", 2))
    assert videos(root / "ray") == plain


@slow
def test_mazes_in_gen_vires_layout_make_five_run_folders_each_way(mazes_run):
    root, go = mazes_run
    done(go("g1", data="genvire"))
    done(go("g2", "--in-flight", 3, data="genvire"))
    first = videos(root / "g1")
    assert len(first) == 30 and len(set(first.values())) == 6 and videos(root / "g2") == first
    for name in first:
        assert re.fullmatch(r"0_generated_videos/collabvr/collabvr_[0-4]/Spatial Reasoning [01]/"
                            r"maze/m_\d\.mp4", name)
