"""Tests of examples/report: its pages say what happened, of finished, unfinished and failed runs;
they show nothing from outside; and in a real browser, where there is one, they play, sort and fit
a phone."""

import base64
import html.parser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples import cli, runs
from examples.maze import rule, vlm, world
from examples.report import __main__ as report
from examples.report import index, markup, pages
from examples.report.page import page

ROOT = Path(__file__).resolve().parents[2]
I0 = np.full((32, 48, 3), 250, np.uint8)
NASTY = """<script>alert("1")</script> & 'quotes' <img src=x onerror=alert(2)> </style></title>"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Many calls that do not wait for the disk, and clips that are not enlarged."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(markup, "SMALL", 16)


# ------------------------------------------------------------------------------
# Runs with scripted models


def painter(fail=()):
    """A generator: frame 0 is the conditioning frame, then a brightness that is its call's."""
    calls = []

    def vgm(frame, prompt, seconds, seed):
        calls.append(prompt)
        if len(calls) in fail:
            raise RuntimeError(f"out of memory {NASTY}")
        frames = np.repeat(frame[None], round(seconds * 8) + 1, 0)
        for i in range(1, len(frames)):
            frames[i, :, : 2 * i] = 20 * len(calls)
        return c.Clip(frames, 8)

    return vgm


def script(*replies):
    """A VLM that answers from a list; what is no reply is raised."""
    replies = list(replies)

    def vlm(instructions, parts, schema):
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        text = reply if isinstance(reply, str) else json.dumps(reply)
        return {"text": text, "tokens_in": 1234, "tokens_out": 56, "model": "script-1"}

    return vlm


def plan(instruction="move it", left=1):
    return {"observation": "a maze", "remaining_goal": "the rest", "task_complete": False,
            "instruction": instruction, "target_state": "there", "estimated_steps_remaining": left}


def check(verdict="accept", good=1.0, suggestion="", reason="as planned", progress="complete"):
    good_one = verdict == "accept"
    return {"reason": reason, "action_executed": good_one,
            "progress": progress if good_one else "none", "good_fraction": good,
            "suggestion": suggestion, "confidence": "low", "verdict": verdict}


def route(action, suggestion="slower"):
    return {"reason": "so it is", "action": action, "suggestion": suggestion, "estimated_steps": 0}


def run(folder, *replies, task="solve the maze", fail=(), score=None, method=c.CollabVR, **config):
    """A run folder as the command line and the benchmark leave it; unfinished if the models end."""
    models = c.RecordedModels(painter(fail), script(*replies), folder)
    models.facts = {"image": "maze.png", "settings": {"N_max": 3, "vlm": "script-1"}}
    if score is not None:
        models.facts["score"] = score
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    try:
        models.save(method(models, config).run(I0, task))
    except c.Problem:
        pass
    models.lock.release()
    return folder


def shown(folder):
    """Its page, as HTML."""
    return page(runs.load_run(folder))


def two_steps(folder, **options):
    """Rejected at 75 %, corrected and accepted; then a second step."""
    return run(folder, plan("go right", 2), check("reject", 0.75, "keep it whole", "it fell apart"),
               check(progress="partial"), plan("go down"), check(), **options)


class Page(html.parser.HTMLParser):
    """What a page holds: its elements as (name, attributes), and its text without the raw parts."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.words, self.raw = [], [], False
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.raw = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.raw = False

    def handle_data(self, data):
        self.words += [data] * (not self.raw)

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


# ------------------------------------------------------------------------------
# A run's page


def test_page_shows_video_attempts_and_verdicts(tmp_path):
    """The video, every attempt as a clip, and what was said of it."""
    found = Page(shown(two_steps(tmp_path / "run")))
    assert [x["aria-label"] for x in found.all("video")] == [
        "Final video", "Attempt 1, rejected", "Attempt 2, accepted", "Attempt 1, accepted"]
    assert all(x["src"].startswith("data:video/mp4;base64,") for x in found.all("video"))
    assert [x["alt"] for x in found.all("img")] == ["Input"] + ["Last frame"] * 3
    assert [(x["width"], x.get("x")) for x in found.all("rect")][:2] == [
        ("75.000000%", None), ("100%", "75.000000%")]
    for words in ("solve the maze", "complete The models call the task done.", "Step 2",
                  "it fell apart", "keep it whole", "1,234 tokens in, 56 tokens out, script-1",
                  "right for 1.5 of 2 s (75%)", "vgm seconds 5", "clips 3", "regenerations 1",
                  "VLM calls 5", "seed 1", "N max 3", "planner 2 calls"):
        assert words in found.text, words


def test_every_correction_is_marked(tmp_path):
    """What evolve appended stands out, each correction on its own."""
    run(tmp_path, plan("go right"), check("reject", 0.2, "more to the right"),
        check("reject", 0.4, ""), check())
    source = shown(tmp_path)
    assert ("go right<ins> Correction: more to the right</ins><ins> Correction: as planned</ins>"
            in source)
    assert source.count("<ins>") == 3


def test_repeated_correction_is_shown_once(tmp_path):
    """A verifier that says the same again and again does not fill the page."""
    rejects = [check("reject", 0.2, "slower")] * 2 + [check("reject", 0.2, "redder")]
    run(tmp_path, plan("go"), *rejects, check(), M=4)
    prompts = re.findall(r"<dt>prompt</dt><dd><span>(.*?)</span></dd>", shown(tmp_path))
    assert len(prompts) == 4
    assert prompts[2] == "go<ins> Correction: slower</ins><span class=\"small\"> (2 times)</span>"
    last = Page(prompts[3]).text
    assert last == "go Correction: slower (2 times) Correction: redder"


def test_regen_is_shown_whole(tmp_path, monkeypatch):
    """As the verifier saw it: the new frames behind the good part."""
    encoded = []
    mp4 = c.mp4
    run(tmp_path, plan("go right"), check("reject", 0.5, "left"), check("reject", 0.25, "up"),
        route("regen"), check(), M=2)

    def recorded(clip):
        encoded.append(clip)
        return mp4(clip)

    monkeypatch.setattr(c, "mp4", recorded)
    text = Page(shown(tmp_path)).text
    assert [x.seconds for x in encoded] == [2, 2, 3]  # half of attempt 1 came before it
    assert "Its first 1 s are those of attempt 1." in text
    assert "regen: the good part is kept, the rest generated again" in text
    assert "Correction: slower" in text


def test_fallback_is_not_called_verified(tmp_path):
    run(tmp_path, plan("go"), check("reject", 0.5), route("fallback", "all at once"), M=1)
    text = Page(shown(tmp_path)).text
    assert f"fallback {runs.STATUS['fallback'].meaning}" in text
    assert "Attempt 2 not verified" in text and "without an accept: step 1" in text


class Pick(c.Reply):
    reason: str
    best: int


class Picked(c.CollabVR):
    """A method of somebody's own: two clips, and a role that chooses one."""

    def run(self, I0, q):
        I0 = self.models.begin(I0, q)
        clips = [self.models.generate(I0, q, 1, seed=seed) for seed in (1, 2)]
        reply = self.models.ask("picker", "Pick one.", clips, Pick)
        return c.Result(clips[reply.best - 1], "unverified", [1])


def test_another_method_is_shown_with_its_roles(tmp_path):
    run(tmp_path, {"reason": "the second one", "best": 2}, method=Picked)
    found = Page(shown(tmp_path))
    assert f"not verified {runs.STATUS['unverified'].meaning}" in found.text
    assert [x["aria-label"] for x in found.all("video")] == [
        "Final video", "Attempt 1, not verified", "Attempt 2, not verified"]
    assert "picker reason the second one best 2" in found.text


@pytest.mark.parametrize("replies, options, words", [
    ([plan("go"), check(progress="partial")], {"N_max": 1}, "step limit"),
    ([plan("go"), check("reject", 0.1)],
     {"N_max": 1, "M": 1, "on_exhausted": "replan"}, "nothing accepted"),
])
def test_status_says_no_more_than_it_is(tmp_path, replies, options, words):
    found = Page(shown(run(tmp_path, *replies, **options)))
    assert words in found.text and "call the task done" not in found.text


def walk(maze, others, folder):
    """The page of a finished run on a maze: its circle goes to the goal, but in other frames."""
    frames = world.film(maze, world.shortest_path(maze.open, maze.start, maze.goal), 17)
    for t, frame in others.items():
        frames[t] = frame
    models = c.RecordedModels(lambda *given: c.Clip(frames, 8), script(), folder)
    models.facts = {"settings": {"vlm": vlm.MODEL}}
    method = Once(models, c.Config(seconds_first=2))
    models.save(method.run(world.draw(maze), "go"))
    models.lock.release()
    return Page(shown(folder)).text


class Once(c.CollabVR):
    def run(self, I0, q):
        I0 = self.models.begin(I0, q)
        return c.Result(self.models.generate(I0, q, 2), "complete", [])


def test_unsolved_maze_says_why(tmp_path):
    """'complete', 100 % of the way and not solved: the circle was gone for a while."""
    maze = world.make(6, 3, np.random.default_rng([2026, 5]))
    nothing = world.draw(replace(maze, look=replace(maze.look, circle=maze.look.floor)))
    assert "By rule: solved, 100 % of the way." in walk(maze, {}, tmp_path / "a")
    gone = {t: nothing for t in (5, 6, 7)}
    text = walk(maze, gone, tmp_path / "b")
    assert "By rule: not solved, 100 % of the way: no circle in frames 5-7 of 17." in text
    far = {t: world.draw(maze) for t in range(9, 17)}
    text = walk(maze, far, tmp_path / "c")
    assert "By rule: not solved, 0 % of the way: " in text and "the circle jumped" in text
    assert "column" in text.partition("the circle jumped")[2]
    assert "By rule" not in Page(shown(two_steps(tmp_path / "d"))).text


def test_rule_reads_the_maze_from_the_picture(tmp_path):
    """It says the same as with the maze that was drawn."""
    for seed in range(3):
        maze = world.make(4 + 2 * seed, 1 + seed, np.random.default_rng(seed))
        path = world.shortest_path(maze.open, maze.start, maze.goal)
        frames = world.film(maze, path[: 1 + len(path) // (1 + seed % 2)], 17)
        assert rule.verdict(frames, rule.maze_of(frames[0])) == rule.verdict(frames, maze)


def test_everything_written_by_others_is_escaped(tmp_path):
    def go(folder, words):
        def said(reply):
            free = {"verdict", "progress", "confidence", "action"}
            return {k: words if isinstance(v, str) and k not in free else v
                    for k, v in reply.items()}

        return run(folder, said(plan()), words, said(check("reject", 0.3)), said(route("regen")),
                   said(check()), M=1, fail=[1], task=words, score=0.5)

    folder = go(tmp_path / "a" / "<b> 'x' & \"y\"", NASTY)
    calm = go(tmp_path / "calm", "words")
    source = shown(folder)
    names = [x for x, _ in Page(source).elements]
    assert names == [x for x, _ in Page(shown(calm)).elements]
    assert not any("onerror" in attributes for _, attributes in Page(source).elements)
    assert Page(source).text.count(" ".join(NASTY.split())) > 10
    assert re.search(r"generator failed after \S+ s, seed 0: RuntimeError", Page(source).text)
    listing = Page(pages.write(tmp_path / "a").read_text())
    assert [x for x, _ in listing.elements].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in listing.elements)
    link = "report/%3Cb%3E%20%27x%27%20%26%20%22y%22"
    assert listing.all("a")[0]["href"] == f"{link}.html"
    assert listing.all("img")[0]["src"] == f"{link}.jpg"


def test_no_page_can_reach_a_network(tmp_path):
    """The policy forbids it, and nothing asks for it; only a page's own script runs."""
    two_steps(tmp_path / "one")
    listing = pages.write(tmp_path)
    for file in (listing, tmp_path / "report" / "one.html"):
        found = Page(file.read_text())
        policy = next(x["content"] for x in found.all("meta") if "http-equiv" in x)
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        sources = [x[k] for _, x in found.elements for k in ("src", "href", "poster") if x.get(k)]
        assert sources and all(re.match(r"data:|report/one\.(html|jpg)$|\.\./report\.html$", x)
                               for x in sources)
        assert not any(k.startswith("on") or k == "style" for _, x in found.elements for k in x)


def test_unfinished_run_is_shown_as_far_as_it_got(tmp_path):
    """Also with a line torn by a power cut."""
    two_steps(tmp_path)
    lines = (tmp_path / "calls.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("trace.json", "video.mp4"):
        (tmp_path / name).unlink()
    (tmp_path / "calls.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    found = Page(shown(tmp_path))
    assert "unfinished No result yet" in found.text and "Final video" not in found.text
    assert [x["aria-label"] for x in found.all("video")] == ["Attempt 1, rejected",
                                                            "Attempt 2, not verified"]
    (tmp_path / "clips" / "002.mkv").unlink()
    assert "The clip clips/002.mkv is missing" in shown(tmp_path)


@pytest.mark.parametrize("replies, fail, words", [
    ([plan()], (1, 2), "failed The last call failed; the same command tries it again. vgm: Run"),
    (["no"] * 3, (), "again. planner: "),
    ([c.Problem("no such host")], (), "no call was answered yet The same command"),
])
def test_run_without_any_clip_says_what_failed(tmp_path, replies, fail, words):
    found = Page(shown(run(tmp_path, *replies, fail=fail)))
    assert words in found.text and "clips 0" in found.text
    assert not found.all("video") and [x["alt"] for x in found.all("img")] == ["Input"]


def test_finished_run_is_its_trace(tmp_path):
    """And not what an earlier start left in the journal."""
    two_steps(tmp_path)
    journal = tmp_path / "calls.jsonl"
    journal.write_text('{"t": 1, "role": "planner", "fault": "unused"}\n' + journal.read_text())
    assert "unused" not in shown(tmp_path)
    start = json.loads((tmp_path / "start.json").read_text())
    (tmp_path / "start.json").write_text(json.dumps(start | {"settings": {"N_max": 9}}))
    assert "A later start with other settings is unfinished." in shown(tmp_path)


def test_clips_shrink_and_the_video_stays_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(markup, "SMALL", 256)
    large = np.zeros((3, 480, 832, 3), np.uint8)
    assert markup.fitted(large[0]).size == (512, 295)
    assert markup.fitted(large[0, :96, :96]).size == (288, 288)
    folder = two_steps(tmp_path)
    first = Page(shown(folder)).all("video")[0]["src"]
    assert first == markup.data("video/mp4", (folder / "video.mp4").read_bytes())


# ------------------------------------------------------------------------------
# A folder of runs


def test_index_has_row_thumbnail_and_page_of_each_run(tmp_path):
    two_steps(tmp_path / "G-1" / "good", score=0.9)
    run(tmp_path / "G-1" / "bad", plan(), fail=(1, 2))
    (tmp_path / "G-2").mkdir()
    (tmp_path / "G-2" / "start.json").write_text("{")
    found = Page(pages.write(tmp_path).read_text())
    assert "Runs: 3 (1 failed, 1 complete, 1 unreadable)" in found.text
    links = [x.get("href") for x in found.all("a")]
    assert links == ["report/G-1/bad.html", "report/G-1/good.html", None]
    thumbnails = [tmp_path / x["src"] for x in found.all("img")]
    sizes = [Image.open(x).size for x in thumbnails]
    assert sizes == [(108, 72), (5 * 108, 72)]  # the input picture, four frames
    assert "Score" in found.text and "0.9" in found.text
    back = Page((tmp_path / "report" / "G-1" / "good.html").read_text()).all("a")
    assert [x["href"] for x in back] == ["../../report.html"]
    cells = [x["data-value"] for x in found.all("td")]
    assert cells == ["G-1/bad", "7", "0", "1", "", "G-1/good", "0", "5.0", "5", "0.9",
                     "G-2", "8", "0", "0", ""]


def test_only_the_pages_of_changed_runs_are_made_anew(tmp_path):
    two_steps(tmp_path / "one")
    two_steps(tmp_path / "two")
    pages.write(tmp_path)
    made = {x: tmp_path / "report" / f"{x}.html" for x in ("one", "two")}
    for file in made.values():
        file.write_text(file.read_text() + "as it was")
    (tmp_path / "two" / "clips" / "001.mkv").unlink()
    pages.write(tmp_path)
    assert made["one"].read_text().endswith("as it was")
    assert "The clip clips/001.mkv is missing" in made["two"].read_text()


def test_freshness_is_that_of_what_was_read(tmp_path, monkeypatch):
    """A run that ends while its page is written is 'complete' the next time, whatever the clock
    says."""
    folder = two_steps(tmp_path / "one")
    trace = (folder / "trace.json").read_bytes()
    (folder / "trace.json").unlink()
    load_run = runs.load_run

    def ends_now(folder):
        found = load_run(folder)
        (folder / "trace.json").write_bytes(trace)
        os.utime(folder / "trace.json", (1e9, 1e9))  # a clock that is wrong
        return found

    monkeypatch.setattr(common, "load_run", ends_now)
    assert "unfinished" in pages.write(tmp_path).read_text()
    monkeypatch.setattr(common, "load_run", load_run)
    pages.write(tmp_path)
    assert "call the task done" in (tmp_path / "report" / "one.html").read_text()


def test_index_of_many_runs_hides_all_but_one_page(tmp_path, monkeypatch):
    rows = [index.Row(f"run-{i}", runs.Run(tmp_path, "complete", [], [], {"task": "go " * 400}))
            for i in range(450)]
    source = index.listing("many", rows)
    lines = Page(source).all("tr")[1:]
    assert ["hidden" in x for x in lines] == [False] * 200 + [True] * 250
    assert len(source) / 450 < 1200  # bytes a row: a long task is cut
    assert not Page(index.listing("few", rows[:200])).all("nav")


# ------------------------------------------------------------------------------
# Folders of strangers: nothing outside of them is shown


@pytest.fixture
def secret(tmp_path):
    """What lies outside of a run folder: a picture, clips of both kinds, a text."""
    folder = tmp_path / "secret"
    folder.mkdir()
    clip = c.Clip(np.full((9, 32, 48, 3), 137, np.uint8), 8.0)
    Image.fromarray(clip.frames[0]).save(folder / "picture.png")
    (folder / "clip.mkv").write_bytes(c.lossless(clip))
    (folder / "video.mp4").write_bytes(c.mp4(clip))
    (folder / "text").write_text("a secret text")
    return folder


@pytest.fixture
def foreign(tmp_path):
    """A run folder with one clip, which the tests change."""
    return run(tmp_path / "runs" / "x", plan(), check())


def with_clip(folder, name):
    """The trace names another file as its clip."""
    trace = json.loads((folder / "trace.json").read_text())
    clip = next(x for x in trace["calls"] if "clip" in x)
    clip["clip"] = name
    (folder / "trace.json").write_text(json.dumps(trace))


@pytest.mark.parametrize("name", ["../../secret/clip.mkv", "clips/../../../secret/clip.mkv",
                                  "{secret}/clip.mkv", "clips/001.mkv\0", "clips", ""])
def test_clip_outside_of_the_folder_is_not_shown(foreign, secret, name):
    with_clip(foreign, name.format(secret=secret))
    found = Page(shown(foreign))
    assert [x["aria-label"] for x in found.all("video")] == ["Final video"]


@pytest.mark.parametrize("list_of_files", [
    "ffconcat version 1.0\nfile link.mkv\n", "ffconcat version 1.0\nfile {secret}/clip.mkv\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nlink.mkv\n#EXT-X-ENDLIST\n"])
@pytest.mark.parametrize("name", ["clips/001.mkv", "video.mp4"])
def test_playlist_as_a_clip_is_not_followed(foreign, secret, name, list_of_files, monkeypatch):
    """A player of any format would open what the list names."""
    monkeypatch.chdir(foreign / "clips")
    (foreign / "clips" / "link.mkv").symlink_to(secret / "clip.mkv")
    (foreign / name).write_text(list_of_files.format(secret=secret))
    found = runs.load_run(foreign)
    if name == "video.mp4":
        with pytest.raises(c.Problem, match="is no MP4"):
            found.frames()
    else:
        assert found.clip(next(x for x in found.calls if x.clip)) is None


@pytest.mark.parametrize("name, target", [
    ("input.png", "picture.png"), ("video.mp4", "video.mp4"), ("video.mp4", "text"),
    ("clips/001.mkv", "clip.mkv"), ("clips", ""), ("trace.json", "text"), ("start.json", "text"),
    ("calls.jsonl", "text")])
def test_link_out_of_the_folder_is_not_followed(foreign, secret, name, target):
    """The page says so, and the index shows nothing of it either."""
    (secret / "001.mkv").write_bytes((secret / "clip.mkv").read_bytes())
    path = foreign / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(secret / target)
    source = shown(foreign)
    assert "leads out of the folder" in source or "outside of the folder" in source
    listing = pages.write(foreign.parent)
    made = [x.read_bytes() for x in foreign.parent.rglob("*.html")]
    assert len(made) == 2 and "x.html" in listing.read_text()
    for content in (source.encode(), *made):
        assert b"a secret text" not in content
        for file in secret.iterdir():
            assert base64.b64encode(file.read_bytes()) not in content
    if name in ("input.png", "video.mp4"):
        strip = np.array(Image.open(foreign.parent / "report" / "x.jpg")).astype(int)
        assert (abs(strip - 137) > 10).any(-1).mean() > 0.95  # no frame of the secret's colour


def test_picture_of_another_format_is_not_opened(foreign):
    """Pillow starts a program for some of them."""
    (foreign / "input.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(c.Problem, match="is no PNG"):
        runs.load_run(foreign).picture()


@pytest.mark.parametrize("place", ["report", "report/sub", "index"])
def test_nothing_is_written_through_a_linked_folder(foreign, secret, place, capsys):
    """Nor is anything deleted there: a run without pictures has no thumbnail."""
    root = foreign.parent
    for name in ("x", "sub/y"):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "calls.jsonl").write_text("")
    (secret / "y.jpg").touch()
    before = sorted(secret.iterdir())
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(secret)
    out = root / ("index.html" if place == "index" else "report.html")
    assert report.main([str(root), "--out", str(out)]) == (0 if place == "report/sub" else 2)
    assert sorted(secret.iterdir()) == before
    said = out.read_text() if out.exists() else capsys.readouterr().err
    assert f"{root / place} is a link" in said


def test_a_page_that_is_a_link_is_replaced(foreign, secret):
    """In place of an index, of a page that it leads to, and of a run's own page."""
    root = foreign.parent
    pages.write(root)
    for file in (root / "report.html", root / "report" / "x.html", foreign / "report.html"):
        file.unlink(missing_ok=True)
        file.symlink_to(secret / "text")
    pages.write(root)
    pages.write(foreign)
    assert (secret / "text").read_text() == "a secret text"
    assert not [page for page in root.rglob("*.html") if page.is_symlink()]


def test_no_page_that_came_along_is_kept_elsewhere(foreign, tmp_path):
    """One with the right mark may hold anything. Beside its index it counts as made."""
    pages.write(foreign.parent)
    file = foreign.parent / "report" / "x.html"
    file.write_text(file.read_text() + "a strange page")
    pages.write(foreign.parent)
    assert "a strange page" in file.read_text()
    pages.write(foreign.parent, tmp_path / "new.html")
    assert "a strange page" not in (tmp_path / "new" / "x.html").read_text()


@pytest.mark.parametrize("change", [
    {"task": None}, {"task": 7}, {"score": "best"}, {"score": None}, {"score": float("nan")},
    {"score": [1]}])
def test_facts_of_a_wrong_kind_make_one_row_unreadable(foreign, change):
    trace = json.loads((foreign / "trace.json").read_text())
    (foreign / "trace.json").write_text(json.dumps(trace | change))
    assert "Runs: 1 (1 unreadable)" in pages.write(foreign.parent).read_text()


def test_negative_seconds_and_odd_words_are_shown_as_they_are(foreign):
    trace = json.loads((foreign / "trace.json").read_text())
    for call in trace["calls"]:
        call["wall_seconds"] = -3
        call["seconds"] = call.get("seconds") and -1e308
    trace["status"] = "\x1b[31m<b>\ud800"
    (foreign / "trace.json").write_text(json.dumps(trace))
    for file in (pages.write(foreign), pages.write(foreign.parent)):
        assert "&lt;b&gt;" in file.read_text()


def test_control_characters_of_a_folder_are_not_printed(tmp_path, capsys):
    """Neither where the page is, nor what is wrong."""
    folder = run(tmp_path / "a\x1b[31m\u202e", plan(), check())
    assert report.main([str(folder)]) == 0
    assert report.main([f"{folder}\x07"]) == 2
    out, err = capsys.readouterr()
    assert "a\ufffd[31m\ufffd" in out and (out + err).replace("\n", "").isprintable()


# ------------------------------------------------------------------------------
# The command


def test_command_prints_where_the_page_is(tmp_path, capsys):
    two_steps(tmp_path / "run")
    assert report.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    assert report.main([str(tmp_path), "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x" / "run.html").exists()


def test_bad_input_gets_one_sentence(tmp_path, capsys):
    two_steps(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calls.jsonl").write_text("[1]\n")
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "start.json").write_text('{"settings": 3}')
    for bad in (["nowhere"], [str(tmp_path / "empty")], [str(tmp_path / "other")],
                [str(tmp_path / "third")], [str(tmp_path), "--out", str(tmp_path / "x.txt")],
                [str(tmp_path), "--out", str(tmp_path / "no" / "x.html")]):
        capsys.readouterr()
        assert report.main(bad) == 2, bad
        said = capsys.readouterr()
        assert not said.out and re.fullmatch(re.escape(cli.program()) + r": .*\n", said.err)


def test_interruption_ends_with_130_and_a_sentence(tmp_path):
    """Of the whole program, while it writes pages. SIGINT is one of test_common's."""
    for i in range(40):
        shutil.copytree(tmp_path / "0", tmp_path / str(i)) if i else two_steps(tmp_path / "0")
    program = subprocess.Popen([sys.executable, "-m", "examples.report", str(tmp_path)],
                               stderr=subprocess.PIPE, text=True, cwd=ROOT)
    end = time.monotonic() + 30
    while not list(tmp_path.glob("report/*.html")) and time.monotonic() < end:
        time.sleep(0.02)
    program.terminate()
    _, err = program.communicate(timeout=30)
    assert program.returncode == 130
    assert err == "python -m examples.report: Interrupted. The same command goes on from here.\n"
    assert not list(tmp_path.glob("report/.*"))  # nothing half-written


# ------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium. Skips, and says what is missing, where there is none."""
    chromium, driver = (shutil.which(x) for x in ("chromium", "chromedriver"))
    if not importlib.util.find_spec("selenium"):
        pytest.skip("selenium is missing: pip install -r examples/requirements.txt")
    if not chromium or not driver:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def look(browser, file, width=1000, height=1100, dark=False):
    """Opens a file as on such a screen."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.get(Path(file).resolve().as_uri())
    for _ in range(100):
        if browser.execute_script(
                "return [...document.querySelectorAll('video')].every((x) => x.readyState > 2)"):
            break
        time.sleep(0.1)
    time.sleep(0.1)  # the page is painted


def complaints(browser):
    return [x["message"] for x in browser.get_log("browser")
            if x["level"] in ("SEVERE", "WARNING")]


def shoot(browser, path):
    browser.save_screenshot(str(path))
    return np.array(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    two_steps(folder / "b-dear", score=0.25)
    run(folder / "a-failed", plan(), fail=(1, 2), task=NASTY + "x" * 300)
    run(folder / "c-cheap", plan(), check(), score=0.5)
    return pages.write(folder)


def test_browser_plays_clips_and_nothing_goes_wrong(browser, results):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    look(browser, results.with_suffix("") / "b-dear.html")
    clips = browser.find_elements(By.TAG_NAME, "video")
    assert len(clips) == 4
    assert [round(x.get_property("duration")) for x in clips] == [3, 2, 2, 1]
    play = browser.find_elements(By.CSS_SELECTOR, ".bar button")[2]  # with the keyboard
    assert play.get_attribute("aria-label") == "Play Attempt 1, rejected"
    play.send_keys(Keys.SPACE)
    end = time.monotonic() + 20
    while not (at := clips[1].get_property("currentTime")) > 0.3 and time.monotonic() < end:
        time.sleep(0.1)
    assert at > 0.3 and clips[1].get_property("error") is None
    assert complaints(browser) == []
    browser.execute_script("document.body.append(new Image()); "
                           "document.body.lastChild.src = 'http://127.0.0.1:9/x.png'")
    time.sleep(0.5)
    assert "Content Security Policy" in complaints(browser)[0]  # what it forbids is not sent


def test_browser_has_controls_below_a_clip(browser, results):
    """They cover no part of it, and a key goes one frame on."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    look(browser, results.with_suffix("") / "b-dear.html", width=360, height=780)
    clip = browser.find_elements(By.TAG_NAME, "video")[1]
    bar = browser.find_elements(By.CLASS_NAME, "bar")[1]
    assert clip.get_attribute("controls") is None
    assert bar.rect["y"] >= clip.rect["y"] + clip.rect["height"]
    assert bar.rect["height"] >= 30 and bar.rect["width"] <= clip.rect["width"]
    slider = bar.find_element(By.TAG_NAME, "input")
    slider.send_keys(Keys.RIGHT, Keys.RIGHT, Keys.RIGHT)
    time.sleep(0.2)
    assert abs(clip.get_property("currentTime") - 3 / 8) < 0.01
    assert complaints(browser) == []


@pytest.mark.parametrize("name", ["report.html", "report/b-dear.html", "report/a-failed.html"])
def test_browser_has_both_schemes_and_fits_a_phone(browser, results, name, tmp_path):
    file = results.parent / name
    look(browser, file)
    light = shoot(browser, tmp_path / "light.png")
    look(browser, file, dark=True)
    dark = shoot(browser, tmp_path / "dark.png")
    assert light[-1, 2].mean() > 200 and dark[-1, 2].mean() < 60
    look(browser, file, width=360, height=780)
    shoot(browser, tmp_path / "phone.png")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert browser.execute_script("return innerWidth") == 360
    assert complaints(browser) == []


def names(browser):
    """Of the runs that an index shows."""
    return browser.execute_script(
        "return [...document.querySelectorAll('td:first-child a')].map((x) => x.innerText)")


def test_browser_sorts_by_keyboard_and_links_lead_back(browser, results):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.switch_to.active_element.text

    look(browser, results)
    assert names(browser) == ["a-failed", "b-dear", "c-cheap"]
    reached = [press(Keys.TAB) for _ in range(5)]
    assert reached == ["Run", "Status", "VGM seconds", "VLM calls", "Score"]
    press(Keys.ENTER)
    assert names(browser) == ["a-failed", "b-dear", "c-cheap"]
    press(Keys.ENTER)
    assert names(browser) == ["c-cheap", "b-dear", "a-failed"]
    heads = browser.find_elements(By.TAG_NAME, "th")
    assert [x.get_attribute("aria-sort") for x in heads] == ["none"] * 4 + ["descending"]
    heads[1].find_element(By.TAG_NAME, "button").click()
    assert names(browser) == ["c-cheap", "b-dear", "a-failed"]
    heads[2].find_element(By.TAG_NAME, "button").click()
    assert names(browser) == ["a-failed", "c-cheap", "b-dear"]
    loaded = "return [...document.images].map((x) => x.naturalWidth)"
    assert browser.execute_script(loaded) == [108, 540, 540]
    browser.find_element(By.LINK_TEXT, "b-dear").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "b-dear"
    browser.find_element(By.LINK_TEXT, "All runs").click()
    assert len(names(browser)) == 3
    assert complaints(browser) == []


def test_browser_sorts_all_runs_and_shows_200(browser, tmp_path):
    """Its place is in the address, so that the way back from a run leads there."""
    from selenium.webdriver.common.by import By
    rows = [index.Row(f"run-{i}", runs.Run(tmp_path, "complete", [], [], {"score": i % 7}))
            for i in range(450)]
    (tmp_path / "report.html").write_text(index.listing("many", rows))
    look(browser, tmp_path / "report.html")
    assert names(browser) == [f"run-{i}" for i in range(200)]
    previous, following = browser.find_elements(By.CSS_SELECTOR, "nav button")[:2]
    assert not previous.is_enabled()
    following.click()
    following.click()
    assert names(browser) == [f"run-{i}" for i in range(400, 450)] and not following.is_enabled()
    assert "page 3 of 3" in browser.find_element(By.TAG_NAME, "nav").text
    score = browser.find_elements(By.CSS_SELECTOR, "th button")[4]
    score.click()
    score.click()
    assert names(browser)[:2] == ["run-6", "run-13"] and len(names(browser)) == 200
    following.click()
    last = names(browser)
    browser.get("about:blank")
    browser.back()
    assert names(browser) == last
    assert complaints(browser) == []
