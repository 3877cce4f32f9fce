"""Tests of report.py: its pages say what happened, of finished, unfinished and failed runs; and in
a real browser, where there is one, they play, sort and fit a phone."""

import html.parser
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import baselines
import report

import collabvr as c

I0 = np.full((32, 48, 3), 250, np.uint8)
NASTY = """<script>alert("1")</script> & 'quotes' <img src=x onerror=alert(2)> </style></title>"""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Many calls that do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


# ---------------------------------------------------------------------- runs with scripted models


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


def run(folder, *replies, task="solve the maze", fail=(), score=None, **config):
    """A run folder as the command line and the benchmark leave it; unfinished if the models end."""
    models = c.Models(painter(fail), script(*replies), folder)
    facts = {"image": "maze.png", "task": task, "settings": {"N_max": 3, "vlm": "script-1"}}
    (folder / "start.json").write_text(json.dumps(facts))
    Image.fromarray(I0).save(folder / "input.png")
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    try:
        result = c.CollabVR(models, config).run(I0, task)
        c.save(result, models, **facts, **({} if score is None else {"score": score}))
    except c.Problem:
        pass
    finally:
        models.lock.release()
    return folder


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


# ----------------------------------------------------------------------------------- without one


def test_a_page_holds_the_video_every_attempt_as_a_clip_and_what_was_said_of_it(tmp_path):
    page = Page(report.page(two_steps(tmp_path / "run")))
    assert [x["aria-label"] for x in page.all("video")] == [
        "Final video", "Attempt 1, rejected", "Attempt 2, accepted", "Attempt 1, accepted"]
    assert all(x["src"].startswith("data:video/mp4;base64,") for x in page.all("video"))
    assert [x["alt"] for x in page.all("img")] == ["Input"] + ["Last frame"] * 3
    assert [(x["width"], x.get("x")) for x in page.all("rect")][:2] == [
        ("75.000000%", None), ("100%", "75.000000%")]
    for words in ("solve the maze", "complete The models call the task done.", "Step 2",
                  "it fell apart", "keep it whole", "1,234 tokens in, 56 tokens out, script-1",
                  "right for 1.5 of 2 s (75%)", "vgm seconds 5", "clips 3", "regenerations 1",
                  "VLM calls 5", "seed 1", "N max 3"):
        assert words in page.text, words


def test_what_evolve_appended_is_marked_and_each_correction_on_its_own(tmp_path):
    run(tmp_path, plan("go right"), check("reject", 0.2, "more to the right"),
        check("reject", 0.4, ""), check())
    source = report.page(tmp_path)
    assert ("go right<ins> Correction: more to the right</ins><ins> Correction: as planned</ins>"
            in source)
    assert source.count("<ins>") == 3


def test_after_a_regen_the_clip_is_shown_whole_as_the_verifier_saw_it(tmp_path, monkeypatch):
    shown = []
    encode = c.encode_video
    monkeypatch.setattr(c, "encode_video", lambda clip, lossless=False: (
        shown.append(clip), encode(clip, lossless))[1])
    run(tmp_path, plan("go right"), check("reject", 0.5, "left"), check("reject", 0.25, "up"),
        route("regen"), check(), M=2)
    shown.clear()
    text = Page(report.page(tmp_path)).text
    assert [x.seconds for x in shown] == [2, 2, 3]  # half of attempt 1 came before it
    assert "Its first 1 s are those of attempt 1." in text
    assert "regen: the good part is kept, the rest generated again" in text
    assert "Correction: slower" in text


def test_a_fallback_is_called_that_and_not_verified(tmp_path):
    run(tmp_path, plan("go"), check("reject", 0.5), route("fallback", "all at once"), M=1)
    text = Page(report.page(tmp_path)).text
    assert "fallback The router chose one clip for all; nothing verified it." in text
    assert "Attempt 2 not verified" in text and "without an accept: step 1" in text


def test_a_run_of_another_method_is_shown_with_its_own_roles_and_every_clip(tmp_path):
    models = c.Models(painter(), script({"reason": "the second one", "best": 2}), tmp_path)
    c.save(baselines.Pass2(models, c.Config()).run(I0, "solve"), models, task="solve")
    models.lock.release()
    page = Page(report.page(tmp_path))
    assert "not verified The method that made the video verifies nothing." in page.text
    assert [x["aria-label"] for x in page.all("video")] == [
        "Final video", "Attempt 1, not verified", "Attempt 2, not verified"]
    assert "picker reason the second one best 2" in page.text


@pytest.mark.parametrize("replies, options, words", [
    ([plan("go"), check(progress="partial")], {"N_max": 1}, "step limit"),
    ([plan("go"), check("reject", 0.1)],
     {"N_max": 1, "M": 1, "on_exhausted": "replan"}, "nothing accepted"),
])
def test_a_status_is_told_in_words_and_never_as_more_than_it_is(tmp_path, replies, options, words):
    page = Page(report.page(run(tmp_path, *replies, **options)))
    assert words in page.text and "call the task done" not in page.text


def test_everything_that_a_model_or_a_user_wrote_is_escaped(tmp_path):
    def go(folder, words):
        def said(reply):
            free = {"verdict", "progress", "confidence", "action"}
            return {k: words if isinstance(v, str) and k not in free else v
                    for k, v in reply.items()}

        return run(folder, said(plan()), words, said(check("reject", 0.3)), said(route("regen")),
                   said(check()), M=1, fail=[1], task=words, score=0.5)

    folder = go(tmp_path / "a" / "<b> 'x' & \"y\"", NASTY)
    calm = go(tmp_path / "calm", "words")
    source = report.page(folder)
    names = [x for x, _ in Page(source).elements]
    assert names == [x for x, _ in Page(report.page(calm)).elements]
    assert not any("onerror" in attributes for _, attributes in Page(source).elements)
    assert Page(source).text.count(" ".join(NASTY.split())) > 10
    assert re.search(r"generator failed after \S+ s, seed 0: RuntimeError", Page(source).text)
    index = report.write(tmp_path / "a").read_text()
    assert [x for x, _ in Page(index).elements].count("script") == 1
    assert not any("onerror" in attributes for _, attributes in Page(index).elements)
    link = Page(index).all("a")[0]["href"]
    assert link == "report/%3Cb%3E%20%27x%27%20%26%20%22y%22.html"


def test_no_page_can_reach_a_network_and_only_its_own_script_runs(tmp_path):
    two_steps(tmp_path / "one")
    index = report.write(tmp_path)
    for file in (index, tmp_path / "report" / "one.html"):
        page = Page(file.read_text())
        policy = next(x["content"] for x in page.all("meta") if "http-equiv" in x)
        assert "default-src 'none'" in policy and "unsafe" not in policy
        sources = [x[k] for _, x in page.elements for k in ("src", "href", "poster") if x.get(k)]
        assert sources and all(re.match(r"data:|report/one\.html$|\.\./report\.html$", x)
                               for x in sources)
        assert not any(k.startswith("on") or k == "style" for _, x in page.elements for k in x)


def test_an_unfinished_run_is_shown_as_far_as_it_got_also_with_a_torn_line(tmp_path):
    two_steps(tmp_path)
    lines = (tmp_path / "calls.jsonl").read_bytes().splitlines(keepends=True)
    for name in ("trace.json", "video.mp4"):
        (tmp_path / name).unlink()
    (tmp_path / "calls.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    page = Page(report.page(tmp_path))
    assert "unfinished No result yet" in page.text and "Final video" not in page.text
    assert [x["aria-label"] for x in page.all("video")] == ["Attempt 1, rejected",
                                                           "Attempt 2, not verified"]
    (tmp_path / "clips" / "002.mkv").unlink()
    assert "The clip is missing." in report.page(tmp_path)


@pytest.mark.parametrize("replies, fail, words", [
    ([plan()], (1, 2), "failed The last call failed; the same command tries it again. vgm: Run"),
    (["no"] * 3, (), "again. planner: "),
    ([c.Problem("no such host")], (), "unfinished No result yet"),
])
def test_a_run_without_any_clip_says_what_failed(tmp_path, replies, fail, words):
    page = Page(report.page(run(tmp_path, *replies, fail=fail)))
    assert words in page.text and "clips 0" in page.text
    assert not page.all("video") and [x["alt"] for x in page.all("img")] == ["Input"]


def test_a_finished_run_is_its_trace_and_not_what_an_earlier_start_left_in_the_journal(tmp_path):
    two_steps(tmp_path)
    journal = tmp_path / "calls.jsonl"
    journal.write_text('{"t": 1, "role": "planner", "fault": "unused"}\n' + journal.read_text())
    assert "unused" not in report.page(tmp_path)
    start = json.loads((tmp_path / "start.json").read_text())
    (tmp_path / "start.json").write_text(json.dumps(start | {"settings": {"N_max": 9}}))
    assert "A later start with other settings is unfinished." in report.page(tmp_path)


def test_a_results_folder_gets_an_index_with_a_row_a_thumbnail_and_a_page_for_each_run(tmp_path):
    two_steps(tmp_path / "G-1" / "good", score=0.9)
    run(tmp_path / "G-1" / "bad", plan(), fail=(1, 2))
    (tmp_path / "G-2").mkdir()
    (tmp_path / "G-2" / "start.json").write_text("{")
    page = Page(report.write(tmp_path).read_text())
    assert "Runs: 3 (1 failed, 1 complete, 1 unreadable)" in page.text
    links = [x.get("href") for x in page.all("a")]
    assert links == ["report/G-1/bad.html", "report/G-1/good.html", None]
    assert len(page.all("img")) == 2 and "Score" in page.text and "0.9" in page.text
    back = Page((tmp_path / "report" / "G-1" / "good.html").read_text()).all("a")
    assert [x["href"] for x in back] == ["../../report.html"]
    cells = [x["data-value"] for x in page.all("td")]
    assert cells == ["G-1/bad", "6", "0", "1", "", "G-1/good", "0", "5.0", "5", "0.9",
                     "G-2", "7", "0", "0", ""]


def test_a_page_that_is_newer_than_its_run_is_left_as_it_is(tmp_path):
    two_steps(tmp_path / "one")
    report.write(tmp_path)
    page = tmp_path / "report" / "one.html"
    page.write_text("as it was")
    report.write(tmp_path)
    assert page.read_text() == "as it was"
    time.sleep(0.02)
    (tmp_path / "one" / "calls.jsonl").touch()
    report.write(tmp_path)
    assert page.read_text() != "as it was"


def test_clips_are_shown_smaller_than_they_are_and_the_video_is_embedded_as_it_is(tmp_path):
    large = np.zeros((3, 480, 832, 3), np.uint8)
    assert report.fitted(large[0]).size == (512, 295)
    assert report.fitted(large[0, :96, :96]).size == (288, 288)
    folder = two_steps(tmp_path)
    first = Page(report.page(folder)).all("video")[0]["src"]
    assert first == report.data("video/mp4", (folder / "video.mp4").read_bytes())


def test_the_command_says_where_the_page_is_and_refuses_bad_input_in_one_sentence(tmp_path, capsys):
    two_steps(tmp_path / "run")
    report.main([str(tmp_path / "run")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    report.main([str(tmp_path), "--out", str(tmp_path / "x.html")])
    assert (tmp_path / "x" / "run.html").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "calls.jsonl").write_text("[1]\n")
    for bad in (["nowhere"], [str(tmp_path / "empty")], [str(tmp_path / "other")],
                [str(tmp_path), "--out", str(tmp_path / "x.txt")],
                [str(tmp_path), "--out", str(tmp_path / "no" / "x.html")]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            report.main(bad)
        said = capsys.readouterr()
        assert end.value.code == 2 and not said.out
        assert re.fullmatch(r"report\.py: .*\n", said.err)


# ---------------------------------------------------------------------------------- in a browser


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
    time.sleep(0.5)  # the controls fade


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
    return report.write(folder)


def test_in_a_browser_a_clip_plays_from_the_keyboard_and_nothing_goes_wrong(browser, results):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    look(browser, results.with_suffix("") / "b-dear.html")
    clips = browser.find_elements(By.TAG_NAME, "video")
    assert len(clips) == 4
    assert [round(x.get_property("duration")) for x in clips] == [3, 2, 2, 1]
    clips[1].send_keys(Keys.SPACE)
    end = time.monotonic() + 20
    while not (at := clips[1].get_property("currentTime")) > 0.3 and time.monotonic() < end:
        time.sleep(0.1)
    assert at > 0.3 and clips[1].get_property("error") is None
    assert complaints(browser) == []
    browser.execute_script("document.body.append(new Image()); "
                           "document.body.lastChild.src = 'http://127.0.0.1:9/x.png'")
    time.sleep(0.5)
    assert "Content Security Policy" in complaints(browser)[0]  # what it forbids is not sent


@pytest.mark.parametrize("name", ["report.html", "report/b-dear.html", "report/a-failed.html"])
def test_in_a_browser_a_page_has_both_colour_schemes_and_fits_a_phone(
        browser, results, name, tmp_path):
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


def test_in_a_browser_the_index_sorts_by_keyboard_and_its_links_lead_there_and_back(
        browser, results):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    def press(key):
        ActionChains(browser).send_keys(key).perform()
        return browser.switch_to.active_element.text

    def names():
        return [x.text for x in browser.find_elements(By.CSS_SELECTOR, "td:first-child a")]

    look(browser, results)
    assert names() == ["a-failed", "b-dear", "c-cheap"]
    reached = [press(Keys.TAB) for _ in range(5)]
    assert reached == ["Run", "Status", "VGM seconds", "VLM calls", "Score"]
    press(Keys.ENTER)
    assert names() == ["a-failed", "b-dear", "c-cheap"]
    press(Keys.ENTER)
    assert names() == ["c-cheap", "b-dear", "a-failed"]
    heads = browser.find_elements(By.TAG_NAME, "th")
    assert [x.get_attribute("aria-sort") for x in heads] == ["none"] * 4 + ["descending"]
    heads[1].find_element(By.TAG_NAME, "button").click()
    assert names() == ["c-cheap", "b-dear", "a-failed"]
    heads[2].find_element(By.TAG_NAME, "button").click()
    assert names() == ["a-failed", "c-cheap", "b-dear"]
    browser.find_element(By.LINK_TEXT, "b-dear").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "b-dear"
    browser.find_element(By.LINK_TEXT, "All runs").click()
    assert len(names()) == 3
    assert complaints(browser) == []
