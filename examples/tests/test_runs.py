"""Run folders as they are read: what they say, and that nothing outside of them is read."""

import json

import pytest

from collabvr import Call, Problem
from examples import runs
from examples.tests.conftest import I0, accept, go, plan, reject


@pytest.fixture
def folder(tmp_path):
    """A finished run of one clip."""
    go(method="single", folder=tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_read_as_it_was_made(folder):
    run = runs.load_run(folder)
    assert run.status == "unverified" and run.facts["task"] == "solve it"
    assert run.notes == ["In the video without an accept: step 1."]
    (call,) = run.calls
    clip = run.clip(call)
    assert (clip.frames[0] == I0).all() and (clip.frames[1:] == 1).all() and clip.seconds == 2
    assert (run.picture() == I0).all() and run.video().name == "video.mp4"
    assert run.frames().shape == clip.frames.shape and run.cost()["vgm_seconds"] == 2


def test_a_run_without_a_record_is_unanswered(tmp_path):
    run = runs.load_run(tmp_path)
    assert (run.status, run.calls, run.facts) == ("unanswered", [], {})
    assert run.picture() is None and run.frames() is None


def test_a_run_that_is_not_over_has_no_video(folder):
    """There may be an older one, of a run that is made again."""
    trace = runs.read_json(folder / "trace.json")
    del trace["status"]
    (folder / "trace.json").write_text(json.dumps(trace))
    run = runs.load_run(folder)
    assert (run.status, len(run.calls), run.video()) == ("unfinished", 1, None)
    trace["calls"].append({"role": "planner", "t": 1, "fault": "no JSON object"})
    (folder / "trace.json").write_text(json.dumps(trace))
    run = runs.load_run(folder)
    assert (run.status, run.notes) == ("failed", ["planner: no JSON object"])


@pytest.mark.parametrize("text", [
    "[]", "{", '{"calls": 1}', '{"calls": [{"role": 1}]}', '{"score": NaN}', '{"task": []}',
])
def test_a_damaged_record_is_one_sentence(folder, text):
    (folder / "trace.json").write_text(text)
    with pytest.raises(Problem, match="holds no run"):
        runs.load_run(folder)


@pytest.mark.parametrize("name", [
    "../secret", "/etc/hostname", "linked", "linked_folder/secret", "clips/../../secret", "x\0y",
    "loop", "clips"])
def test_nothing_outside_the_folder_is_read(folder, name):
    """No name leads out, no link does, and a folder is no file."""
    (folder.parent / "secret").write_text("secret")
    (folder / "linked").symlink_to(folder.parent / "secret")
    (folder / "linked_folder").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    assert runs.load_run(folder).file(name) is None


def test_a_folder_that_leads_out_of_the_root_is_empty(folder, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run").symlink_to(folder)
    assert runs.load_run(tmp_path / "results" / "run").calls
    assert runs.load_run(tmp_path / "results" / "run", tmp_path / "results").calls == []


def test_a_damaged_clip_or_a_playlist_is_no_clip(folder):
    run = runs.load_run(folder)
    path = folder / run.calls[0].clip
    path.with_name("copy.mkv").write_bytes(path.read_bytes())
    path.write_text("ffconcat version 1.0\nfile copy.mkv\n")
    assert run.clip(run.calls[0]) is None


def test_there_is_a_verdict_for_each_clip():
    """A reply that was not usable is none."""
    run = go(plan(left=2), reject(), "Yes.", accept("partial"), plan(), accept())
    assert runs.verdicts(run.models.calls) == [(1, 1, False), (1, 2, True), (2, 1, True)]


def test_several_replies_on_a_clip_are_one_verdict():
    """Most of them decide."""
    clip = Call(role="vgm", t=1, j=1)
    yes, no = (Call(role="verifier", t=1, reply={"verdict": word}) for word in ("accept", "reject"))
    assert runs.verdicts([clip, yes, no, no, clip, yes, yes, no]) == [(1, 1, False), (1, 1, True)]


def test_lines_end_at_newlines_only(tmp_path):
    """U+2028 inside a text is no line end, and a byte-order mark is no text."""
    text = '\ufeff{"a": "b\u2028c\x85"}\n\n{"a": "猫"}'
    (tmp_path / "x").write_bytes(text.encode())
    assert list(runs.read_lines(tmp_path / "x")) == [(1, {"a": "b\u2028c\x85"}), (3, {"a": "猫"})]


@pytest.mark.parametrize("data", [b'{"a": 1}\n{', b'{"a": 1}\n"\xff"'])
def test_a_line_that_is_no_json_is_named(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(Problem, match="x, line 2, is no JSON in UTF-8"):
        list(runs.read_lines(tmp_path / "x"))
