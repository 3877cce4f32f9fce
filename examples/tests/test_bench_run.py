"""Running a benchmark: quick tests with scripted models; with COLLABVR_SLOW=1 also Ray, what
workers gain, and tiny-wan on mazes each way they can be run."""

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import collabvr
from collabvr import Clip, CollabVR, Config, Problem, Result
from examples import cli
from examples.baselines import METHODS
from examples.bench import run as bench
from examples.bench.samples import samples
from examples.tests.painter import Judge, Painter

ROOT = Path(__file__).resolve().parents[2]
SINGLE = ["--method", "single", "--seconds-first", "1"]
slow = pytest.mark.skipif(not os.environ.get("COLLABVR_SLOW"), reason="COLLABVR_SLOW=1 runs it")


def write_jsonl(root, count, **more):
    """Plain pictures with a number in their colour, and a JSONL of them."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        Image.fromarray(np.full((32, 48, 3), 5 * i, np.uint8)).save(root / f"{i}.png")
        rows.append({"id": f"s{i}", "image": f"{i}.png", "task": f"Do {i}.",
                     "category": "ab"[i % 2]} | more)
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root / "data.jsonl"


def benchmark(root, data, out, method="collabvr", wait=0.0, colours=256, strict=True, **options):
    """A Benchmark of the scripted models."""
    vgm = Painter(notes=root, wait=wait, colours=colours)
    given = {"config": Config(seconds_first=1, seconds_next=0.5), "vlm": Judge(strict)} | options
    kind = METHODS[method] if isinstance(method, str) else method
    name = method if isinstance(method, str) else method.__name__
    return bench.Benchmark(bench.Options(str(data), root / out, vgm=vgm, **given), name, kind)


def go(*arguments, **options):
    return benchmark(*arguments, **options).run()


def videos(folder):
    """Every file that the evaluators see, by its place, hashed."""
    root = folder / "videos"
    return {str(x.relative_to(root)): hashlib.sha256(x.read_bytes()).hexdigest()
            for x in sorted(root.rglob("*")) if x.is_file()}


def notes(root):
    return (root / "notes").read_text().split("\n")[:-1] if (root / "notes").exists() else []


def calls(root):
    return [x for x in notes(root) if x.startswith("call")]


def trace(folder, name):
    return json.loads((folder / "runs" / name / "trace.json").read_text())


# ------------------------------------------------------------------------------
# A run


def test_every_sample_has_a_run_folder_and_a_video(tmp_path):
    """And no clip lies among the videos."""
    data = write_jsonl(tmp_path / "data", 4)
    assert go(tmp_path, data, "out") == 0
    assert [*videos(tmp_path / "out")] == [f"s{i}.mp4" for i in range(4)]
    for i in range(4):
        folder = tmp_path / "out" / "runs" / f"s{i}"
        found = trace(tmp_path / "out", f"s{i}")
        assert (found["status"], found["cost"]["steps"]) == ("complete", 2)
        assert found["cost"]["clips"] == 2 + i % 2 and found["method"] == "collabvr"
        assert found["settings"]["seconds_next"] == 0.5 and found["settings"]["strict"] is True
        video = tmp_path / "out" / "videos" / f"s{i}.mp4"
        assert (folder / "video.mp4").read_bytes() == video.read_bytes()
        assert {"input.png", "start.json", "calls.jsonl"} <= {x.name for x in folder.iterdir()}


def test_what_is_finished_is_skipped_without_loading_a_model(tmp_path):
    """Settings that change no answer are no others."""
    data = write_jsonl(tmp_path / "data", 3)
    assert go(tmp_path, data, "out") == 0
    before = notes(tmp_path)
    assert go(tmp_path, data, "out") == 0 and notes(tmp_path) == before
    assert go(tmp_path, data, "out", wait=0.001) == 0 and notes(tmp_path) == before


@pytest.mark.parametrize("change, words", [
    ({"config": Config(seconds_first=2, seconds_next=0.5)}, "seconds_first was 1.0, is 2.0"),
    ({"colours": 255}, "generator.colours was 256, is 255"),
    ({"strict": False}, "vlm.strict was true, is false"),
    ({"seed": 7}, "seed was 0, is 7"), ({"seeds": 2}, "seeds was 1, is 2"),
    ({"method": "single"}, 'method was "collabvr", is "single"'),
])
def test_changed_settings_are_refused_with_what_differs(tmp_path, change, words):
    """And nothing is thrown away."""
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out") == 0
    before, seen = videos(tmp_path / "out"), notes(tmp_path)
    with pytest.raises(Problem, match=f"other settings: {words}"):
        go(tmp_path, data, "out", **change)
    assert videos(tmp_path / "out") == before and notes(tmp_path) == seen


def test_settings_may_change_until_something_is_finished(tmp_path):
    """A first try with a wrong setting does not spoil the folder."""
    data = write_jsonl(tmp_path / "data", 2)
    (tmp_path / "fail").write_text("all")
    assert go(tmp_path, data, "out") == 1
    (tmp_path / "fail").write_text("")
    assert go(tmp_path, data, "out", colours=255) == 0


def test_another_data_set_is_refused_but_data_may_grow(tmp_path):
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out") == 0
    assert go(tmp_path, write_jsonl(tmp_path / "data", 3), "out") == 0
    with pytest.raises(Problem, match="another data set: .* has no sample s2 as there"):
        go(tmp_path, write_jsonl(tmp_path / "data", 2), "out")
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in lines] == ["s0", "s1", "s2"]


def test_a_picture_that_changed_fails_and_its_old_run_stays(tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "out") == 0
    before = videos(tmp_path / "out")
    Image.fromarray(np.full((32, 48, 3), 200, np.uint8)).save(tmp_path / "data" / "1.png")
    assert go(tmp_path, data, "out") == 1
    assert "another picture or task" in capsys.readouterr().err
    assert videos(tmp_path / "out") == before


def test_a_failed_sample_does_not_stop_the_rest(tmp_path, capsys):
    """It is written down, told at the end with what to do, and tried again."""
    data = write_jsonl(tmp_path / "data", 4)
    (tmp_path / "fail").write_text("1")
    (tmp_path / "data" / "3.png").write_bytes(b"no picture")
    assert go(tmp_path, data, "out") == 1
    failed = tmp_path / "out" / "runs" / "s1" / "failed.txt"
    assert "out of memory" in failed.read_text()
    assert [*videos(tmp_path / "out")] == ["s0.mp4", "s2.mp4"]
    said = capsys.readouterr()
    assert "2 done, 2 failed" in said.out and "s3: " in said.err
    assert re.search(r"Failed: s1, s3\..* tries them again\..* --fill-failed", said.err)
    (tmp_path / "fail").write_text("")
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "data" / "3.png")
    before = notes(tmp_path)
    assert go(tmp_path, data, "out") == 0 and not failed.exists()
    assert [*videos(tmp_path / "out")] == [f"s{i}.mp4" for i in range(4)]
    assert {x[:6] for x in notes(tmp_path)[len(before):]} == {"built", "call 1", "call 0"}  # black


def test_a_run_stops_when_the_first_five_fail_alike(tmp_path):
    """A missing key would fail all of them, after some minutes each."""
    data = write_jsonl(tmp_path / "data", 9)
    (tmp_path / "fail").write_text("all")
    with pytest.raises(Problem, match="first five runs failed alike: The generator failed twice"):
        go(tmp_path, data, "out", wait=0.05)
    time.sleep(0.3)  # the thread may have begun a sixth one
    assert len({x.split()[1] for x in calls(tmp_path)}) <= 6


def test_the_worst_case_of_what_is_left_is_told_first(tmp_path, capsys):
    assert go(tmp_path, write_jsonl(tmp_path / "data", 3), "out") == 0
    clips, seconds, asked = Config(seconds_first=1, seconds_next=0.5).worst_case()
    assert (f"At worst: {3 * clips} clips, {3 * seconds:.0f} s of generated video, {3 * asked} VLM "
            "calls") in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(tmp_path, method):
    """Judge has no answer for VideoTPO's critic and the pre-planner: they fail as samples do."""
    data = write_jsonl(tmp_path / "data", 1)
    status = go(tmp_path, data, "out", method=method, strict=False)
    assert status == (method in ("videotpo", "preplan"))


# ------------------------------------------------------------------------------
# Independent runs, layouts, stills


def test_five_seeds_are_five_independent_runs(tmp_path):
    """With run folders, seeds and videos of their own; the first is what one run would be."""
    data = write_jsonl(tmp_path / "data", 2)
    assert go(tmp_path, data, "one", method="single") == 0
    assert go(tmp_path, data, "five", method="single", seeds=5) == 0
    found = videos(tmp_path / "five")
    assert [*found] == [f"seed{k}/s{i}.mp4" for k in range(1, 6) for i in range(2)]
    assert len({found[f"seed{k}/s0.mp4"] for k in range(1, 6)}) == 5
    assert found["seed1/s0.mp4"] == videos(tmp_path / "one")["s0.mp4"]
    seeds = [trace(tmp_path / "five", f"s0/seed{k}")["calls"][0]["seed"] for k in (1, 2, 3)]
    assert seeds == [1, 100_001, 200_001]
    assert go(tmp_path, data, "loop", seeds=2) == 0
    seeds = [[x["seed"] for x in trace(tmp_path / "loop", f"s0/seed{k}")["calls"] if "seed" in x]
             for k in (1, 2)]
    assert seeds == [[0, 1], [100_000, 100_001]]


def test_five_seeds_fill_v_reasonbenchs_names(tmp_path):
    root = tmp_path / "v"
    (root / "dataset").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(root / "dataset" / "math_l1_00.png")
    (root / "prompts.txt").write_text("TASK PROMPTS\n\nMath:\nDo 0.\n")
    assert go(tmp_path, root, "out", method="single", seeds=5) == 0
    assert [*videos(tmp_path / "out")] == [f"math_single_l1_00_seed{k}.mp4" for k in range(1, 6)]


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


def test_gen_vires_samples_lie_in_five_folders(tmp_path):
    """Their pictures are in the data set's own file."""
    datasets = pytest.importorskip("datasets")
    picture = Image.fromarray(np.full((32, 48, 3), 5, np.uint8))
    row = {"main_category": "Planning", "sub_category": "maze", "id": "m", "image": picture,
           "i2v_prompt": "Do 1."}
    kinds = {k: datasets.Value("string") for k in row} | {"image": datasets.Image()}
    rows = datasets.Dataset.from_list([row], features=datasets.Features(kinds))
    rows.save_to_disk(tmp_path / "saved")
    assert go(tmp_path, tmp_path / "saved", "out", method="single") == 0
    found = videos(tmp_path / "out")
    assert [*found] == [f"0_generated_videos/single/single_{k}/Planning/maze/m.mp4"
                        for k in range(5)]
    assert len(set(found.values())) == 1


def test_a_failed_sample_can_be_filled_with_a_still(tmp_path, capsys):
    """As long as a first clip; the next start that succeeds takes it away."""
    data = write_jsonl(tmp_path / "data", 2)
    (tmp_path / "fail").write_text("1")
    assert go(tmp_path, data, "out", fill_failed=True) == 1
    assert [*videos(tmp_path / "out")] == ["s0.mp4", "s1.mp4"]
    assert "Still videos of their input pictures are in their place" in capsys.readouterr().err
    still = iio.imread(tmp_path / "out" / "videos" / "s1.mp4", plugin="pyav")
    assert len(still) == 17 and np.ptp(still) <= 2 and abs(int(still[0, 0, 0, 0]) - 5) <= 2
    assert (tmp_path / "out" / "runs" / "s1" / "still.mp4").exists()
    assert go(tmp_path, data, "out") == 1 and [*videos(tmp_path / "out")] == ["s0.mp4"]
    (tmp_path / "fail").write_text("")
    assert go(tmp_path, data, "out", fill_failed=True) == 0
    assert not (tmp_path / "out" / "runs" / "s1" / "still.mp4").exists()
    assert len(iio.imread(tmp_path / "out" / "videos" / "s1.mp4", plugin="pyav")) == 7


def test_a_picture_that_cannot_be_read_cannot_be_filled(tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", 1)
    (tmp_path / "data" / "0.png").write_bytes(b"no picture")
    assert go(tmp_path, data, "out", fill_failed=True) == 1
    assert "No still video could take its place" in capsys.readouterr().err


# ------------------------------------------------------------------------------
# A generator and a method of one's own


class Twice(CollabVR):
    """A method as a user may write it."""

    def run(self, I0, q):
        I0 = self.models.begin(I0, q)
        self.models.generate(I0, q, 1.0)
        return Result(self.models.generate(I0, q, 1.0), "unverified", [1])


def own(monkeypatch, tmp_path, *options, **classes):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "data", 2)
    given = ["--data", str(data), "--out", "out", *options]
    return bench.main(**{"vgm": Painter, "vlm": Judge} | classes, argv=given)


def test_classes_of_ones_own_are_options(tmp_path, monkeypatch):
    """The method is the class; the generator's and the VLM's fields are options."""
    assert own(monkeypatch, tmp_path, "--colours", "99", "--no-strict", method=Twice) == 0
    found = trace(tmp_path / "out", "s1")
    assert found["method"] == "Twice" and found["cost"]["clips"] == 2
    assert (found["settings"]["colours"], found["settings"]["strict"]) == (99, False)
    assert own(monkeypatch, tmp_path, "--method", "single", "--out", "other", method=Twice) == 0
    assert trace(tmp_path / "other", "s1")["method"] == "single"


def test_an_edited_method_of_ones_own_is_another_setting(tmp_path, monkeypatch):
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
    (["--shard", "0/2"], "--shard is 0/2"), (["--shard", "x"], "--shard is x"),
    (["--shard", "3/2"], "--shard is 3/2"), (["--in-flight", "0"], "--in-flight is 0"),
    (["--M", "0"], "M"), (["--method", "magic"], "expected is one of single, pass2"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--bogus"], "--bogus"),
    (["--seeds", "0"], "--seeds is 0"), (["--seed", "-1"], "--seed is -1")])
def test_bad_options_end_with_status_2(tmp_path, monkeypatch, options, word, capsys):
    assert own(monkeypatch, tmp_path, *options) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shipped_generators_have_options_of_their_own(capsys):
    """By name; collabvr.py's Wan without one."""
    assert bench.main(argv=["--help"]) == 0
    said = capsys.readouterr().out
    assert "--sampling-steps" in said and "{wan,fast_wan,served,veo,cosmos}" in said
    assert f"usage: {cli.program()} " in said
    assert bench.main(argv=["--generator", "bogus"]) == 2


def test_a_generator_that_cannot_work_stops_the_start(tmp_path, monkeypatch, capsys):
    class Broken(Painter):
        def check(self):
            raise Problem("No GPU here.")

    assert own(monkeypatch, tmp_path, vgm=Broken) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"{cli.program()}: No GPU here."


def test_two_options_of_one_name_are_refused(tmp_path, monkeypatch, capsys):
    @dataclass
    class Slow(Painter):
        in_flight: int = 3

    assert own(monkeypatch, tmp_path, vgm=Slow) == 2
    assert "Slow.in_flight would be the option that Options.in_flight is" in capsys.readouterr().err


@pytest.mark.parametrize("package, options", [
    ("ray", ["--ray", "2"]), ("datasets", ["--data", "somebody/some-data"])])
def test_a_missing_package_says_what_to_install(
        tmp_path, package, options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert own(monkeypatch, tmp_path, *options) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{package} is needed: pip install -r examples/requirements.txt" in said


def test_the_readmes_ten_lines_run_as_they_stand(tmp_path):
    """A numpy generator on six pictures of one's own."""
    text = (ROOT / "examples" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import sys\n.*?vgm=Fade.*?)```", text, re.DOTALL)
    assert len([x for x in code.splitlines() if x.strip()]) <= 10
    (tmp_path / "fade.py").write_text(code)
    command = re.search(r"python fade.py (.*)", text)[1].split()
    write_jsonl(tmp_path, 6).rename(tmp_path / "six.jsonl")
    done = subprocess.run([sys.executable, "fade.py", *command], cwd=tmp_path, text=True,
                          check=False, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "6 done, 0 failed" in done.stdout, done.stderr
    out = command[command.index("--out") + 1]
    assert len(videos(tmp_path / out)) == 6


# ------------------------------------------------------------------------------
# Shards, in flight, kills: the same bytes


def test_shards_and_samples_in_flight_make_the_same_videos(tmp_path):
    data = write_jsonl(tmp_path / "data", 7)
    assert go(tmp_path, data, "plain") == 0
    for i, ids in ((1, "036"), (2, "14"), (3, "25")):
        assert go(tmp_path, data, "shards", shard=f"{i}/3") == 0
        seen = {x.stem for x in (tmp_path / "shards" / "videos").iterdir()}
        assert {f"s{k}" for k in ids} <= seen
    began = time.monotonic()
    assert go(tmp_path, data, "flight", in_flight=3, wait=0.05) == 0
    lasted = time.monotonic() - began
    plain = videos(tmp_path / "plain")
    assert len(plain) == 7 and len(set(plain.values())) > 1
    assert videos(tmp_path / "shards") == videos(tmp_path / "flight") == plain
    walls = [x["wall_seconds"] for i in range(7)
             for x in trace(tmp_path / "flight", f"s{i}")["calls"] if x["role"] == "vgm"]
    assert 0.05 * len(walls) <= sum(walls) <= lasted  # no call counts its wait for the others


def start(root, data, out, *options, module="examples.tests.painter", **env):
    """The benchmark as a process of its own."""
    given = ["--data", data, "--out", root / out, *options]
    if module == "examples.tests.painter":
        given += ["--notes", root]
    code = ("import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"runpy.run_module('{module}', run_name='__main__', alter_sys=True)")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, given)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=os.environ | env)


def wait_for(process, condition, limit=300):
    """Until the condition holds or the process ends."""
    end = time.monotonic() + limit
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)


@slow
def test_after_kill_interrupt_and_term_the_command_goes_on(tmp_path):
    """And nothing is paid for twice but the call under way."""
    data = write_jsonl(tmp_path / "data", 8)
    options = [*SINGLE, "--wait", 0.2]
    for number, sent in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGTERM), 1):
        process = start(tmp_path, data, "out", *options)
        wait_for(process, lambda k=number: len(calls(tmp_path)) >= 2 * k)
        process.send_signal(sent)
        said, _ = process.communicate()
        assert process.returncode in (130, -signal.SIGKILL) and "Traceback" not in said, said
        assert sent == signal.SIGKILL or "Interrupted. The same command goes on" in said
    process = start(tmp_path, data, "out", *options)
    said, _ = process.communicate()
    assert process.returncode == 0 and "8 runs: 8 done, 0 failed" in said, said
    assert len(videos(tmp_path / "out")) == 8 and len(calls(tmp_path)) <= 8 + 3


# ------------------------------------------------------------------------------
# Ray


def test_a_sample_that_kills_its_worker_three_times_is_given_up(tmp_path):
    plan = benchmark(tmp_path, write_jsonl(tmp_path / "data", 1), "out", method="single")
    (job,) = plan.jobs()
    row, runner = bench.to_row(job) | {"start": "now"}, bench.Runner(plan)
    tries = tmp_path / "out" / "runs" / "s0" / "tries"
    tries.parent.mkdir(parents=True)
    tries.write_text("then\n" * 5 + "now\n" * 3)  # what three dead workers left, and others
    assert "died three times" in runner(row)["error"]
    tries.write_text("now\n" * 2)
    assert runner(row) == {"id": "s0", "error": "", "seconds": 1.0} and not tries.exists()


def test_a_job_is_the_same_after_its_way_to_a_worker(tmp_path):
    write_jsonl(tmp_path, 1)
    (x,) = samples(str(tmp_path / "data.jsonl"))
    job = bench.Job("s0/seed2", bench.replace(x, content=b"\x00\xff", name=("a", "b")), 2)
    row = bench.to_row(job)
    assert bench.from_row(json.loads(json.dumps({"job": row["job"]})) | {
        "content": row["content"]}) == job


def listening(pid):
    """Addresses on which the process or one below it listens."""
    psutil = pytest.importorskip("psutil")
    found = set()
    for x in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found |= {y.laddr.ip for y in x.net_connections("inet") if y.status == "LISTEN"}
        except psutil.Error:
            pass
    return found


@slow
def test_ray_makes_the_same_videos_and_replaces_a_worker(tmp_path):
    """Which was killed; and nobody but this machine can reach it."""
    pytest.importorskip("ray", reason="pip install -r examples/requirements.txt")
    data = write_jsonl(tmp_path / "data", 8)
    options = [*SINGLE, "--wait", 0.5]
    assert start(tmp_path, data, "plain", *options).wait() == 0
    built = notes(tmp_path).count("built")
    process = start(tmp_path, data, "ray", "--ray", 2, *options)
    wait_for(process, lambda: len(videos(tmp_path / "ray")) >= 2)
    addresses = listening(process.pid)
    assert kill_a_ray_worker(process.pid)
    said, _ = process.communicate()
    assert process.returncode == 0 and "8 done, 0 failed" in said, said
    assert videos(tmp_path / "ray") == videos(tmp_path / "plain")
    assert notes(tmp_path).count("built") == built + 3  # two actors and the one that came after
    assert addresses and {x.removeprefix("::ffff:") for x in addresses} == {"127.0.0.1"}


def kill_a_ray_worker(pid):
    """Kills a process below `pid` that is an actor with a pipeline."""
    psutil = pytest.importorskip("psutil")
    for x in psutil.Process(pid).children(recursive=True):
        if "MapWorker" in " ".join(x.cmdline()):
            x.kill()
            return x.pid
    return None


@slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ray_interrupted_ends_with_130_and_goes_on(tmp_path, sent):
    pytest.importorskip("ray", reason="pip install -r examples/requirements.txt")
    data = write_jsonl(tmp_path / "data", 6)
    options = [*SINGLE, "--wait", 0.5, "--ray", 1]
    process = start(tmp_path, data, "out", *options)
    wait_for(process, lambda: videos(tmp_path / "out"))
    process.send_signal(sent)
    said, _ = process.communicate()
    assert process.returncode == 130 and "Interrupted. The same command goes on" in said, said
    assert "Traceback" not in said
    process = start(tmp_path, data, "out", *SINGLE, "--wait", 0)
    said, _ = process.communicate()
    assert process.returncode == 0 and len(videos(tmp_path / "out")) == 6, said
    assert len(calls(tmp_path)) <= 6 + 1


@slow
def test_ray_runs_classes_of_a_users_own_file(tmp_path):
    """Classes of __main__, which no worker can import."""
    pytest.importorskip("ray", reason="pip install -r examples/requirements.txt")
    (tmp_path / "mine.py").write_text(MINE)
    data = write_jsonl(tmp_path / "data", 2)
    for more in ([], ["--ray", "1"]):
        out = tmp_path / f"out{len(more)}"
        subprocess.run(
            [sys.executable, "mine.py", "--data", data, "--out", out, *more], cwd=tmp_path,
            check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert videos(tmp_path / "out2") == videos(tmp_path / "out0") != {}
    requests = [[x["request"] for x in trace(tmp_path / out, "s1")["calls"]]
                for out in ("out0", "out2")]
    assert requests[0] == requests[1], "each replays what the other paid for"


MINE = """\
import sys
from dataclasses import dataclass

import numpy as np

from collabvr import Clip, CollabVR, Result
from examples.bench.run import main


@dataclass
class Fade:
    fps: int = 8

    def __call__(self, frame, prompt, seconds, seed):
        return Clip(np.stack([frame // k for k in range(1, 2 + int(seconds * self.fps))]), self.fps)


class Once(CollabVR):
    def run(self, I0, q):
        I0 = self.models.begin(I0, q)
        return Result(self.models.generate(I0, q, 1.0), "unverified", [1])


if __name__ == "__main__":
    sys.exit(main(vgm=Fade, method=Once))
"""


# ------------------------------------------------------------------------------
# What samples in flight and workers gain: sleeping models, all else as it is


@dataclass
class Nap:
    """A generator that sleeps."""

    wait: float = 0.1

    def __call__(self, frame, prompt, seconds, seed):
        time.sleep(self.wait)
        return Clip(np.stack([frame, frame]), 1 / seconds)


@dataclass
class NapVLM(Judge):
    """A VLM that sleeps, and is content with everything."""

    strict: bool = False
    wait: float = 0.1

    def __call__(self, *request):
        time.sleep(self.wait)
        return super().__call__(*request)


def nap(root, data, out, clip, **options):
    """A Benchmark of sleeping models; a VLM call takes a quarter of a clip's time."""
    method = options.pop("method", "collabvr")
    given = bench.Options(str(data), root / out, Config(), NapVLM(wait=clip / 4), Nap(clip),
                          **options)
    return bench.Benchmark(given, method, METHODS[method])


@slow
def test_three_samples_in_flight_keep_the_generator_busy(tmp_path):
    """The README has the figures of COLLABVR_SLOW=1 pytest -s -k in_flight_keep."""
    data, busy = write_jsonl(tmp_path / "data", 40), {}
    for K in (1, 2, 3, 4):
        began = time.monotonic()
        assert nap(tmp_path, data, f"flight{K}", 0.4, in_flight=K).run() == 0
        wall = time.monotonic() - began
        work = sum(x["wall_seconds"] for i in range(40)
                   for x in trace(tmp_path / f"flight{K}", f"s{i}")["calls"] if x["role"] == "vgm")
        busy[K] = work / wall
        print(f"{K} in flight: {wall:.1f} s, the generator at work {busy[K]:.1%}")
    assert busy[1] < 0.7 and busy[3] > 0.9


@slow
def test_n_workers_are_n_times_as_fast(tmp_path):
    """Processes with a shard each. The README has the figures of pytest -s -k n_workers."""
    data, n, took = write_jsonl(tmp_path / "data", 48), 500, {}
    rows = [{"id": f"r{i}", "image": f"{i % 48}.png", "task": f"Do {i}."} for i in range(n)]
    data.write_text("\n".join(map(json.dumps, rows)))
    fork = multiprocessing.get_context("fork")
    for k in (1, 2, 4, 8, 16):
        plans = [nap(tmp_path, data, f"workers{k}", 0.2, method="single", shard=f"{i}/{k}")
                 for i in range(1, k + 1)]
        began = time.monotonic()
        workers = [fork.Process(target=plan.run) for plan in plans]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        took[k] = time.monotonic() - began
        assert len(videos(tmp_path / f"workers{k}")) == n
        print(f"{k} workers: {n} samples in {took[k]:.1f} s, {took[1] / took[k]:.2f} times as fast")
    assert took[1] / took[4] > 3


# ------------------------------------------------------------------------------
# Mazes with tiny-wan, each way they can be run


def write_mazes(root, count):
    """Mazes in VBVR-Bench's layout, ground truths of 2 s at 8 fps."""
    from examples.maze import world

    rng = np.random.default_rng(11)
    for i in range(count):
        maze = world.make(4 + i % 3, 1 + i % 3, rng)
        split = ("In-Domain_50", "Out-of-Domain_50")[i % 2]
        folder = root / split / f"G-{i // 10}_maze_data-generator" / f"{i // 2 % 5:05}"
        folder.mkdir(parents=True)
        Image.fromarray(world.draw(maze)).save(folder / "first_frame.png")
        (folder / "prompt.txt").write_text(world.task(maze) + "\n")
        film = world.film(maze, world.shortest_path(maze.open, maze.start, maze.goal), 16)
        (folder / "ground_truth.mp4").write_bytes(collabvr.mp4(Clip(film, 8)))


@pytest.fixture(scope="module")
def mazes(tmp_path_factory):
    """A folder with twenty mazes, and what starts the benchmark on them with tiny-wan."""
    from examples.maze import vlm

    root = tmp_path_factory.mktemp("mazes")
    write_mazes(root / "vbvr", 20)
    with vlm.serve() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"

        def go(out, *options):
            return start(
                root, root / "vbvr", out, "--vlm-url", url, "--vlm", vlm.MODEL, "--verify-fps", 8,
                "--vgm", ROOT / "examples/maze/tiny-wan", "--fps", 8, "--sampling-steps", 12,
                "--guidance-scale", 1, *options, module="examples.bench.run", OMP_NUM_THREADS="1")

        yield root, go
        server.shutdown()


def done(*processes):
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0 and " 0 failed" in said, said


@pytest.fixture(scope="module")
def plain(mazes):
    """The final videos of an undisturbed run."""
    root, go = mazes
    done(go("plain"))
    return videos(root / "plain")


@slow
def test_twenty_mazes_make_twenty_videos(mazes, plain):
    root, _ = mazes
    assert len(plain) == 20 and len(set(plain.values())) == 20
    for name in plain:
        split, task, index = name.split("/")
        assert (root / "vbvr" / split / task / index[:-4] / "ground_truth.mp4").exists()
        video = iio.imread(root / "plain" / "videos" / name, plugin="pyav")
        assert (len(video) - 1) % 4 == 0 and len(video) >= 17


@slow
def test_mazes_killed_and_resumed_make_the_same_videos(mazes, plain):
    root, go = mazes
    for share in (0.15, 0.4, 0.7):
        process = go("killed")
        wait_for(process, lambda k=share: len(videos(root / "killed")) >= 20 * k)
        time.sleep(0.3 * share)
        process.kill()
        process.communicate()
    done(go("killed"))
    assert videos(root / "killed") == plain
    for path in (root / "killed" / "runs").rglob("trace.json"):  # nothing was paid for twice
        lines = (path.parent / "calls.jsonl").read_text().splitlines()
        assert len(lines) == len(json.loads(path.read_text())["calls"])


@slow
def test_mazes_in_shards_and_in_flight_make_the_same_videos(mazes, plain):
    root, go = mazes
    done(go("shards", "--shard", "1/2"), go("shards", "--shard", "2/2"))
    assert videos(root / "shards") == plain
    done(go("flight", "--in-flight", 3))
    assert videos(root / "flight") == plain


@slow
def test_mazes_with_ray_make_the_same_videos(mazes, plain):
    pytest.importorskip("ray", reason="pip install -r examples/requirements.txt")
    root, go = mazes
    done(go("ray", "--ray", 2, "--in-flight", 2))
    assert videos(root / "ray") == plain
