"""Tests of supervisor.py and points.py with scripted models; with COLLABVR_SLOW=1 the try on mazes
of maze/readers.py."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "maze"), str(HERE), str(HERE.parent)]

import compare
import points
import readers
import supervisor
import vlm
from test_benchmark import Judge, command, write_jsonl
from test_report import browser  # noqa: F401  a fixture

import collabvr as c


class Recorder(Judge):
    """Keeps what it is asked, and says something else if told so."""

    def __call__(self, instructions, parts, schema):
        self.asked.append((instructions, parts))
        answer = super().__call__(instructions, parts, schema)
        if change := self.others.get(len(self.asked)):
            return change(answer) if callable(change) else {"text": change}
        return answer


def recorder(**others):
    made = Recorder(timeout=0.001)
    made.asked, made.others = [], others
    return made


@pytest.fixture
def exported(tmp_path):
    """Three samples were run, the second with a reject, and their points exported."""
    vlm = recorder()
    assert command(tmp_path, write_jsonl(tmp_path / "data", 3), "out", vlm=vlm).run() == 0
    assert supervisor.main(["export", str(tmp_path / "out"), "--out", str(tmp_path / "p")]) == 0
    return tmp_path / "p", vlm


def refused(capsys, *argv):
    capsys.readouterr()
    assert supervisor.main([*map(str, argv)]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "Traceback" not in said.err and not said.out
    return said.err


def scored(capsys, *argv):
    """The rows that score prints, by table and name."""
    pytest.importorskip("sklearn", reason="pip install -r examples/requirements.txt")
    capsys.readouterr()
    assert supervisor.main(["score", *map(str, argv)]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    return {x.splitlines()[0]: {y.split("  ")[0]: y.split()[1:] for y in x.splitlines()[2:]}
            for x in tables}


# ------------------------------------------------------------------------------- export and ask


def test_every_question_is_kept_word_for_word_and_its_pictures_bit_for_bit(exported):
    folder, first = exported
    found = points.lines(folder / "points.jsonl")
    kept = [(x["instructions"], [points.restore(folder, y) for y in x["parts"]]) for x in found]
    assert len(kept) == len(first.asked) == 3 * 4 + 1
    assert [c.digest(x) for x in kept] == [c.digest(x) for x in first.asked]
    assert [x["role"] for x in found[4:9]] == ["planner", "verifier", "verifier", "planner",
                                              "verifier"]
    said = points.lines(folder / "replies" / "run.jsonl")
    assert [x["reply"]["verdict"] for x in said if "verdict" in x["reply"]].count("reject") == 1
    assert len({x["id"] for x in said}) == 13


def test_a_run_that_cannot_be_replayed_is_refused_and_not_exported_wrongly(
        exported, tmp_path, capsys):
    trace, to = tmp_path / "out" / "runs" / "s1" / "trace.json", ["--out", tmp_path / "q"]
    whole = trace.read_text()
    trace.write_text(whole.replace("Go.", "Stop."))  # no longer what the verifier was asked
    assert "cannot be replayed" in refused(capsys, "export", tmp_path / "out", *to)
    trace.write_text(json.dumps(json.loads(whole) | {"settings": {}}))
    assert "holds no run with its settings" in refused(capsys, "export", tmp_path / "out", *to)
    trace.write_text(whole)
    next((trace.parent / "clips").iterdir()).unlink()
    assert "cannot be replayed" in refused(capsys, "export", tmp_path / "out", *to)
    assert "holds no finished run" in refused(capsys, "export", tmp_path / "data", *to)


def test_another_vlm_gets_the_same_questions_and_is_asked_nothing_twice(exported):
    folder, first = exported
    other = recorder()  # after five answers its endpoint gives up

    def gives_up(answer):
        raise c.Problem("The endpoint gave up.")

    other.others = {6: gives_up}
    with pytest.raises(c.Problem, match="gave up"):
        supervisor.Ask(folder, other, "other").run()
    assert not (folder / "replies" / "other.jsonl").exists()
    other.others = {}
    assert supervisor.Ask(folder, other, "other").run() == 0
    assert len(other.asked) == 13 + 1
    del other.asked[5]
    assert [c.digest(*x) for x in other.asked] == [c.digest(*x) for x in first.asked]
    same = points.lines(folder / "replies" / "other.jsonl")
    assert same == points.lines(folder / "replies" / "run.jsonl")


def test_a_vlm_without_a_usable_reply_goes_on_with_the_next_question(exported, capsys):
    folder, _ = exported
    mute = recorder()
    mute.others = dict.fromkeys([2, 3, 4], "Accept.")
    assert supervisor.Ask(folder, mute, "mute").run() == 0
    one, second, *_ = points.lines(folder / "replies" / "mute.jsonl")
    assert "reply" in one and second.keys() == {"id", "fault"}
    points.write_lines(folder / "l.jsonl", [{"id": second["id"], "verdict": "accept"}])
    table = scored(capsys, folder / "l.jsonl", folder / "replies" / "mute.jsonl")
    assert table["mute: by label, what it said"]["accept"] == ["0", "0", "1"]
    assert table["D2, verdicts"]["mute"][:2] == ["1", "0.0%"]  # unusable is not right


# ---------------------------------------------------------------------------------------- score


def plan(left, done=False):
    return {"task_complete": done, "estimated_steps_remaining": left}


def verdict(word, suggestion=""):
    return {"verdict": word, "suggestion": suggestion}


def test_the_measures_are_those_worked_out_by_hand(tmp_path, capsys):
    said = [plan(1), plan(3), plan(1), plan(7, done=True), *[verdict("accept")] * 3,
            verdict("reject", "a"), verdict("accept"), verdict("reject", "b"),
            verdict("reject", "c"), verdict("reject", "d")]
    truth = [{"steps": 1}, {"steps": 2}, {"steps": 3}, {"steps": 0},
             *[{"verdict": "accept"}] * 4, *[{"verdict": "reject"}] * 4]
    points.write_lines(tmp_path / "vlm.jsonl", [
        {"id": f"x{i}", "reply": x} for i, x in enumerate(said)])
    ratings = [("x7", "a", 1), ("x9", "b", 2), ("x10", "c", 3), ("x11", "d", 3),
               ("x11", "another VLM's", 1)]
    points.write_lines(tmp_path / "labels.jsonl", [
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
    pytest.importorskip("scipy", reason="pip install -r examples/requirements.txt")
    assert supervisor.share([True] * 40) == "100.0% (91-100)"
    assert supervisor.share([True, False] * 50) == "50.0% (40-60)"
    assert supervisor.share([]) == supervisor.estimate(np.mean, []) == "-"
    low, high = supervisor.estimate(np.mean, [1, 2, 3] * 30).split("(")[1][:-1].split("-")
    assert 1.8 <= float(low) < 2 < float(high) <= 2.2


@pytest.mark.parametrize("line, said", [
    ('{"verdict": "accept"}', "an id"), ('{"id": "a"}', "beside id a label has steps"),
    ('{"id": "a", "verdict": "maybe"}', "verdict"), ('{"id": "a", "steps": -1}', "steps"),
    ('{"id": "a", "steps": 1, "verdict": "accept"}', "beside id"), ('["a"]', "an id"),
    ('{"id": "a", "rating": 2}', "beside id"), ('{"id": "a", "step": 2}', "step"),
    ('{"id": "a", "suggestion": "x", "rating": 4}', "rating"), ("accept", "line 1"),
    ('{"id": "a", "verdict": "accept"}\n{"id": "a", "verdict": "reject"}', "label already"),
    ('{"id": "elsewhere", "steps": 1}', "no reply to elsewhere"), ("", "holds no labels"),
    ('{"id": "a", "steps": 1}', "a has a label of the other role")])
def test_a_label_file_with_a_fault_gets_one_sentence(line, said, tmp_path, capsys):
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    points.write_lines(tmp_path / "vlm.jsonl", [{"id": "a", "reply": verdict("accept")}])
    told = refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "vlm.jsonl")
    assert said in told and "labels.jsonl" in told


def test_what_are_no_replies_is_refused(tmp_path, capsys):
    points.write_lines(tmp_path / "labels.jsonl", [{"id": "a", "verdict": "accept"}])
    said = refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "labels.jsonl")
    assert "holds no replies: a has neither reply nor fault" in said
    assert "at least one file" in refused(capsys, "score", tmp_path / "labels.jsonl")


def test_a_vlm_that_sees_other_frames_than_the_runs_did_is_told_so(exported, capsys):
    folder, vlm = exported
    assert supervisor.Ask(folder, vlm, "same").run() == 0 and not capsys.readouterr().err
    vlm.verify_fps = 8.0
    assert supervisor.Ask(folder, vlm, "other").run() == 0
    assert "'verify_fps': 1.0}, now {" in capsys.readouterr().err


def test_help_is_about_the_command_that_it_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        supervisor.main(["ask", "--help"])
    said = capsys.readouterr().out
    assert "Puts the questions to a VLM" in said and "plans, checks and repairs" not in said


def test_missing_files_get_one_sentence(tmp_path, capsys):
    assert "labels.jsonl" in refused(capsys, "score", tmp_path / "labels.jsonl", tmp_path / "x")
    assert "points.jsonl" in refused(capsys, "ask", tmp_path)
    assert "none of export, ask, score" in refused(capsys, "judge")


# -------------------------------------------------------------------------- the page for labels


def test_the_page_keeps_what_is_chosen_and_saves_labels_that_score_reads(
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


# ------------------------------------------------------------------------------- the maze world


def test_readers_err_at_the_rates_that_they_are_told():
    errors = vlm.Errors(accept_recall=0.8, reject_recall=0.4, depth_match=0.6)
    base = {"verdict": "accept", "reason": "", "suggestion": ""}

    def rate(reply, field):
        said = [errors.applied(reply, vlm.Request("", [str(i)], [])) for i in range(2000)]
        return np.mean([x[field] == reply[field] for x in said])

    assert abs(rate(base, "verdict") - 0.8) < 0.03
    assert abs(rate(base | {"verdict": "reject"}, "verdict") - 0.4) < 0.035
    for steps in (1, 2, 3):
        assert abs(rate({"estimated_steps_remaining": steps}, "estimated_steps_remaining") - 0.6
                   ) < 0.035


@pytest.mark.parametrize("calls, found", [
    ("1a", []), ("1r 1a", []), ("1r 1r 1f", [("fallback", None)]),
    ("1r 1r 1g 1a 2a", [("regen", True)]), ("1r 1r 1g 1r 2a", [("regen", False)]),
    ("1r 1r 1s 2r 2a", [("split", False)]), ("1r 1r 2a 2", [("best", True)]),
    ("1r 1r 2r 2r", [("best", False), ("best", None)])])
def test_an_exhausted_step_is_counted_with_its_route_and_what_came_next(calls, found):
    words = {"a": ("verifier", {"verdict": "accept"}), "r": ("verifier", {"verdict": "reject"}),
             "g": ("router", {"action": "regen"}), "s": ("router", {"action": "split"}),
             "f": ("router", {"action": "fallback"})}
    told = [{"t": int(x[0]), "role": words[x[1]][0], "reply": words[x[1]][1]}
            if x[1:] else {"t": int(x[0]), "role": "vgm", "clip": "x"} for x in calls.split()]
    assert compare.exhausted(told, c.Config(M=2, on_exhausted="best")) == found


@pytest.mark.skipif("COLLABVR_SLOW" not in os.environ, reason="runs mazes: COLLABVR_SLOW=1")
def test_the_reader_that_makes_no_mistakes_agrees_with_the_rule_and_the_others_less(
        tmp_path, capsys):
    assert readers.main(["--out", str(tmp_path), "--mazes", "2"]) == 0
    out = capsys.readouterr().out
    assert "perfect: by label, what it said" in out
    labels = points.lines(tmp_path / "labels.jsonl")
    assert {x["verdict"] for x in labels if "verdict" in x} == {"accept", "reject"}
    found = scored(capsys, tmp_path / "labels.jsonl", *(
        tmp_path / "points" / "replies" / f"{k}.jsonl" for k in ("perfect", "qwen9b")))
    assert found["D1, plan depth"]["perfect"][1] == "100.0%"
    assert found["D2, verdicts"]["perfect"][5] == "100.0%" != found["D2, verdicts"]["qwen9b"][5]
