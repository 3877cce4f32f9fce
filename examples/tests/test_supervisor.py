"""Tests of examples/supervisor with scripted models."""

import json
import shutil
import time
from dataclasses import asdict

import numpy as np
import pytest

import collabvr as c
from examples import runs
from examples.supervisor import __main__ as supervisor
from examples.supervisor import points, questions, score
from examples.supervisor.label import write_page
from examples.tests.conftest import I0, Painter, accept, plan, reject


class Recorder(c.OpenAIVLM):
    """A VLM that keeps what it is asked. It wants two steps, and for task 1 another attempt.
    `others`: what it says instead, by the number of the question."""

    def __call__(self, instructions, parts, schema):
        self.asked.append((instructions, parts))
        told = "\n".join(part for part in parts if isinstance(part, str))
        if schema is not c.Verification:
            reply = plan(left=2 if "Step: 1" in told else 1)
        elif "Task prompt: Do 1." in told and "Correction" not in told:
            reply = reject(suggestion="Go left.")
        else:
            reply = accept()
        reply = self.others.get(len(self.asked), reply)
        if isinstance(reply, Exception):
            raise reply
        return json.dumps(reply)


def recorder():
    made = Recorder(timeout=0.001)
    made.asked, made.others = [], {}
    return made


def run(folder, number, vlm, kind=c.CollabVR, **facts):
    config = c.Config(seconds_first=2, seconds_next=1)
    models = c.RecordedModels(Painter(), vlm, folder)
    models.facts = {"settings": asdict(config) | asdict(vlm), **facts}
    models.save(kind(models, config).run(I0 - number, f"Do {number}."))
    models.lock.release()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three samples were run, the second with a reject, and their points exported."""
    folder, vlm = tmp_path_factory.mktemp("made"), recorder()
    for number in range(3):
        run(folder / "out" / "runs" / f"s{number}", number, vlm)
    assert supervisor.main(["export", str(folder / "out"), "--out", str(folder / "p")]) == 0
    return folder, vlm


@pytest.fixture
def exported(made, tmp_path):
    """A copy of them: the folder of points, and a VLM that was asked what theirs was."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    vlm = recorder()
    vlm.asked = list(made[1].asked)
    return tmp_path / "p", vlm


def export(*arguments, **own):
    return supervisor.main(["export", *map(str, arguments)], **own)


def refused(capsys, *argv, **own):
    """What is said on stderr, in one line."""
    capsys.readouterr()
    assert supervisor.main([*map(str, argv)], **own) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and not said.out
    return said.err


def scored(capsys, *argv):
    """The rows that score prints, by table and name."""
    capsys.readouterr()
    assert supervisor.main(["score", *map(str, argv)]) == 0
    found = {}
    for table in capsys.readouterr().out.replace(" %", "%").split("\n\n"):
        title, _, *rows = table.splitlines()
        found[title] = {row.split("  ")[0]: row.split()[1:] for row in rows}
    return found


# ------------------------------------------------------------------------------
# export


def test_every_question_is_kept_word_for_word(exported):
    """And its pictures bit for bit."""
    folder, first = exported
    found = points.read_objects(folder / "points.jsonl")
    kept = []
    for point in found:
        parts = [points.restore(folder, part) for part in point["parts"]]
        kept.append((point["instructions"], parts))
    assert len(kept) == len(first.asked) == 3 * 4 + 1
    assert [c.digest(question) for question in kept] == [
        c.digest(question) for question in first.asked]
    assert "".join(point["role"][0] for point in found) == "pvpv" + "pvvpv" + "pvpv"
    said = points.read_objects(folder / "replies" / "run.jsonl")
    verdicts = [line["reply"].get("verdict") for line in said]
    assert verdicts.count("reject") == 1 and len({line["id"] for line in said}) == 13


def edit(trace, **facts):
    trace.write_text(json.dumps(json.loads(trace.read_text()) | facts))


@pytest.mark.parametrize("spoil, said", [
    (lambda run: edit(run / "trace.json", method="Mine"), "the method 'Mine' is not known"),
    (lambda run: edit(run / "trace.json", status=None), "the run is not over"),
    (lambda run: edit(run / "trace.json", task="Do 7."), "the planner was asked something else"),
    (lambda run: edit(run / "trace.json", settings={}), "cannot be replayed"),
    (lambda run: next((run / "clips").iterdir()).unlink(), ".mkv cannot be read"),
    (lambda run: (run / "trace.json").write_text("{"), "holds no run of collabvr.py"),
])
def test_a_run_that_cannot_be_replayed_is_left_out(spoil, said, exported, tmp_path, capsys):
    """It is named, and the others are written."""
    spoil(tmp_path / "out" / "runs" / "s1")
    capsys.readouterr()
    assert export(tmp_path / "out", "--out", tmp_path / "q") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Left out" in line]
    assert "runs/s1" in line and said in line
    assert len(points.read_objects(tmp_path / "q" / "points.jsonl")) == 8


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert "holds no finished run" in refused(capsys, "export", tmp_path, "--out", tmp_path / "q")


class Mine(c.CollabVR):
    """A method of somebody's own."""

    def evolve(self, a_t, advice):
        return super().evolve(a_t, advice) + " Now!"


def test_a_method_of_ones_own_is_given_to_main(tmp_path):
    run(tmp_path / "out", 1, recorder(), Mine, method="Mine")
    assert export(tmp_path / "out", "--out", tmp_path / "p", method=Mine) == 0
    assert len(points.read_objects(tmp_path / "p" / "points.jsonl")) == 5


# ------------------------------------------------------------------------------
# ask


def test_another_vlm_gets_the_same_questions(exported):
    """And is asked nothing twice, also after its endpoint gave up."""
    folder, first = exported
    other = recorder()
    other.others = {6: c.Problem("The endpoint gave up.")}
    with pytest.raises(c.Problem, match="gave up"):
        questions.Ask(folder, other, "other").run()
    assert not (folder / "replies" / "other.jsonl").exists()
    other.others = {}
    assert questions.Ask(folder, other, "other").run() == 0
    del other.asked[5]
    assert [c.digest(*asked) for asked in other.asked] == [
        c.digest(*asked) for asked in first.asked]
    same = points.read_objects(folder / "replies" / "other.jsonl")
    assert same == points.read_objects(folder / "replies" / "run.jsonl")


def test_an_unusable_reply_counts_as_wrong(exported, capsys):
    """And the next question is asked."""
    folder, _ = exported
    mute = recorder()
    mute.others = dict.fromkeys([2, 3, 4], "Accept.")
    assert questions.Ask(folder, mute, "mute").run() == 0
    one, second, *_ = points.read_objects(folder / "replies" / "mute.jsonl")
    assert "reply" in one and second.keys() == {"id", "fault"}
    runs.write_lines(folder / "l.jsonl", [{"id": second["id"], "verdict": "accept"}])
    found = scored(capsys, folder / "l.jsonl", folder / "replies" / "mute.jsonl")
    assert found["mute: by label, what it said"]["accept"] == ["0", "0", "1"]
    assert found["D2, verdicts"]["mute"][:2] == ["1", "0.0%"]


def test_a_vlm_that_sees_other_frames_is_told_so(exported, capsys):
    folder, vlm = exported
    assert questions.Ask(folder, vlm, "same").run() == 0
    assert "clips" not in capsys.readouterr().err
    vlm.verify_fps = 8.0
    assert questions.Ask(folder, vlm, "same").run() == 0, "the old replies are of other settings"
    assert "'verify_fps': 1.0}, now {" in capsys.readouterr().err


@pytest.mark.parametrize("variable, value", [
    ("GEMINI_API_KEY", ""), ("ALL_PROXY", "socks5://localhost:1")])
def test_a_vlm_that_cannot_be_asked_is_one_sentence(
        variable, value, exported, monkeypatch, capsys):
    """No client is made before one is needed."""
    monkeypatch.setenv("GEMINI_API_KEY", "k")
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setenv(variable, value)
    assert supervisor.main(["ask", "--help"]) == 0
    assert "Puts the questions to a VLM" in capsys.readouterr().out
    assert supervisor.main(["ask", str(exported[0])]) == 2
    assert variable in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------
# score


def depth(left, done=False):
    return {"task_complete": done, "estimated_steps_remaining": left}


def verdict(word, suggestion=""):
    return {"verdict": word, "suggestion": suggestion}


def test_measures_are_those_worked_out_by_hand(tmp_path, capsys):
    said = [
        depth(1), depth(3), depth(1), depth(7, done=True), *[verdict("accept")] * 3,
        verdict("reject", "a"), verdict("accept"), verdict("reject", "b"),
        verdict("reject", "c"), verdict("reject", "d"),
    ]
    truth = [
        {"steps": 1}, {"steps": 2}, {"steps": 3}, {"steps": 0},
        *[{"verdict": "accept"}] * 4, *[{"verdict": "reject"}] * 4,
    ]
    labels = [{"id": f"x{i}", **label} for i, label in enumerate(truth)]
    for id, text, rating in [("x7", "a", 1), ("x9", "b", 2), ("x10", "c", 3), ("x11", "d", 3),
                             ("x11", "another VLM's", 1)]:
        labels.append({"id": id, "suggestion": text, "rating": rating})
    runs.write_lines(tmp_path / "labels.jsonl", labels)
    runs.write_lines(tmp_path / "vlm.jsonl", [
        {"id": f"x{i}", "reply": reply} for i, reply in enumerate(said)])
    found = scored(capsys, tmp_path / "labels.jsonl", tmp_path / "vlm.jsonl")
    n, match, _, error, _ = found["D1, plan depth"]["vlm"]
    assert (n, match, error) == ("4", "50.0%", "0.750")  # |3 - 2| + |1 - 3| of four
    n, yes, _, no, _, both, _, kappa, _ = found["D2, verdicts"]["vlm"]
    assert (n, yes, no, both, kappa) == ("8", "75.0%", "75.0%", "75.0%", "0.500")
    assert found["vlm: by label, what it said"] == {
        "accept": ["3", "1", "0"], "reject": ["1", "3", "0"]}
    n, mean, _, two, _, three, _ = found["D3, suggestions (1 to 3)"]["vlm"]
    assert (n, mean, two, three) == ("4", "2.250", "75.0%", "50.0%")
    assert found["D2, verdicts"]["paper: Qwen3.5-9B"][-4:] == ["77.6%", "40.8%", "59.2%", ".304"]


def test_kappa_of_one_kind_is_chance():
    truth, told = np.array(["accept"] * 3), np.array(["accept", "accept", "unusable"])
    assert score.kappa(truth, truth) == 0 and score.kappa(truth, told) == 0
    assert score.kappa(np.array(["accept", "reject"]), np.array(["accept", "reject"])) == 1


@pytest.mark.parametrize("line, said", [
    ('{"verdict": "accept"}', "an id"), ('{"id": "a"}', "beside id a label has steps"),
    ('{"id": "a", "verdict": "maybe"}', "verdict"), ('{"id": "a", "steps": -1}', "steps"),
    ('{"id": "a", "steps": 1, "verdict": "accept"}', "beside id"), ('["a"]', "an id"),
    ('{"id": "a", "rating": 2}', "beside id"), ('{"id": "a", "step": 2}', "step"),
    ('{"id": "a", "suggestion": "x", "rating": 4}', "rating"), ("accept", "line 1"),
    ('{"id": "a", "verdict": "accept"}\n{"id": "a", "verdict": "reject"}', "label already"),
    ('{"id": "elsewhere", "steps": 1}', "no reply to elsewhere"), ("", "holds no labels"),
    ('{"id": "a", "steps": 1}', "a has a label of the other role")])
def test_a_faulty_label_gets_one_sentence(line, said, tmp_path, capsys):
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    runs.write_lines(tmp_path / "vlm.jsonl", [{"id": "a", "reply": verdict("accept")}])
    told = refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "vlm.jsonl")
    assert said in told and "labels.jsonl" in told


def test_what_is_missing_or_no_reply_gets_one_sentence(tmp_path, capsys):
    assert "labels.jsonl" in refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "x")
    assert "points.jsonl" in refused(capsys, "ask", tmp_path)
    runs.write_lines(tmp_path / "labels.jsonl", [{"id": "a", "verdict": "accept"}])
    said = refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "labels.jsonl")
    assert "holds no replies: a has neither reply nor fault" in said
    assert "at least one file" in refused(capsys, "score", tmp_path / "labels.jsonl")


# ------------------------------------------------------------------------------
# The page for labels, and points of strangers: nothing outside of the folder is read


PARTS = [
    {"picture": "../../secret.png"}, {"picture": "{outside}/secret.png"}, {"picture": "link.png"},
    {"clip": "../../secret.mkv", "fps": 4}, {"clip": "list.mkv", "fps": 4},
    {"picture": "script.png"}, {"picture": 3}, 7, {},
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_media_outside_of_the_folder_is_not_read(part, exported, tmp_path):
    """Whatever points.jsonl names: it is neither shown on the page nor sent to a VLM."""
    folder, _ = exported
    clip = next((folder / "media").glob("*.mkv"))
    shutil.copy(next((folder / "media").glob("*.png")), tmp_path / "secret.png")
    shutil.copy(clip, tmp_path / "secret.mkv")
    (folder / "media" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "media" / "list.mkv").write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    (folder / "media" / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    point = points.read_objects(folder / "points.jsonl")[0]
    point["parts"] = [json.loads(json.dumps(part).replace("{outside}", str(tmp_path)))]
    runs.write_lines(folder / "points.jsonl", [point])
    vlm = recorder()
    with pytest.raises(c.Problem, match="points.jsonl names"):
        questions.Ask(folder, vlm, "other").run()
    with pytest.raises(c.Problem, match="points.jsonl names"):
        write_page(folder, [point])
    assert not vlm.asked


def test_replies_outside_of_the_folder_are_not_shown(exported, tmp_path):
    folder, vlm = exported
    secret = {"id": "runs/s0/01-verifier", "reply": reject(suggestion="a secret text")}
    runs.write_lines(tmp_path / "secret.jsonl", [secret])
    (folder / "replies" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert questions.Ask(folder, vlm, "same").run() == 0
    page = (folder / "label.html").read_text()
    assert "Go left." in page and "a secret text" not in page


@pytest.mark.slow
def test_the_page_saves_labels_that_score_reads(exported, browser, tmp_path, capsys):
    from selenium.webdriver.common.by import By

    folder, _ = exported
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {
        "behavior": "allow", "downloadPath": str(tmp_path)})
    browser.get((folder / "label.html").as_uri())
    for summary in browser.find_elements(By.TAG_NAME, "summary"):
        summary.click()
    sets = browser.find_elements(By.TAG_NAME, "fieldset")
    assert len(sets) == 13 + 1  # one suggestion is to be rated
    for fieldset in sets:
        labels = fieldset.find_elements(By.TAG_NAME, "label")
        labels[1 if len(labels) > 3 else -1].click()  # one step; reject; 3
    browser.refresh()  # as after a crash of the browser
    assert "14 of 14 labelled" in browser.find_element(By.TAG_NAME, "nav").text
    browser.find_element(By.CSS_SELECTOR, "nav button").click()
    for _ in range(100):
        time.sleep(0 if (tmp_path / "labels.jsonl").exists() else 0.1)
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    found = scored(capsys, tmp_path / "labels.jsonl", folder / "replies" / "run.jsonl")
    assert found["D1, plan depth"]["run"][:2] == ["6", "50.0%"]  # of two steps it said 2, then 1
    assert found["run: by label, what it said"]["reject"] == ["6", "1", "0"]
    assert found["D3, suggestions (1 to 3)"]["run"][0] == "1"
