"""Tests of examples/supervisor with scripted models."""

import ast
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import collabvr as c
from examples import runs, stats
from examples.report import markup
from examples.supervisor import __main__ as supervisor
from examples.supervisor import points, questions, score
from examples.supervisor.label import write_page
from examples.tests.test_report import browser  # noqa: F401  a fixture

PLAN = {
    "observation": "", "remaining_goal": "", "task_complete": False, "instruction": "Go.",
    "target_state": "there", "estimated_steps_remaining": 1,
}
VERDICT = {
    "reason": "", "action_executed": True, "progress": "complete", "good_fraction": 1.0,
    "suggestion": "", "confidence": "high", "verdict": "accept",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Many calls that do not wait for the disk, and clips that are not enlarged."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(markup, "SMALL", 16)


class Recorder(c.OpenAIVLM):
    """A VLM that keeps what it is asked. It wants two steps, and of the picture 1 another attempt.
    `others`: what it says instead, by the number of the question."""

    def __call__(self, instructions, parts, schema):
        self.asked.append((instructions, parts))
        told = "\n".join(x for x in parts if isinstance(x, str))
        answer = {k: v for k, v in (PLAN | VERDICT).items() if k in schema.model_fields}
        if "estimated_steps_remaining" in answer and "Step: 1" in told:
            answer["estimated_steps_remaining"] = 2
        if "verdict" in answer and "Task prompt: Do 1." in told and "Correction" not in told:
            answer |= {"verdict": "reject", "suggestion": "Go left."}
        other = self.others.get(len(self.asked), answer)
        if isinstance(other, Exception):
            raise other
        return other if isinstance(other, str) else json.dumps(other)


def recorder(**others):
    made = Recorder(timeout=0.001)
    made.asked, made.others = [], others
    return made


def painter(frame, prompt, seconds, seed):
    frames = np.repeat(frame[None], 1 + int(4 * seconds), 0)
    frames[1:, :8] = 37 * seed % 256
    return c.Clip(frames, 4)


def run(folder, number, vlm, kind=c.CollabVR, **facts):
    config = c.Config(seconds_first=2, seconds_next=1)
    models = c.RecordedModels(painter, vlm, folder)
    models.facts = {"settings": asdict(config) | asdict(vlm), **facts}
    I0 = np.full((32, 48, 3), 5 * number, np.uint8)
    models.save(kind(models, config).run(I0, f"Do {number}."))
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


def refused(capsys, *argv, **own):
    capsys.readouterr()
    assert supervisor.main([*map(str, argv)], **own) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "Traceback" not in said.err and not said.out
    return said.err


def scored(capsys, *argv):
    """The rows that score prints, by table and name."""
    capsys.readouterr()
    assert supervisor.main(["score", *map(str, argv)]) == 0
    tables = capsys.readouterr().out.replace(" %", "%").split("\n\n")
    return {x.splitlines()[0]: {y.split("  ")[0]: y.split()[1:] for y in x.splitlines()[2:]}
            for x in tables}


# ------------------------------------------------------------------------------
# export and ask


def test_every_question_is_kept_word_for_word(exported):
    """And its pictures bit for bit."""
    folder, first = exported
    found = points.read_objects(folder / "points.jsonl")
    kept = [(x["instructions"], [points.restore(folder, y) for y in x["parts"]]) for x in found]
    assert len(kept) == len(first.asked) == 3 * 4 + 1
    assert [c.digest(x) for x in kept] == [c.digest(x) for x in first.asked]
    assert [x["role"] for x in found[4:9]] == ["planner", "verifier", "verifier", "planner",
                                              "verifier"]
    said = points.read_objects(folder / "replies" / "run.jsonl")
    assert [x["reply"]["verdict"] for x in said if "verdict" in x["reply"]].count("reject") == 1
    assert len({x["id"] for x in said}) == 13


def test_run_that_cannot_be_replayed_is_refused(exported, tmp_path, capsys):
    """And not exported wrongly."""
    trace, to = tmp_path / "out" / "runs" / "s1" / "trace.json", ["--out", tmp_path / "q"]
    whole = trace.read_text()
    trace.write_text(whole.replace("Go.", "Stop."))  # no longer what the verifier was asked
    assert "cannot be replayed" in refused(capsys, "export", tmp_path / "out", *to)
    trace.write_text(json.dumps(json.loads(whole) | {"settings": {}}))
    assert "holds no run with its settings" in refused(capsys, "export", tmp_path / "out", *to)
    trace.write_text(whole)
    next((trace.parent / "clips").iterdir()).unlink()
    assert "cannot be replayed" in refused(capsys, "export", tmp_path / "out", *to)
    (tmp_path / "data").mkdir()
    assert "holds no finished run" in refused(capsys, "export", tmp_path / "data", *to)


class Mine(c.CollabVR):
    """A method of somebody's own: another prompt."""

    def evolve(self, a_t, d):
        return super().evolve(a_t, d) + " Now!"


def test_method_of_ones_own_is_given_to_main(tmp_path, capsys):
    run(tmp_path / "out", 1, recorder(), Mine, method="Mine")
    argv = ["export", tmp_path / "out", "--out", tmp_path / "p"]
    assert "is a run of the method 'Mine'" in refused(capsys, *argv)
    assert supervisor.main([*map(str, argv)], method=Mine) == 0
    assert len(points.read_objects(tmp_path / "p" / "points.jsonl")) == 5


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
    assert len(other.asked) == 13 + 1
    del other.asked[5]
    assert [c.digest(*x) for x in other.asked] == [c.digest(*x) for x in first.asked]
    same = points.read_objects(folder / "replies" / "other.jsonl")
    assert same == points.read_objects(folder / "replies" / "run.jsonl")


def test_unusable_reply_does_not_end_it(exported, capsys):
    """The next question is asked, and the point counts as wrong."""
    folder, _ = exported
    mute = recorder()
    mute.others = dict.fromkeys([2, 3, 4], "Accept.")
    assert questions.Ask(folder, mute, "mute").run() == 0
    one, second, *_ = points.read_objects(folder / "replies" / "mute.jsonl")
    assert "reply" in one and second.keys() == {"id", "fault"}
    runs.write_lines(folder / "l.jsonl", [{"id": second["id"], "verdict": "accept"}])
    table = scored(capsys, folder / "l.jsonl", folder / "replies" / "mute.jsonl")
    assert table["mute: by label, what it said"]["accept"] == ["0", "0", "1"]
    assert table["D2, verdicts"]["mute"][:2] == ["1", "0.0%"]  # unusable is not right


# ------------------------------------------------------------------------------
# score


def plan(left, done=False):
    return {"task_complete": done, "estimated_steps_remaining": left}


def verdict(word, suggestion=""):
    return {"verdict": word, "suggestion": suggestion}


def test_measures_are_those_worked_out_by_hand(tmp_path, capsys):
    said = [plan(1), plan(3), plan(1), plan(7, done=True), *[verdict("accept")] * 3,
            verdict("reject", "a"), verdict("accept"), verdict("reject", "b"),
            verdict("reject", "c"), verdict("reject", "d")]
    truth = [{"steps": 1}, {"steps": 2}, {"steps": 3}, {"steps": 0},
             *[{"verdict": "accept"}] * 4, *[{"verdict": "reject"}] * 4]
    runs.write_lines(tmp_path / "vlm.jsonl", [
        {"id": f"x{i}", "reply": x} for i, x in enumerate(said)])
    ratings = [("x7", "a", 1), ("x9", "b", 2), ("x10", "c", 3), ("x11", "d", 3),
               ("x11", "another VLM's", 1)]
    runs.write_lines(tmp_path / "labels.jsonl", [
        *({"id": f"x{i}"} | x for i, x in enumerate(truth)),
        *({"id": a, "suggestion": b, "rating": r} for a, b, r in ratings)])
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


def test_intervals_are_wilsons_and_a_bootstraps():
    assert stats.percent([True] * 40, 1) == "100.0 % (91-100)"
    assert stats.percent([True, False] * 50, 1) == "50.0 % (40-60)"
    assert stats.percent([]) == stats.estimate(np.mean, []) == "-"
    low, high = stats.estimate(np.mean, [1, 2, 3] * 30).split("(")[1][:-1].split("-")
    assert 1.8 <= float(low) < 2 < float(high) <= 2.2


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
def test_faulty_label_gets_one_sentence(line, said, tmp_path, capsys):
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    runs.write_lines(tmp_path / "vlm.jsonl", [{"id": "a", "reply": verdict("accept")}])
    told = refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "vlm.jsonl")
    assert said in told and "labels.jsonl" in told


def test_what_are_no_replies_is_refused(tmp_path, capsys):
    runs.write_lines(tmp_path / "labels.jsonl", [{"id": "a", "verdict": "accept"}])
    said = refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "labels.jsonl")
    assert "holds no replies: a has neither reply nor fault" in said
    assert "at least one file" in refused(capsys, "score", tmp_path / "labels.jsonl")


def test_vlm_that_sees_other_frames_is_told_so(exported, capsys):
    folder, vlm = exported
    assert questions.Ask(folder, vlm, "same").run() == 0 and not capsys.readouterr().err
    vlm.verify_fps = 8.0
    assert questions.Ask(folder, vlm, "other").run() == 0
    assert "'verify_fps': 1.0}, now {" in capsys.readouterr().err


def test_help_is_about_its_command(capsys):
    assert supervisor.main(["ask", "--help"]) == 0
    said = capsys.readouterr().out
    assert "Puts the questions to a VLM" in said and "plans, checks and repairs" not in said


def test_missing_files_get_one_sentence(tmp_path, capsys):
    assert "labels.jsonl" in refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "x")
    assert "points.jsonl" in refused(capsys, "ask", tmp_path)
    capsys.readouterr()
    assert supervisor.main(["judge"]) == 2
    assert "judge" in capsys.readouterr().err


# ------------------------------------------------------------------------------
# Files of strangers: nothing of them is run, nothing outside of the folder is read


def test_name_in_a_trace_is_never_imported(exported, tmp_path, capsys):
    """A trace that names code beside it is refused, and the code does not run."""
    folder = tmp_path / "out" / "runs" / "s1"
    code = folder / "clips" / "x.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: run = print\n")
    trace = json.loads((folder / "trace.json").read_text())
    for name in (f"{code}:X", "clips/x.py:X", "clips.x", "os", ["collabvr"], None):
        (folder / "trace.json").write_text(json.dumps(trace | {"method": name}))
        assert refused(capsys, "export", tmp_path / "out", "--out", tmp_path / "q")
    assert not (tmp_path / "ran").exists()


PARTS = [
    {"picture": "../../secret.png"}, {"picture": "{outside}/secret.png"}, {"picture": "link.png"},
    {"clip": "../../secret.mkv", "fps": 4}, {"clip": "link.mkv", "fps": 4},
    {"clip": "list.mkv", "fps": 4}, {"picture": "script.png"}, {"picture": 3}, 7, {},
]


def test_media_outside_of_the_folder_is_not_read(exported, tmp_path):
    """Whatever points.jsonl names: neither shown on the page nor sent to a VLM."""
    folder, _ = exported
    clip = c.Clip(np.full((3, 32, 48, 3), 137, np.uint8), 4.0)
    (tmp_path / "secret.png").write_bytes(points.png(clip.frames[0]))
    (tmp_path / "secret.mkv").write_bytes(c.lossless(clip))
    (folder / "media" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "media" / "link.mkv").symlink_to(tmp_path / "secret.mkv")
    (folder / "media" / "list.mkv").write_text("ffconcat version 1.0\nfile link.mkv\n")
    (folder / "media" / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    found = points.read_objects(folder / "points.jsonl")[:1]
    vlm = recorder()
    for part in json.loads(json.dumps(PARTS).replace("{outside}", str(tmp_path))):
        found[0]["parts"] = [part]
        runs.write_lines(folder / "points.jsonl", found)
        with pytest.raises(c.Problem, match="points.jsonl names"):
            questions.Ask(folder, vlm, "other").run()
        with pytest.raises(c.Problem, match="points.jsonl names"):
            write_page(folder, found)
    assert not vlm.asked


def test_replies_outside_of_the_folder_are_not_shown(exported, tmp_path):
    folder, vlm = exported
    secret = {"id": "runs/s0/01-verifier", "reply": VERDICT | {
        "verdict": "reject", "suggestion": "a secret text"}}
    runs.write_lines(tmp_path / "secret.jsonl", [secret])
    (folder / "replies" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert questions.Ask(folder, vlm, "same").run() == 0
    page = (folder / "label.html").read_text()
    assert "Go left." in page and "a secret text" not in page


FORBIDDEN = {"pickle", "marshal", "shelve", "runpy", "imp", "importlib", "eval", "exec", "compile",
             "__import__", "subprocess", "system", "popen", "dill", "joblib"}


def test_what_reads_data_reaches_no_importer_and_no_pickle():
    """Of all code that reads folders of others. `needed` imports packages, by names in the code."""
    root = Path(__file__).resolve().parents[1]
    files = [root / "runs.py", *root.glob("report/*.py"), *root.glob("supervisor/*.py"),
             root / "bench" / "summary.py", root / "bench" / "samples.py"]
    assert len(files) > 12
    for file in files:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "needed":
                node.body.clear()  # the one importer, looked at below
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [x.name.split(".")[0] for x in node.names]
                if file.name == "runs.py" and names == ["importlib"]:
                    names = []
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0], *[x.name for x in node.names]]
            elif isinstance(node, ast.Name):
                names = [node.id]
            elif isinstance(node, ast.Attribute) and not (
                    isinstance(node.value, ast.Name) and node.value.id == "re"):
                names = [node.attr]
            assert not FORBIDDEN & set(names), f"{file.name}, line {node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "needed":
                assert isinstance(node.args[0], ast.Constant), f"{file.name}, line {node.lineno}"
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "load":
                assert getattr(node.func.value, "id", "") == "json", f"{file.name} {node.lineno}"


# ------------------------------------------------------------------------------
# The page for labels


def test_page_saves_labels_that_score_reads(
        exported, browser, tmp_path, capsys):  # noqa: F811
    from selenium.webdriver.common.by import By
    folder, _ = exported
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {
        "behavior": "allow", "downloadPath": str(tmp_path)})
    browser.get((folder / "label.html").as_uri())
    for summary in browser.find_elements(By.TAG_NAME, "summary"):
        summary.click()
    sets = browser.find_elements(By.TAG_NAME, "fieldset")
    assert len(sets) == 13 + 1  # one suggestion is to be rated
    for x in sets:
        labels = x.find_elements(By.TAG_NAME, "label")
        labels[1 if len(labels) > 3 else -1].click()  # one step; reject; 3
    browser.refresh()  # as after a crash of the browser
    assert "14 of 14 labelled" in browser.find_element(By.TAG_NAME, "nav").text
    browser.find_element(By.CSS_SELECTOR, "nav button").click()
    for _ in range(100):
        time.sleep(0 if (tmp_path / "labels.jsonl").exists() else 0.1)
    assert not [x for x in browser.get_log("browser") if x["level"] == "SEVERE"]
    found = scored(capsys, tmp_path / "labels.jsonl", folder / "replies" / "run.jsonl")
    assert found["D1, plan depth"]["run"][:2] == ["6", "50.0%"]  # of two steps it said 2, then 1
    assert found["run: by label, what it said"]["reject"] == ["6", "1", "0"]
    assert found["D3, suggestions (1 to 3)"]["run"][0] == "1"


