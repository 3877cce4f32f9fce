"""Tests of examples/report.py: its pages say what happened, and show nothing from outside; in a
real browser they play, sort and fit a phone."""

import contextlib
import io
import json
import re
import shutil
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import collabvr as c
from examples import cli, html, report, runs
from examples.tests.conftest import accept, go, plan, reject, route

NASTY = """<script>alert("1")</script> & 'x' <img src=x onerror=alert(2)> </style></title>"""


def run(folder, *replies, facts=(), **options):
    """A run folder as the programs leave it; unfinished if the replies end too early."""
    with contextlib.suppress(c.Problem):
        go(*replies, folder=folder, **options)
    return edit(folder, **dict(facts))


def two_steps(folder, facts=()):
    """Rejected at 75 %, corrected and accepted; then a second step."""
    return run(folder, plan("go right", 2), reject(0.75, "keep it whole", "it fell apart"),
               accept("partial"), plan("go down"), accept(), facts=facts)


def edit(folder, **facts):
    """Other entries in a run's trace."""
    trace = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps(trace | facts))
    return folder


class Page(HTMLParser):
    """What a page holds: elements as (name, attributes), and its text without scripts."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.words = [], []
        self.feed(source)
        self.text = " ".join(" ".join(self.words).split())
        self.videos = [x["aria-label"] for x in self.all("video")]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag not in ("style", "script"):
            self.words.append(data)

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def shown(folder):
    """The page of a run or of a folder of runs."""
    return Page(report.write(folder).read_text())


# ------------------------------------------------------------------------------
# A run's page


def test_page_shows_video_attempts_and_verdicts(tmp_path):
    """The video, every attempt as a clip, and what was said of it."""
    facts = {"by_rule": "not solved", "category": "maze", "score": 0.123}
    found = shown(two_steps(tmp_path, facts))
    assert found.videos == [
        "Final video", "Attempt 1, rejected", "Attempt 2, accepted", "Attempt 1, accepted"]
    video = (tmp_path / "video.mp4").read_bytes()
    assert found.all("video")[0]["src"] == html.data("video/mp4", video)
    assert [x["alt"] for x in found.all("img")] == ["Input"] + ["Last frame"] * 3
    bars = [(x["width"], x.get("x")) for x in found.all("rect")]
    assert bars[:2] == [("75.000000%", None), ("100%", "75.000000%")]
    for words in ("solve it", "complete The models call the task done.", "Step 2",
                  "it fell apart", "keep it whole", "100 tokens in, 10 tokens out, script-1",
                  "right for 1.5 of 2 s (75%)", "vgm seconds 5", "clips 3", "regenerations 1",
                  "By rule: not solved.", "method collabvr category maze score 0.12",
                  "seed 1", "N max 3", "calls {planner: 2, vgm: 3, verifier: 3}"):
        assert words in found.text, words


def test_prompts_are_diffed_and_a_regen_is_whole(tmp_path, monkeypatch):
    """Each correction is marked. A regen stands behind the good part of the best attempt."""
    seconds = []
    run(tmp_path, plan("go right"), reject(0.5, "left"), reject(0.25, "up"), reject(0.5, "down"),
        route("regen"), accept())
    player = html.player
    monkeypatch.setattr(html, "player", lambda *x: seconds.append(x[0].seconds) or player(*x))
    source = report.write(tmp_path).read_text()
    assert seconds == [2, 2, 2, 3]
    assert "before it comes the good part of attempt 3" in source
    assert ("go right<ins> Correction: left</ins><ins> Correction: up</ins>"
            "<ins> Correction: slower</ins><") in source


def test_another_method_is_shown_with_its_roles(tmp_path):
    """Of a clip that was checked several times, most of the replies decide."""
    run(tmp_path, plan(), accept())
    calls = runs.read_json(tmp_path / "trace.json")["calls"]
    no = {"role": "verifier", "t": 1, "reply": reject()}
    pick = {"role": "picker", "t": 1, "reply": {"reason": "the second one", "best": 2}}
    found = shown(edit(tmp_path, calls=[*calls, no, no, pick], status="voted"))
    assert "solve it voted" in found.text and "picker reason the second one best 2" in found.text
    assert found.videos == ["Final video", "Attempt 1, rejected"]


def test_status_says_no_more_than_it_is(tmp_path):
    text = shown(run(tmp_path, plan(), reject(), route("fallback"), M=1)).text
    assert (f"fallback {runs.STATUS['fallback'].meaning} In the video without an accept: step 1."
            in text)
    assert "Attempt 2 not verified" in text


def test_unfinished_run_is_shown_as_far_as_it_got(tmp_path):
    run(tmp_path, plan(), reject())
    found = shown(tmp_path)
    assert "Final video" not in found.text
    assert found.videos == ["Attempt 1, rejected", "Attempt 2, not verified"]
    next((tmp_path / "clips").glob("*attempt2*")).unlink()
    assert re.search("The clip clips/step1-attempt2-.*mkv is missing", shown(tmp_path).text)


def test_everything_written_by_others_is_escaped(tmp_path):
    """Each page has the same elements whatever the words are."""
    def made(folder, words):
        def said(reply):
            free = {"verdict", "progress", "confidence", "action"}
            return {k: words if isinstance(v, str) and k not in free else v
                    for k, v in reply.items()}

        facts = dict.fromkeys(("by_rule", "method", "category", "status"), words)
        return run(folder, said(plan()), words, said(reject()), said(route("regen")),
                   said(accept()), M=1, q=words, fail=[1],
                   facts={**facts, "settings": {words: words + "\x1b[31m\ud800"}})

    nasty = made(tmp_path / "a" / "<b> 'x' & \"y\"", NASTY)
    calm = made(tmp_path / "b" / "calm", "words")
    for bad, good in ((nasty, calm), (nasty.parent, calm.parent)):
        found = shown(bad)
        assert [x for x, _ in found.elements] == [x for x, _ in shown(good).elements]
        assert not any("onerror" in attributes for _, attributes in found.elements)
        assert " ".join(NASTY.split()) in found.text
    assert found.all("a")[0]["href"] == "%3Cb%3E%20%27x%27%20%26%20%22y%22/report.html"


def test_no_page_can_reach_a_network(tmp_path):
    """The policy forbids it, and nothing asks for it; only a page's own script runs."""
    two_steps(tmp_path / "one")
    for file in (report.write(tmp_path), tmp_path / "one" / "report.html"):
        found = Page(file.read_text())
        policy = next(x["content"] for x in found.all("meta") if "http-equiv" in x)
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        sources = [x[k] for _, x in found.elements for k in ("src", "href", "poster") if x.get(k)]
        assert sources and all(re.match(r"data:|one/report\.html$", x) for x in sources)
        assert not any(k.startswith("on") or k == "style" for _, x in found.elements for k in x)


# ------------------------------------------------------------------------------
# A folder of runs


def test_index_has_a_row_and_a_page_of_each_run(tmp_path):
    """Columns of facts are those that a run has."""
    two_steps(tmp_path / "G-1" / "good", {"score": 0.9})
    run(tmp_path / "G-1" / "bad", plan(), fail=[1, 2])
    (tmp_path / "G-2").mkdir()
    (tmp_path / "G-2" / "trace.json").write_text("{")
    found = shown(tmp_path)
    assert "Runs: 3 (1 failed, 1 complete, 1 unreadable)" in found.text
    assert "Run Status Method Score VGM seconds VLM calls" in found.text
    links = [x.get("href") for x in found.all("a")]
    assert links == ["G-1/bad/report.html", "G-1/good/report.html", None]
    assert "it fell apart" in (tmp_path / links[1]).read_text()
    cells = [x["data-value"] for x in found.all("td")]
    assert cells == ["G-1/bad", "failed", "collabvr", "", "0", "1",
                     "G-1/good", "complete", "collabvr", "0.9", "5.0", "5",
                     "G-2", "unreadable", "", "", "0", "0"]


# ------------------------------------------------------------------------------
# Folders of strangers: nothing outside of them is shown or written


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
    return run(tmp_path / "runs" / "x", plan(), accept())


@pytest.mark.parametrize("name", ["../../secret/clip.mkv", "{secret}/clip.mkv", "list.mkv"])
def test_clip_outside_of_the_folder_is_not_shown(foreign, secret, name, monkeypatch):
    """Nor one that a playlist names, which a player of any format would open."""
    monkeypatch.chdir(secret)
    (foreign / "list.mkv").write_text("ffconcat version 1.0\nfile clip.mkv\n")
    calls = json.loads((foreign / "trace.json").read_text())["calls"]
    next(call for call in calls if "clip" in call)["clip"] = name.format(secret=secret)
    assert shown(edit(foreign, calls=calls)).videos == ["Final video"]


@pytest.mark.parametrize("name, target, lost", [
    ("input.png", "picture.png", "Input"), ("video.mp4", "video.mp4", "Final video"),
    ("clips", "", '"Attempt 1, accepted"'), ("trace.json", "text", "a secret text")])
def test_link_out_of_the_folder_is_not_followed(foreign, secret, name, target, lost):
    clip = next((foreign / "clips").iterdir())
    (secret / "clip.mkv").rename(secret / clip.name)
    path = foreign / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(secret / target)
    assert lost not in report.write(foreign).read_text()


def test_a_page_that_is_a_link_is_replaced(foreign, secret):
    """An index, a run's page, and a film."""
    root = foreign.parent
    for file in (root / "report.html", foreign / "report.html", foreign / "film.webp"):
        file.symlink_to(secret / "text")
    report.write(root)
    assert report.main([str(foreign), "--film"]) == 0
    assert (secret / "text").read_text() == "a secret text"
    assert not (foreign / "report.html").is_symlink()


def test_run_behind_a_link_gets_no_page(foreign, secret):
    shutil.copy(foreign / "trace.json", secret)
    (foreign.parent / "link").symlink_to(secret)
    assert "Runs: 1 " in shown(foreign.parent).text
    assert not (secret / "report.html").exists()


@pytest.mark.parametrize("change", [
    {"task": 7}, {"score": "best"}, {"score": float("nan")}, {"settings": 3}, {"calls": [1]}])
def test_facts_of_a_wrong_kind_make_a_row_unreadable(foreign, change):
    edit(foreign, **change)
    assert "Runs: 1 (1 unreadable)" in shown(foreign.parent).text


# ------------------------------------------------------------------------------
# The command, and the film


def test_command_prints_the_page_or_one_sentence(tmp_path, capsys):
    """The page of a run that failed says what failed."""
    assert report.main([str(run(tmp_path / "failed", plan(), fail=[1, 2]))]) == 0
    file = tmp_path / "failed" / "report.html"
    assert capsys.readouterr().out.strip() == str(file)
    assert "tries it again. vgm: RuntimeError: out of memory" in Page(file.read_text()).text
    (tmp_path / "empty").mkdir()
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "trace.json").write_text("[1]")
    for bad in (["nowhere"], ["empty"], ["list"], ["failed", "--film"]):
        assert report.main([str(tmp_path / bad[0]), *bad[1:]]) == 2, bad
        assert re.fullmatch(re.escape(cli.program()) + r": .*\n", capsys.readouterr().err)


def test_film_shows_reject_correction_and_video(tmp_path):
    """Captions have the colour of what they say. The last frame of each scene stays."""
    assert report.main([str(two_steps(tmp_path)), "--film"]) == 0
    times = [0, 0, 0, 0]  # ms with a caption in red, amber, green; or else
    with Image.open(tmp_path / "film.webp") as film:
        for i in range(film.n_frames):
            film.seek(i)
            caption = np.array(film.convert("RGB")).astype(int)[270:]
            ink = [(abs(caption - tone).max(-1) < 40).sum() > 100
                   for tone in ((195, 54, 43), (138, 90, 0), (26, 127, 75))]
            times[[*ink, True].index(True)] += film.info["duration"]
    assert times == [2000 + 2500, 250 + 2500, 2000 + 2500, 3000 + 2500]
    assert (tmp_path / "film.webp").stat().st_size < 1_000_000


# ------------------------------------------------------------------------------
# In a browser


def wait(browser, condition):
    from selenium.webdriver.support.wait import WebDriverWait
    WebDriverWait(browser, 20).until(lambda x: x.execute_script(f"return {condition}"))


def look(browser, file, width=1000, height=1100, scheme="light"):
    """Opens a file as on such a screen, and returns what it shows."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
        "features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(file.as_uri())
    wait(browser, "[...document.querySelectorAll('video')].every((x) => x.readyState > 2)")
    time.sleep(0.2)  # the page is painted
    png = io.BytesIO(browser.get_screenshot_as_png())
    return np.array(Image.open(png).convert("RGB")).astype(int)


def complaints(browser):
    return [x["message"] for x in browser.get_log("browser") if x["level"] != "INFO"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    two_steps(folder / "b-dear", {"score": 0.25})
    run(folder / "a-failed", plan(), fail=[1, 2], q=NASTY + "x" * 300)
    run(folder / "c-cheap", plan(), accept(), facts={"score": 0.5})
    report.write(folder)
    return folder


@pytest.mark.slow
def test_browser_plays_clips_and_sends_nothing(browser, results):
    """Controls stand below a clip, and the slider goes one frame on."""
    look(browser, results / "b-dear" / "report.html", width=360, height=780)
    clip = browser.find_elements("css selector", "video")[1]
    bar = browser.find_elements("css selector", ".bar")[1]
    assert bar.rect["y"] >= clip.rect["y"] + clip.rect["height"]
    assert bar.rect["width"] <= clip.rect["width"]
    play, slider, _ = bar.find_elements("css selector", "button, input")
    slider.send_keys("\ue014" * 3)  # the right arrow key
    assert abs(clip.get_property("currentTime") - 3 / 4) < 0.01
    play.click()
    wait(browser, "document.querySelectorAll('video')[1].currentTime > 1")
    assert complaints(browser) == []
    browser.execute_script("document.body.append(new Image()); "
                           "document.body.lastChild.src = 'http://127.0.0.1:9/x.png'")
    time.sleep(0.5)
    assert "Content Security Policy" in complaints(browser)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [".", "b-dear", "a-failed"])
def test_browser_has_both_schemes_and_fits_a_phone(browser, results, name):
    file = results / name / "report.html"
    assert look(browser, file)[-1, 2].mean() > 200
    assert look(browser, file, scheme="dark")[-1, 2].mean() < 60
    look(browser, file, width=360, height=780)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
    assert complaints(browser) == []


@pytest.mark.slow
def test_browser_sorts_and_follows_links(browser, results):
    look(browser, results / "report.html")
    buttons = browser.find_elements("css selector", "th button")
    heads = ["Run", "Status", "Method", "Score", "VGM seconds", "VLM calls"]
    assert [x.text for x in buttons] == heads
    for i, order in ((0, "abc"), (0, "cba"), (3, "abc"), (5, "acb"), (5, "bca"), (1, "bca")):
        buttons[i].click()
        links = browser.find_elements("css selector", "td a")
        assert [x.text[0] for x in links] == list(order)
    links[0].click()
    assert browser.find_element("css selector", "h1").text == "b-dear"
    assert complaints(browser) == []


@pytest.mark.slow
@pytest.mark.parametrize("height, width", [(832, 480), (96, 96)])
def test_browser_shows_the_colours_of_a_clip(browser, tmp_path, height, width):
    """The MP4 names its colours. Players guess them otherwise, by the number of rows."""
    colour = np.array([220, 30, 30])
    clip = c.Clip(np.full((9, height, width, 3), colour, np.uint8), 8)
    (tmp_path / "x.mp4").write_bytes(c.mp4(clip))
    (tmp_path / "x.html").write_text('<body style="margin: 0"><video src="x.mp4"></video>')
    seen = look(browser, tmp_path / "x.html")[8 : height - 8, 8 : width - 8]
    assert abs(seen - colour).max() <= 3
