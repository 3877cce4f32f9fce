"""Running a benchmark with scripted models. Slow: kills, Ray, and tiny-wan each way it can run."""

import asyncio
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import filelock
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

from collabvr import CollabVR, Config, Problem, Result, worst_case
from examples import cli
from examples.baselines import METHODS
from examples.bench import run as bench
from examples.tests.painter import Judge, Painter
from examples.tests.test_bench_samples import gen_vire_rows

ROOT = Path(__file__).resolve().parents[2]


def write_jsonl(root, count):
    """Plain pictures with a number in their colour, and a JSONL of them."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        Image.fromarray(np.full((32, 48, 3), 5 * i, np.uint8)).save(root / f"{i}.png")
        rows.append({"id": f"s{i}", "image": f"{i}.png", "task": f"Do {i}.",
                     "category": "ab"[i % 2]})
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root / "data.jsonl"


def go(root, data, out, method="collabvr", vgm=Painter, vlm=None, colours=256, wait=0.0,
       fill_failed=False, config=None, **runs):
    """The benchmark with the scripted models; its exit status."""
    vlm = vlm or Judge()
    config = config or Config(seconds_first=1, seconds_next=0.5)
    vgm = vgm(notes=root, colours=colours, wait=wait)
    options = bench.Options(str(data), root / out, config, vlm, vgm, bench.Runs(**runs),
                            fill_failed=fill_failed)
    return bench.benchmark(options, method, METHODS[method])


def videos(folder):
    """Every file that the evaluators see, by its place, hashed."""
    root = folder / "videos"
    return {str(x.relative_to(root)): hashlib.sha256(x.read_bytes()).hexdigest()
            for x in sorted(root.rglob("*")) if x.is_file()}


def notes(root):
    return (root / "notes").read_text().splitlines() if (root / "notes").exists() else []


def calls(root):
    return [x for x in notes(root) if x.startswith("call")]


def fail(root, numbers):
    """From now on the generator fails for these pictures."""
    (root / "fail").write_text(" ".join(map(str, numbers)))


def trace(folder, name):
    return json.loads((folder / "runs" / name / "trace.json").read_text())


# ------------------------------------------------------------------------------
# A run


def test_every_sample_has_a_run_folder_and_a_video(tmp_path, capsys):
    """What it may cost is told first."""
    data = write_jsonl(tmp_path / "data", 4)
    assert go(tmp_path, data, "out") == 0
    clips, seconds, asked = worst_case(Config(seconds_first=1, seconds_next=0.5))
    assert (f"At worst: {4 * clips} clips, {4 * seconds:.0f} s of generated video, {4 * asked} VLM "
            "calls") in capsys.readouterr().err
    assert [*videos(tmp_path / "out")] == [f"s{i}.mp4" for i in range(4)]
    for i in range(4):
        found = trace(tmp_path / "out", f"s{i}")
        assert (found["status"], found["cost"]["steps"]) == ("complete", 2)
        assert found["cost"]["clips"] == 2 + i % 2 and found["method"] == "collabvr"
        assert found["settings"]["seconds_next"] == 0.5 and found["settings"]["strict"] is True
        video = tmp_path / "out" / "videos" / f"s{i}.mp4"
        assert (tmp_path / "out/runs" / f"s{i}/video.mp4").read_bytes() == video.read_bytes()


def test_what_is_finished_is_skipped(tmp_path):
    """No model is loaded. Settings that change no answer are no others. A lost video comes back
    from the run folder."""
    data = write_jsonl(tmp_path / "data", 3)
    assert go(tmp_path, data, "out") == 0
    before, made = notes(tmp_path), videos(tmp_path / "out")
    assert go(tmp_path, data, "out", wait=0.001) == 0 and notes(tmp_path) == before
    (tmp_path / "out/videos/s1.mp4").unlink()
    assert go(tmp_path, data, "out") == 0
    assert videos(tmp_path / "out") == made and notes(tmp_path) == [*before, "checked"]


def test_a_run_without_a_status_is_not_finished(tmp_path):
    """Whatever its trace says of its settings."""
    data = write_jsonl(tmp_path / "data", 1)
    assert go(tmp_path, data, "out") == 0
    path = tmp_path / "out/runs/s0/trace.json"
    unfinished = trace(tmp_path / "out", "s0")
    last = unfinished["calls"].pop()
    del unfinished["status"]
    path.write_text(json.dumps(unfinished))
    assert go(tmp_path, data, "out") == 0
    found = trace(tmp_path / "out", "s0")
    assert found["status"] == "complete" and found["calls"][-1]["reply"] == last["reply"]


@pytest.mark.parametrize("change, words", [
    ({"config": Config(seconds_first=2, seconds_next=0.5)}, "seconds_first was 1.0, is 2.0"),
    ({"colours": 255}, "generator.colours was 256, is 255"),
    ({"vlm": Judge(False)}, "vlm.strict was true, is false"),
    ({"seeds": 2}, "seeds was 1, is 2"),
    ({"method": "single"}, 'method was "collabvr", is "single"'),
])
def test_changed_settings_are_refused(tmp_path, change, words):
    """With what differs, and nothing is thrown away."""
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out") == 0
    before, seen = videos(tmp_path / "out"), notes(tmp_path)
    with pytest.raises(Problem, match=f"other settings: {words}"):
        go(tmp_path, data, "out", **change)
    assert videos(tmp_path / "out") == before and notes(tmp_path) == seen


def test_data_may_grow_but_not_change(tmp_path):
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out") == 0
    assert go(tmp_path, write_jsonl(tmp_path / "data", 3), "out") == 0
    with pytest.raises(Problem, match="another data set, which has no sample s2 as there"):
        go(tmp_path, write_jsonl(tmp_path / "data", 2), "out")
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in lines] == ["s0", "s1", "s2"]


def test_a_changed_picture_fails_and_its_old_run_stays(tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out") == 0
    before = videos(tmp_path / "out")
    Image.fromarray(np.full((32, 48, 3), 200, np.uint8)).save(tmp_path / "data" / "1.png")
    assert go(tmp_path, data, "out", fill_failed=True) == 1
    assert "another picture" in capsys.readouterr().err
    assert videos(tmp_path / "out") == before


# ------------------------------------------------------------------------------
# What fails


def test_a_failed_sample_does_not_stop_the_rest(tmp_path, capsys):
    """It is told at the end with what to do, and tried again."""
    data = write_jsonl(tmp_path / "data", 4)
    fail(tmp_path, [1])
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    assert go(tmp_path, data, "out") == 1
    failed = tmp_path / "out" / "runs" / "s1" / "failed.txt"
    assert "out of memory" in failed.read_text()
    assert [*videos(tmp_path / "out")] == ["s0.mp4", "s2.mp4"]
    said = capsys.readouterr()
    assert "2 done, 2 failed" in said.out and "s3: " in said.err
    assert re.search(r"Failed: s1, s3\.\n.* tries them again\. .* --fill-failed", said.err)
    fail(tmp_path, [])
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "data" / "3.png")
    before = notes(tmp_path)
    assert go(tmp_path, data, "out") == 0 and not failed.exists()
    assert [*videos(tmp_path / "out")] == [f"s{i}.mp4" for i in range(4)]
    new = notes(tmp_path)[len(before):]
    assert {x[:6] for x in new} == {"checke", "call 1", "call 0"}  # 0 is black, as s3 is now


@pytest.mark.parametrize("error", [SystemExit("no weights"), asyncio.CancelledError("no weights")])
def test_a_generator_that_ends_its_thread_has_failed(tmp_path, error, capsys):
    """Nobody waits for ever."""
    @dataclass
    class Ends(Painter):
        def __call__(self, *request):
            raise error

    assert go(tmp_path, write_jsonl(tmp_path / "data", 2), "out", vgm=Ends, in_flight=2) == 1
    said = capsys.readouterr()
    assert "0 done, 2 failed" in said.out and "no weights" in said.err


def test_a_start_at_which_all_fails_stops_after_five(tmp_path):
    """A wrong setting would fail all of them, after some minutes each."""
    data = write_jsonl(tmp_path / "data", 9)
    fail(tmp_path, range(9))
    with pytest.raises(Problem, match="5 runs in a row failed alike: The generator failed twice"):
        go(tmp_path, data, "out", wait=0.02)
    time.sleep(0.2)  # the thread may have begun a sixth one
    assert len({x.split()[1] for x in calls(tmp_path)}) <= 6


def test_samples_that_failed_before_come_last(tmp_path):
    """And stop nothing: fifteen videos, then all thirty-five that can be made."""
    refused = [1, 3, 5, 7, 9]
    fail(tmp_path, refused)
    assert go(tmp_path, write_jsonl(tmp_path / "data", 20), "out", method="single") == 1
    assert len(videos(tmp_path / "out")) == 15
    before = calls(tmp_path)
    assert go(tmp_path, write_jsonl(tmp_path / "data", 40), "out", method="single") == 1
    assert len(videos(tmp_path / "out")) == 35
    tried = [int(x.split()[1]) for x in calls(tmp_path)[len(before):]]
    assert tried == [*range(20, 40), *np.repeat(refused, 2)]


def test_all_that_failed_can_be_filled(tmp_path):
    """Eight of 24, at a second start."""
    data = write_jsonl(tmp_path / "data", 24)
    fail(tmp_path, range(0, 24, 3))
    assert go(tmp_path, data, "out", method="single") == 1
    assert len(videos(tmp_path / "out")) == 16
    assert go(tmp_path, data, "out", method="single", fill_failed=True) == 1
    assert len(videos(tmp_path / "out")) == 24


def test_ten_in_a_row_that_fail_alike_stop_it(tmp_path):
    """A full disk, say. The next start goes on with the others."""
    data = write_jsonl(tmp_path / "data", 30)
    fail(tmp_path, range(3, 30))
    for tried in (13, 23):  # of 30
        with pytest.raises(Problem, match=r"10 runs in a row failed alike: .* goes on"):
            go(tmp_path, data, "out", method="single", wait=0.005)
        time.sleep(0.1)  # the thread may have begun one more
        assert len({x.split()[1] for x in calls(tmp_path)}) - tried in (0, 1)
    fail(tmp_path, [])
    assert go(tmp_path, data, "out", method="single") == 0
    assert len(videos(tmp_path / "out")) == 30


@pytest.mark.parametrize("error, alike", [
    ("out/runs/{id}/clips/step1-attempt1-{hash}.mkv cannot be written (OSError: disk full).", True),
    ("CUDA out of memory: {n}.5 GiB of 80 GiB are free", True), ("{id}", True),
    ("The planner gave no usable reply: 'I am {word}.'", False)])
def test_failures_are_alike_but_for_names_and_numbers(error, alike):
    stop = bench.Stop(made=True)

    def look(k):
        text = error.format(id=f"split/b{k}", hash=f"{k}fa0c", n=k, word="abcdefghij"[k])
        job = bench.Job(f"split/b{k}", *[None] * 9)
        stop.look(job, bench.Done(error=text))

    for _ in range(9):
        stop.look(None, bench.Done())  # videos in a row are no failures
    for k in range(9):
        look(k)
    if alike:
        with pytest.raises(Problem, match="10 runs in a row"):
            look(9)
    else:
        look(9)


def test_what_another_process_works_on_is_skipped(tmp_path, capsys):
    """Neither a failure nor a still is put in its place."""
    data = write_jsonl(tmp_path / "data", 2)
    folder = tmp_path / "out/runs/s1"
    folder.mkdir(parents=True)
    with filelock.FileLock(folder / "lock"):
        assert go(tmp_path, data, "out", fill_failed=True) == 1
    said = capsys.readouterr()
    assert "1 done, 0 failed, 1 busy" in said.out
    assert "Busy, another process works on them: s1." in said.err
    assert [*videos(tmp_path / "out")] == ["s0.mp4"] and not (folder / "failed.txt").exists()


def test_both_models_are_checked_before_the_first_clip(tmp_path):
    """Unless the method asks none."""
    @dataclass
    class NoKey(Judge):
        def check(self):
            raise Problem("No API key.")

    data = write_jsonl(tmp_path / "data", 1)
    for method in ("pass4", "videotpo", "m2", "collabvr"):
        with pytest.raises(Problem, match="No API key"):
            go(tmp_path, data, method, method=method, vlm=NoKey())
    assert not calls(tmp_path)
    assert go(tmp_path, data, "single", method="single", vlm=NoKey()) == 0
    assert notes(tmp_path) == ["checked"] * 5 + ["call 0 seed 1"]
    assert go(tmp_path, data, "still", method="still", vlm=NoKey()) == 0
    assert len(notes(tmp_path)) == 6


# ------------------------------------------------------------------------------
# Independent runs, layouts, stills


def test_five_seeds_are_five_independent_runs(tmp_path):
    """The first is what one run would be."""
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "one", method="single") == 0
    assert go(tmp_path, data, "five", method="single", seeds=5) == 0
    found = videos(tmp_path / "five")
    assert [*found] == [f"seed{k}/s{i}.mp4" for k in range(1, 6) for i in range(2)]
    assert len({found[f"seed{k}/s0.mp4"] for k in range(1, 6)}) == 5
    assert found["seed1/s0.mp4"] == videos(tmp_path / "one")["s0.mp4"]
    assert go(tmp_path, data, "loop", seeds=2) == 0
    for out, method_seeds in {"five": [1], "loop": [0, 1]}.items():
        for k in (1, 2):
            made = [x["seed"] for x in trace(tmp_path / out, f"s0/seed{k}")["calls"] if "seed" in x]
            assert made == [100_000 * (k - 1) + seed for seed in method_seeds]


def test_videothinkbench_gets_the_last_frame_too(tmp_path):
    data = write_jsonl(tmp_path / "data", 1)
    row = {"id": "maze-00", "task_type": "maze_square", "prompts": {"ti2v": "Do 0."},
           "assets": {"puzzle_image": "0.png"}}
    data.write_text(json.dumps(row))
    assert go(tmp_path, data, "out", method="single") == 0
    folder = tmp_path / "out" / "videos" / "maze-00"
    assert sorted(x.name for x in folder.iterdir()) == ["generated.mp4", "last_frame.png"]
    frame = iio.imread(folder / "last_frame.png")
    assert frame.shape == (32, 48, 3) and frame[0, 0, 0] != frame[-1, 0, 0]


@pytest.mark.slow
def test_gen_vires_samples_lie_in_five_folders(tmp_path):
    """Their pictures are in the data set's own file."""
    pytest.importorskip("datasets")
    gen_vire_rows().save_to_disk(tmp_path / "saved")
    assert go(tmp_path, tmp_path / "saved", "out", method="single") == 0
    found = videos(tmp_path / "out")
    assert len(found) == 3 * 5 and len(set(found.values())) == 3


def frames(path):
    return iio.imread(path, plugin="pyav")


def test_still_is_the_floor(tmp_path):
    """The input picture for as long as a first clip, without a call."""
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out", method="still") == 0 and not notes(tmp_path)
    for i in range(2):
        found = frames(tmp_path / "out/videos" / f"s{i}.mp4")
        assert found.shape == (9, 32, 48, 3) and abs(int(found.max()) - 5 * i) <= 2
        assert trace(tmp_path / "out", f"s{i}")["calls"] == []
    assert go(tmp_path, data, "out", method="still") == 0


def test_a_failed_sample_can_be_filled_with_a_still(tmp_path):
    """Until a start succeeds, which takes the still's place."""
    data = write_jsonl(tmp_path / "data", 3)
    fail(tmp_path, [1])
    (tmp_path / "data" / "2.png").write_bytes(b"no picture")
    assert go(tmp_path, data, "out", fill_failed=True) == 1
    assert [*videos(tmp_path / "out")] == ["s0.mp4", "s1.mp4"]
    still = frames(tmp_path / "out" / "videos" / "s1.mp4")
    assert len(still) == 9 and np.ptp(still) <= 2 and abs(int(still[0, 0, 0, 0]) - 5) <= 2
    mark = tmp_path / "out" / "runs" / "s1" / "still.mp4"
    assert mark.exists()
    fail(tmp_path, [])
    assert go(tmp_path, data, "out") == 1 and not mark.exists()  # the picture is still none
    assert len(frames(tmp_path / "out" / "videos" / "s1.mp4")) == 7


# ------------------------------------------------------------------------------
# The command line, and classes of one's own


class Twice(CollabVR):
    """A method as a user may write it."""

    def run(self, I0, q):
        I0 = self.models.begin(I0, q)
        self.models.generate(I0, q, 1.0)
        return Result(self.models.generate(I0, q, 1.0), "unverified", [1])


def own(monkeypatch, tmp_path, *options, vgm=Painter, vlm=Judge, method=None):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "data", 2)
    return bench.main(vgm, vlm, method, ["--data", str(data), "--out", "out", *options])


def test_classes_of_ones_own_are_options(tmp_path, monkeypatch):
    """The method is the class; the fields of both models are options."""
    assert own(monkeypatch, tmp_path, "--colours", "99", "--no-strict", method=Twice) == 0
    found = trace(tmp_path / "out", "s1")
    assert found["method"] == "Twice" and found["cost"]["clips"] == 2
    assert (found["settings"]["colours"], found["settings"]["strict"]) == (99, False)
    assert own(monkeypatch, tmp_path, "--method", "single", "--out", "other", method=Twice) == 0
    assert trace(tmp_path / "other", "s1")["method"] == "single"


def test_an_edited_method_is_another_setting(tmp_path, monkeypatch):
    source = ("from collabvr import CollabVR, Result\n\nclass Mine(CollabVR):\n"
              "    def run(self, I0, q):\n        I0 = self.models.begin(I0, q)\n"
              "        return Result(self.models.generate(I0, q, 1.0), 'unverified', [1])\n")

    def load(text):
        (tmp_path / "mine.py").write_text(text)
        return runpy.run_path(str(tmp_path / "mine.py"), run_name="mine")["Mine"]

    assert own(monkeypatch, tmp_path, method=load(source)) == 0
    assert own(monkeypatch, tmp_path, method=load(source)) == 0
    assert own(monkeypatch, tmp_path, method=load(source + "# edited\n")) == 2


@pytest.mark.parametrize("options, word", [
    (["--shard", "0/2"], "i/n"), (["--shard", "x"], "i/n"), (["--shard", "3/2"], "i/n"),
    (["--in-flight", "0"], "in_flight"), (["--M", "0"], "M"), (["--seeds", "0"], "seeds"),
    (["--seed", "-1"], "seed"), (["--method", "magic"], "expected is one of still, single"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--bogus"], "--bogus")])
def test_bad_options_end_with_status_2(tmp_path, monkeypatch, options, word, capsys):
    assert own(monkeypatch, tmp_path, *options) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_shipped_generators_have_their_own_options(capsys):
    assert bench.main(argv=["--help"]) == 0
    said = capsys.readouterr().out
    assert "--sampling-steps" in said and "{wan,fast_wan,served,veo,cosmos}" in said
    assert f"usage: {cli.program()} " in said
    assert bench.main(argv=["--generator", "cosmos", "--help"]) == 0
    assert bench.main(argv=["--generator", "bogus"]) == 2


def test_two_options_of_one_name_are_refused(tmp_path, monkeypatch, capsys):
    @dataclass
    class Slow(Painter):
        in_flight: int = 3

    assert own(monkeypatch, tmp_path, vgm=Slow) == 2
    assert "Two options have one name" in capsys.readouterr().err


@pytest.mark.parametrize("package, options", [
    ("ray", ["--ray", "2"]), ("datasets", ["--data", "somebody/some-data"])])
def test_a_missing_package_is_named(tmp_path, package, options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert own(monkeypatch, tmp_path, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{package} is needed: pip install -r examples/requirements.txt" in said


@pytest.mark.slow
def test_the_readmes_generator_runs_as_it_stands(tmp_path):
    """On six pictures of one's own."""
    text = (ROOT / "examples/bench/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "fade.py").write_text(code)
    command = re.search(r"python fade.py (.*)", text)[1].split()
    write_jsonl(tmp_path, 6).rename(tmp_path / "six.jsonl")
    done = subprocess.run(
        [sys.executable, "fade.py", *command], cwd=tmp_path, text=True, capture_output=True,
        check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "6 done, 0 failed" in done.stdout, done.stderr
    assert len(videos(tmp_path / command[command.index("--out") + 1])) == 6


# ------------------------------------------------------------------------------
# Shards, in flight, kills, Ray: the same bytes


def test_shards_and_in_flight_make_the_same_videos(tmp_path):
    data = write_jsonl(tmp_path / "data", 7)
    assert go(tmp_path, data, "plain") == 0
    for i, ids in ((1, "036"), (2, "14"), (3, "25")):
        assert go(tmp_path, data, "shards", shard=f"{i}/3") == 0
        seen = {x.stem for x in (tmp_path / "shards" / "videos").iterdir()}
        assert {f"s{k}" for k in ids} <= seen
    began = time.monotonic()
    assert go(tmp_path, data, "flight", in_flight=3, wait=0.02) == 0
    lasted = time.monotonic() - began
    plain = videos(tmp_path / "plain")
    assert len(plain) == 7 and len(set(plain.values())) > 1
    assert videos(tmp_path / "shards") == videos(tmp_path / "flight") == plain
    walls = [x["wall_seconds"] for i in range(7)
             for x in trace(tmp_path / "flight", f"s{i}")["calls"] if x["role"] == "vgm"]
    assert sum(walls) <= lasted  # no call counts its wait for the others


def test_the_generator_works_while_others_wait(tmp_path):
    """Two in flight: s0's planner answers once s1 has a clip."""
    @dataclass
    class Waits(Judge):
        def __call__(self, instructions, parts, schema):
            if parts[0] == "Task prompt: Do 0." and not calls(tmp_path):
                wait_for(lambda: calls(tmp_path), limit=5)
                assert calls(tmp_path)[0].startswith("call 1")
            return super().__call__(instructions, parts, schema)

    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out", vlm=Waits(), in_flight=2) == 0
    assert trace(tmp_path / "out", "s0")["cost"]["calls"]["planner"] == 2, "none failed"


def wait_for(condition, process=None, limit=300.0):
    """Until the condition holds or the process ends."""
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        if process and process.poll() is not None:
            return
        time.sleep(0.02)


def start(root, data, out, *options, module="examples.tests.painter"):
    """The benchmark as a process of its own."""
    given = ["--data", data, "--out", root / out, *options]
    if module == "examples.tests.painter":
        given += ["--notes", root, "--seconds-first", 1, "--seconds-next", 0.5]
    code = ("import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ended(process):
    """What it said, after a whole run."""
    said, _ = process.communicate()
    assert process.returncode == 0 and " 0 failed" in said, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--in-flight", 1], ["--in-flight", 3], ["--ray", 2]])
def test_three_kills_change_nothing(tmp_path, options):
    """Nothing is paid for twice but the calls under way. Ctrl-C at the last."""
    data = write_jsonl(tmp_path / "data", 8)
    ended(start(tmp_path, data, "plain"))
    paid = len(calls(tmp_path))
    for number, sent in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGINT), 1):
        process = start(tmp_path, data, "out", "--wait", 0.2, *options)
        wait_for(lambda k=number: len(calls(tmp_path)) >= paid + 5 * k, process)
        process.send_signal(sent)
        said, _ = process.communicate()
        assert process.returncode in (130, -signal.SIGKILL) and "Traceback" not in said, said
        assert sent == signal.SIGKILL or "Interrupted. The same command goes on" in said
        assert not [*(tmp_path / "out").rglob("failed.txt")]
        time.sleep(2 if "--ray" in options else 0)  # its actors end after it
    ended(start(tmp_path, data, "out", *options))
    assert videos(tmp_path / "out") == videos(tmp_path / "plain") != {}
    assert len(calls(tmp_path)) <= 2 * paid + 3 * 3


def actors(pid):
    """The processes below `pid` that are Ray's actors."""
    psutil = pytest.importorskip("psutil")
    return [x for x in psutil.Process(pid).children(recursive=True)
            if "ray::Worker" in " ".join(x.cmdline())]


def listening(pid):
    """Addresses on which the process or one below it listens."""
    psutil = pytest.importorskip("psutil")
    found = set()
    for x in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found |= {y.laddr.ip for y in x.net_connections("inet") if y.status == "LISTEN"}
        except psutil.Error:
            pass
    return {x.removeprefix("::ffff:") for x in found}


@pytest.mark.slow
def test_ray_replaces_an_actor_that_died(tmp_path):
    """And nobody but this machine can reach it."""
    pytest.importorskip("ray")
    data = write_jsonl(tmp_path / "data", 8)
    ended(start(tmp_path, data, "plain"))
    process = start(tmp_path, data, "ray", "--ray", 2, "--in-flight", 2, "--wait", 0.3)
    wait_for(lambda: len(videos(tmp_path / "ray")) >= 2, process)
    assert listening(process.pid) == {"127.0.0.1"}
    actors(process.pid)[0].kill()
    ended(process)
    assert videos(tmp_path / "ray") == videos(tmp_path / "plain")


KILLER = """\
import os, sys
from dataclasses import dataclass
import numpy as np
from collabvr import Clip, Result
from examples.baselines import Single
from examples.bench.run import main


@dataclass
class Fade:
    deadly: int = -1

    def __call__(self, frame, prompt, seconds, seed):
        if frame[0, 0, 0] == self.deadly:
            os._exit(1)
        return Clip(np.stack([frame // k for k in range(1, 10)]), 8)


class Once(Single):
    def run(self, I0, q):
        I0 = self.models.begin(I0, q)
        return Result(self.models.generate(I0, q, 1.0), "unverified", [1])


if __name__ == "__main__":
    sys.exit(main(vgm=Fade, method=Once))
"""


def run_file(tmp_path, out, *options):
    """A user's own file, whose classes no worker can import."""
    (tmp_path / "mine.py").write_text(KILLER)
    data = write_jsonl(tmp_path / "data", 3)
    return subprocess.run(
        [sys.executable, "mine.py", "--data", data, "--out", tmp_path / out, *options],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.slow
def test_ray_runs_classes_of_a_users_own_file(tmp_path):
    pytest.importorskip("ray")
    assert run_file(tmp_path, "plain").returncode == run_file(tmp_path, "ray", "--ray", "1"
                                                              ).returncode == 0
    assert videos(tmp_path / "ray") == videos(tmp_path / "plain") != {}
    one, two = [trace(tmp_path / x, "s1")["calls"][0]["request"] for x in ("plain", "ray")]
    assert one == two, "each goes on from what the other paid for"


@pytest.mark.slow
def test_a_sample_that_kills_three_workers_has_failed(tmp_path):
    pytest.importorskip("ray")
    done = run_file(tmp_path, "ray", "--ray", "1", "--deadly", "5")
    assert done.returncode == 1 and "2 done, 1 failed" in done.stdout, done.stderr
    assert "died three times" in (tmp_path / "ray/runs/s1/failed.txt").read_text()


@pytest.mark.slow
def test_tiny_wan_makes_the_same_videos_each_way(tmp_path):
    """Single clips of mazes: killed, in flight and with Ray."""
    pytest.importorskip("ray")
    from examples.maze import world

    rows = []
    for i in range(4):
        maze = world.make(4 + i % 3, 1 + i % 3, np.random.default_rng(i))
        Image.fromarray(world.draw(maze)).save(tmp_path / f"{i}.png")
        rows.append({"id": f"s{i}", "image": f"{i}.png", "task": world.task(maze)})
    data = tmp_path / "mazes.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))

    def begin(out, *options):
        return start(tmp_path, data, out, "--method", "single", "--vgm", ROOT / "examples/maze/tiny"
                     "-wan", "--fps", 8, "--seconds-first", 2, "--sampling-steps", 12,
                     "--guidance-scale", 1, *options, module="examples.bench.run")

    ended(begin("plain"))
    process = begin("killed")
    wait_for(lambda: videos(tmp_path / "killed"), process)
    process.kill()
    process.communicate()
    ended(begin("killed"))
    ended(begin("flight", "--in-flight", 3))
    ended(begin("ray", "--ray", 2, "--in-flight", 2))
    plain = videos(tmp_path / "plain")
    assert len(set(plain.values())) == 4
    for out in ("killed", "flight", "ray"):
        assert videos(tmp_path / out) == plain, out
