"""The paper's statistics, counted by hand."""

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

import collabvr
from collabvr import Clip
from examples.bench import summary
from examples.tests.test_bench_run import fail, go, write_jsonl


def vgm(t, j=1, seconds=2.0, wall=10.0):
    return {"t": t, "j": j, "role": "vgm", "seconds": seconds, "wall_seconds": wall,
            "clip": "clips/001.mkv", "size": [16, 16, 1.0]}


def vlm(t, role, verdict=None, tokens=(100, 10), wall=1.0, **more):
    reply = {"verdict": verdict} if verdict else {"reason": ""}
    return {"t": t, "role": role, "reply": reply, "tokens_in": tokens[0], "tokens_out": tokens[1],
            "wall_seconds": wall} | more


def write_results(root, runs, categories="xyy"):
    """Results by hand: for each sample a status and calls, or None for one without a video."""
    root.mkdir()
    rows = [{"id": f"s{i}", "category": k} for i, k in enumerate(categories)]
    (root / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    for i, run in enumerate(runs):
        folder = root / "runs" / f"s{i}"
        (folder / "clips").mkdir(parents=True)
        picture = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(picture).save(folder / "input.png")
        clip = np.stack([picture, 255 - picture]) if i == 0 else np.stack([255 - picture] * 2)
        (folder / "clips" / "001.mkv").write_bytes(collabvr.lossless(Clip(clip, 1)))
        if run:
            (folder / "video.mp4").write_bytes(b"a video")
            trace = {"status": run[0], "unverified_steps": [], "calls": run[1]}
            (folder / "trace.json").write_text(json.dumps(trace))
    return root


# steps 2, clips 3, used calls 5; steps 1, clips 1, used calls 2; a sample that has no video
BY_HAND = [
    ("complete", [
        vlm(1, "planner"), vgm(1), vlm(1, "verifier", "reject"), vgm(1, 2),
        vlm(1, "verifier", "accept"), vlm(2, "planner"), vgm(2), vlm(2, "verifier", "reject")]),
    ("step_cap", [
        vlm(1, "planner", tokens=(300, 30), wall=4.0), vgm(1, 1, 4.0, 30.0),
        vlm(1, "verifier", "accept")]),
    None,
]


def table(folder, title):
    """A table of summary.csv as {row: {column: value}}."""
    found = {}
    for x in csv.DictReader((folder / "summary.csv").read_text().splitlines()):
        if x["table"].startswith(title):
            value = float(x["value"]) if x["value"] else None
            found.setdefault(x["row"], {})[x["column"]] = value
    return found


def near(**values):
    return {k: None if v is None else pytest.approx(v) for k, v in values.items()}


def test_statistics_are_those_counted_by_hand(tmp_path, capsys):
    one = write_results(tmp_path / "one", BY_HAND)
    (one / "scores.json").write_text('{"s0": 0.9, "s1": 0, "s2": 0.6}')  # s2, without video, is 0
    prices = ["--price-in", "1000", "--price-out", "10000", "--price-second", "0.5"]
    assert summary.main([str(one), *prices]) == 0
    stats = table(one, "Run statistics (Table 10)")
    assert stats["steps"] == near(mean=1, std=1, median=1, least=0, most=2)
    assert stats["re-generations"] == near(mean=1 / 3, std=3 ** -0.5, median=0, least=0, most=1)
    assert stats["clips"] == near(mean=4 / 3, std=(7 / 3) ** 0.5, median=1, least=0, most=3)
    assert stats["VLM calls: plans and verifications used"] == near(
        mean=7 / 3, std=(19 / 3) ** 0.5, median=2, least=0, most=5)
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
    assert {k: means["all"][k] for k in ("samples", "missing", "complete", "score")} == near(
        samples=3, missing=1 / 3, complete=1 / 3, score=0.3)
    assert {k: means["y"][k] for k in ("samples", "missing", "score", "clips")} == near(
        samples=2, missing=0.5, score=0, clips=0.5)
    text, marked = capsys.readouterr().out, (one / "summary.md").read_text()
    assert "Table 10" in text and "| steps | 1.000 | 1.000 |" in marked


def test_only_replies_that_were_used_are_vlm_calls(tmp_path):
    """As in Table 10. What the router adds, and other roles, stand in rows of their own."""
    refused = {"t": 1, "role": "planner", "fault": "no JSON object", "wall_seconds": 1.0}
    regen = vlm(1, "router", reply={"action": "regen"})
    split = vlm(1, "router", reply={"action": "split"})
    runs = [
        ("complete", [refused, vlm(1, "planner"), vgm(1), vlm(1, "verifier", "reject"), regen,
                      vgm(1, 2), vlm(1, "verifier", "accept")]),
        ("step_cap", [vlm(1, "planner"), vgm(1), vlm(1, "verifier", "reject"), split,
                      vlm(2, "planner"), vgm(2), vlm(2, "verifier", "accept")]),
        ("unverified", [vgm(1), vgm(1), vlm(1, "picker")])]
    one = write_results(tmp_path / "one", runs)
    assert summary.main([str(one)]) == 0
    stats = table(one, "Run statistics")
    used, router, others = [v for k, v in stats.items() if "call" in k]
    assert used["mean"] == pytest.approx(7 / 3) and (used["least"], used["most"]) == (0, 4)
    assert (router["most"], router["mean"]) == (1, pytest.approx(2 / 3))
    assert others["mean"] == pytest.approx(1 / 3)
    assert table(one, "Calls")["planner"]["calls/sample"] == pytest.approx(4 / 3), "all are paid"


@pytest.mark.parametrize("votes, accepted", [("ara", 1), ("rra", 0), ("ar", 0)])
def test_attempts_are_counted_by_clip(tmp_path, votes, accepted):
    """A method that asks three times about a clip has made one attempt; most votes count."""
    words = {"a": "accept", "r": "reject"}
    asked = [vlm(1, "verifier", words[vote]) for vote in votes]
    run = [vlm(1, "planner"), vgm(1), *[vlm(1, "verifier", "reject")] * 3, vgm(1, 2), *asked]
    one = write_results(tmp_path / "one", [("complete", run), None, None])
    assert summary.main([str(one)]) == 0
    assert table(one, "Accepted")["verified clips"] == near(
        verified=2, accepted=accepted, share=accepted / 2)
    assert table(one, "Accepted")["steps, in the end"] == near(
        verified=1, accepted=accepted, share=accepted)


def test_first_frames_are_compared_with_inputs(tmp_path):
    """If asked for. s0's frame 0 is its picture, s1's is its negative."""
    pytest.importorskip("skimage")
    one = write_results(tmp_path / "one", BY_HAND)
    assert summary.main([str(one)]) == 0 and not table(one, "First-frame")
    assert summary.main([str(one), "--fidelity"]) == 0
    ssim = table(one, "First-frame")["SSIM"]
    assert ssim["clips"] == 2 and ssim["mean"] < 0.6 and ssim["std"] > 0.5


def test_only_the_fidelity_needs_scikit_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    one = write_results(tmp_path / "one", BY_HAND)
    assert summary.main([str(one)]) == 0
    assert table(one, "Run statistics")["clips"]["most"] == 3
    assert summary.main([str(one), "--fidelity"]) == 2
    assert "skimage.metrics is needed" in capsys.readouterr().err


def test_two_results_are_compared_sample_by_sample(tmp_path, capsys):
    one = write_results(tmp_path / "one", BY_HAND)
    two = write_results(tmp_path / "two", [BY_HAND[0], None, BY_HAND[1]])
    assert summary.main([str(one), str(two)]) == 0
    found = table(one, "The second folder")
    assert found["missing"] == near(**{
        "first": 1 / 3, "second": 1 / 3, "difference": 0, "95 % from": -1, "to": 1})
    assert "score" not in found and "dollars" not in found
    three = write_results(tmp_path / "three", BY_HAND[:2], categories="xy")
    capsys.readouterr()
    assert summary.main([str(one), str(three)]) == 2
    assert "different samples" in capsys.readouterr().err


def test_stills_and_missing_videos_are_named(tmp_path, capsys):
    """They count as not made, also if somebody scored the still."""
    data = write_jsonl(tmp_path / "data", 4)
    fail(tmp_path, [1])
    (tmp_path / "data" / "2.png").write_bytes(b"no picture")
    assert go(tmp_path, data, "out", fill_failed=True) == 1
    (tmp_path / "out" / "scores.json").write_text('{"s0": 1, "s1": 0.3, "s3": 1}')
    capsys.readouterr()
    assert summary.main([str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert "1 of 4 samples are still: s1." in said and "1 of 4 samples are missing: s2." in said
    means = table(tmp_path / "out", "Means")["all"]
    assert (means["still"], means["missing"], means["score"]) == (0.25, 0.25, 0.5)


def test_the_floor_is_all_stills_and_has_scores(tmp_path):
    assert go(tmp_path, write_jsonl(tmp_path / "data", 2), "out", method="still") == 0
    (tmp_path / "out" / "scores.json").write_text('{"s0": 0.3, "s1": 0.5}')
    assert summary.main([str(tmp_path / "out")]) == 0
    means = table(tmp_path / "out", "Means")["all"]
    assert (means["still"], means["missing"], means["score"]) == (1, 0, 0.4)
    assert means["VGM seconds"] == means["VLM calls"] == 0


def test_a_folder_without_results_gets_one_sentence(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no results" in said and said.count("\n") == 1
    assert summary.main(["--help"]) == 0


@pytest.mark.parametrize("scores, said", [
    ('{"s0": "high", "s1": 1}', "s0"), ("[1]", "no object"), ('{"s0": NaN, "s1": 1}', "s0"),
    ('{"s0": 0.5}', "lacks s1, which has a video"), ('{"s0": 1, "s1": 1, "x": 1}', "names x")])
def test_scores_that_cannot_be_meant_get_one_sentence(scores, said, tmp_path, capsys):
    one = write_results(tmp_path / "one", BY_HAND)
    (one / "scores.json").write_text(scores)
    assert summary.main([str(one)]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_what_is_still_to_be_done_is_missing(tmp_path):
    data = write_jsonl(tmp_path / "data", 4)
    assert go(tmp_path, data, "out", shard="1/2") == 0
    assert summary.main([str(tmp_path / "out")]) == 0
    means = table(tmp_path / "out", "Means")
    assert (means["all"]["samples"], means["all"]["missing"], means["b"]["missing"]) == (4, 0.5, 1)
