"""Tests of collabvr.py: no network, no GPU. Their names, read in order, tell what the method does.

The models are scripted: `Painter` is a generator that paints the number of its call into the
frames, `Script` a VLM that reads its replies from a list. No mock library.
"""

import base64
import contextlib
import http.server
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

import collabvr as c

ROOT = Path(c.__file__).parent
TINY_WAN = ROOT / "examples" / "maze" / "tiny-wan"
I0 = np.full((32, 48, 3), 250, np.uint8)
ROLE = {"Plan": "planner", "Verification": "verifier", "Routing": "router"}


# ----------------------------------------------------------------------------- scripted models


class Painter:
    """A generator: frame 0 is the conditioning frame, the others have the call's number as
    colour."""

    def __init__(self, fps=4, fail=()):
        self.fps, self.fail, self.calls = fps, set(fail), []

    def __call__(self, frame, prompt, seconds, seed):
        self.calls.append({"frame": frame.copy(), "prompt": prompt, "seconds": seconds,
                           "seed": seed})
        if len(self.calls) in self.fail:
            raise RuntimeError("out of memory")
        frames = np.repeat(frame[None], int(seconds * self.fps) + 1, 0)
        frames[1:] = len(self.calls)
        return c.Clip(frames, self.fps)


class Script:
    """A VLM: answers from a list, checks that the right role asks, keeps what it was shown."""

    def __init__(self, *replies):
        self.replies, self.calls = list(replies), []

    def __call__(self, instructions, parts, schema):
        self.calls.append({"role": ROLE[schema.__name__], "parts": parts, "text": text_of(parts)})
        reply = self.replies.pop(0)
        if isinstance(reply, dict):
            asked = f"{schema.__name__} was asked for, the script has {reply}"
            assert set(schema.model_fields) == set(reply), asked
            reply = json.dumps(reply)
        return reply, {"tokens_in": 100, "tokens_out": 10, "model": "script-1"}

    def roles(self):
        return "".join(call["role"][0] for call in self.calls)


def text_of(parts):
    return "\n".join(p for p in parts if isinstance(p, str))


def plan(instruction="move it", left=1, done=False, target="there"):
    return {"observation": "a maze", "remaining_goal": "the rest", "task_complete": done,
            "instruction": instruction, "target_state": target, "estimated_steps_remaining": left}


def accept(progress="complete"):
    return {"reason": "as planned", "action_executed": True, "progress": progress,
            "good_fraction": 1.0, "suggestion": "", "verdict": "accept", "confidence": 0.9}


def reject(good=0.5, suggestion="go left", reason="it went right"):
    return {"reason": reason, "action_executed": False, "progress": "none", "good_fraction": good,
            "suggestion": suggestion, "verdict": "reject", "confidence": 0.9}


def route(action, suggestion="slower", steps=0):
    return {"reason": "so it is", "action": action, "suggestion": suggestion,
            "estimated_steps": steps}


def go(*replies, vgm=None, journal=None, q="solve the maze", **config):
    """Runs a script to its end; (result, generator, VLM)."""
    vgm, vlm = vgm or Painter(), Script(*replies)
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    result = c.CollabVR(vgm, vlm, config, journal).run(I0, q)
    assert not vlm.replies, "the run ended before the script did"
    return result, vgm, vlm


def colours(clip):
    """The calls that the frames come from, frame 0 apart."""
    return [k for k, _ in itertools.groupby(clip.frames[1:, 0, 0, 0].tolist())]


# -------------------------------------------------------------------------------- Algorithm 1


def test_the_trace_of_figure_10_reject_evolve_accept_plan_again_accept():
    result, vgm, vlm = go(plan("go right", left=2), reject(suggestion="to the right, not up"),
                          accept("partial"), plan("go down", left=1), accept())
    assert vlm.roles() == "pvvpv"
    assert [call["prompt"] for call in vgm.calls] == [
        "go right", "go right Correction: to the right, not up", "go down"]
    assert result.status == "complete" and result.unverified_steps == []
    assert colours(result.video) == [2, 3]  # the rejected first clip is not in it
    assert result.video.seconds == 3 and len(result.video.frames) == 3 * 4 + 1


def test_each_attempt_of_a_step_starts_from_the_same_frame_and_the_next_step_from_the_accepted_clips_last():  # noqa: E501 (a name cannot be wrapped)
    _, vgm, _ = go(plan(left=2), reject(), accept(), plan(), accept())
    first, second, third = (call["frame"] for call in vgm.calls)
    assert (first == I0).all() and (second == I0).all() and (third == 2).all()


def test_each_attempt_of_a_step_is_as_long_as_the_step():
    _, vgm, _ = go(plan(left=2), reject(), accept(), plan(), reject(), accept())
    assert [call["seconds"] for call in vgm.calls] == [2, 2, 1, 1]


def test_a_run_needs_between_1_and_9_clips_and_2_and_12_vlm_calls_without_the_router():
    seen = set()
    for seed in range(300):
        rng = random.Random(seed)

        def vlm(instructions, parts, schema, rng=rng):
            if schema is c.Plan:
                return json.dumps(plan(left=rng.choice([1, 2]), done=rng.random() < 0.2)), {}
            verdict = rng.choice([accept("complete"), accept("partial"),
                                  reject(), reject(), reject()])
            return json.dumps(verdict), {}

        config = c.Config(on_exhausted=rng.choice(["replan", "best"]))
        cost = c.CollabVR(Painter(), vlm, config).run(I0, "q").cost
        assert cost.vlm_calls["router"] == 0 and cost.clips == cost.steps + cost.regenerations
        seen.add((cost.clips, sum(cost.vlm_calls.values())))

    def never(instructions, parts, schema):
        return json.dumps(plan(left=3) if schema is c.Plan else reject()), {}

    always = c.CollabVR(Painter(), never, c.Config(on_exhausted="replan")).run(I0, "q").cost
    seen.add((always.clips, sum(always.vlm_calls.values())))
    assert (min(n for n, _ in seen), max(n for n, _ in seen)) == (1, 9)
    assert (min(n for _, n in seen), max(n for _, n in seen)) == (2, 12)


def test_complete_needs_the_last_step_of_the_plan_and_complete_progress():
    assert go(plan(left=1), accept("complete"))[0].status == "complete"
    result, _, vlm = go(plan(left=2), accept("complete"), plan(left=1), accept("partial"),
                        plan(left=2), accept())
    assert vlm.roles() == "pvpvpv"  # t = N_max is the last by definition
    assert result.status == "complete"


def test_the_step_cap_ends_a_run_that_is_not_complete():
    result, vgm, _ = go(plan(left=1), accept("partial"), plan(), accept("partial"), plan(),
                        accept("partial"))
    assert result.status == "step_cap" and len(vgm.calls) == 3


def test_the_planner_may_end_the_run_but_not_before_a_clip_was_accepted():
    result, vgm, _ = go(plan(left=2), accept("partial"), plan("", done=True))
    assert result.status == "complete" and len(vgm.calls) == 1
    result, vgm, _ = go(plan("", done=True), plan("then move", done=True), accept())
    assert len(vgm.calls) == 1 and vgm.calls[0]["prompt"] == "then move"


def test_every_clip_has_a_seed_of_its_own():
    _, vgm, _ = go(plan(left=2), reject(), accept(), plan(), accept(), seed=40)
    assert [call["seed"] for call in vgm.calls] == [40, 41, 42]


# ------------------------------------------------------------- what the roles see, and evolve


def test_evolve_accumulates_and_falls_back_on_the_reason():
    evolve = c.CollabVR(None, None).evolve
    a_t = evolve(c.Action(1, "go", "go"),
                 c.Verification(**reject(suggestion=" ", reason="it fell")))
    a_t = evolve(a_t, c.Verification(**reject(suggestion="go up")))
    assert a_t.prompt == "go Correction: it fell Correction: go up" and a_t.instruction == "go"


def test_the_verifier_judges_the_plan_and_not_the_evolved_prompt():
    _, _, vlm = go(plan("go right", target="at the door"), reject(suggestion="hop"), accept())
    for call in (vlm.calls[1], vlm.calls[2]):
        assert "Planned action: go right\nTarget state: at the door" in call["text"]
        assert "hop" not in call["text"]


def test_the_planner_sees_the_input_the_accepted_clips_last_frames_and_what_came_of_each_step():
    _, _, vlm = go(plan("one", left=3), accept("partial"), plan("two", left=2),
                   reject(reason="it fell"), reject(), reject(reason="no door"),
                   plan("three"), accept(), on_exhausted="replan")
    first, last = vlm.calls[0], vlm.calls[-2]
    assert "Steps so far:\nnone" in first["text"] and "Step: 1 of at most 3" in first["text"]
    assert [p.shape for p in last["parts"] if not isinstance(p, str)] == [I0.shape] * 2
    assert "one Outcome: accepted, progress partial" in last["text"]
    assert "two Outcome: rejected 3 times, nothing was kept: no door" in last["text"]
    assert "last allowed step" in last["text"]


def test_no_role_sees_more_than_the_newest_eight_clips():
    replies = [x for i in range(12) for x in (plan(str(i), left=2), accept("partial"))]
    _, _, vlm = go(*replies, N_max=12)
    for call in vlm.calls[-2:]:
        assert sum("Last frame of" in p for p in call["parts"] if isinstance(p, str)) == 8


# ------------------------------------------------------------------ when a step is exhausted


def test_replan_is_algorithm_1_to_the_letter_nothing_joins_and_the_next_step_starts_from_the_same_frame():  # noqa: E501 (a name cannot be wrapped)
    result, vgm, _ = go(plan(left=2), reject(), reject(), plan(), accept(),
                        M=2, on_exhausted="replan")
    assert (vgm.calls[2]["frame"] == I0).all() and colours(result.video) == [3]


def test_best_joins_the_attempt_with_the_largest_good_fraction_the_latest_of_equals():
    result, vgm, _ = go(plan(left=2), reject(0.7), reject(0.7), reject(0.1), plan(), accept(),
                        on_exhausted="best")
    assert colours(result.video) == [2, 4] and result.unverified_steps == [1]
    assert (vgm.calls[3]["frame"] == 2).all()


def test_a_run_that_accepts_nothing_returns_its_best_attempt_marked_so():
    replies = [plan(), reject(0.2), plan(), reject(0.6), plan(), reject(0.3)]
    result, _, _ = go(*replies, M=1, on_exhausted="replan")
    assert result.status == "best_attempt" and colours(result.video) == [2]


def test_route_regen_keeps_the_good_part_of_the_best_attempt_and_verifies_the_joined_clip():
    result, vgm, vlm = go(plan(), reject(0.2), reject(0.5), reject(0.3),
                          route("regen", "slower"), accept())
    assert vlm.roles() == "pvvvrv" and len(vgm.calls) == 4
    assert (vgm.calls[3]["frame"] == 2).all()
    assert vgm.calls[3]["prompt"].endswith("Correction: slower")
    assert vgm.calls[3]["seconds"] == 2
    k = int(0.5 * 8)
    assert colours(result.video) == [2, 4] and len(result.video.frames) == k + 1 + 8
    assert result.status == "complete"
    assert result.cost.vgm_seconds == 8 and result.cost.regenerations == 3


def test_route_regen_that_is_rejected_goes_on_with_the_best_attempt():
    result, _, _ = go(plan(left=2), reject(0.2), route("regen"), reject(0.9), plan(), accept(), M=1)
    assert result.unverified_steps == [1]
    assert colours(result.video) == [1, 2, 3]  # 0.2 of 8 frames: one of call 1
    result, _, _ = go(plan(left=2), reject(0.5), route("regen"), reject(0.1), plan(), accept(), M=1)
    assert colours(result.video) == [1, 3]


def test_the_router_sees_what_was_accepted_what_was_planned_and_the_best_failed_clip():
    _, _, vlm = go(plan(left=2), accept(), plan("go down"), reject(0.1), reject(0.6, reason="late"),
                   reject(0.3), route("fallback"))
    text = vlm.calls[-1]["text"]
    assert "Last frame of accepted clip 1:" in text and "Planned action: go down" in text
    assert "Reason: late" in text and "Good fraction: 0.60" in text


def test_the_next_plan_is_told_why_the_attempt_that_was_kept_was_rejected():
    _, _, vlm = go(plan(left=2), reject(0.6, reason="too late"), reject(0.1, reason="astray"),
                   plan(), accept(), M=2, on_exhausted="best")
    assert "rejected 2 times, the best attempt was kept: too late" in vlm.calls[3]["text"]


def test_route_split_tells_the_next_plan_and_changes_nothing_else():
    result, vgm, vlm = go(plan("all of it"), reject(), route("split", "in two moves", 2),
                          plan("half"), accept(), M=1)
    advice = "Advice: split what remains into about 2 smaller steps. in two moves"
    assert advice in vlm.calls[3]["text"]
    assert (vgm.calls[1]["frame"] == I0).all() and colours(result.video) == [2]


def test_route_split_is_not_offered_at_the_last_step_and_not_accepted_there():
    _, _, vlm = go(plan(), reject(), route("split"), route("fallback"), M=1, N_max=1)
    assert "Allowed actions: regen, fallback" in vlm.calls[2]["text"]
    assert "must be one of regen, fallback" in vlm.calls[3]["text"]


def test_route_fallback_is_one_unverified_clip_of_the_whole_task_from_the_input():
    result, vgm, _ = go(plan(left=2), accept(), plan(), reject(), route("fallback"),
                        M=1, q="the task")
    assert vgm.calls[-1]["prompt"] == "the task" and (vgm.calls[-1]["frame"] == I0).all()
    assert vgm.calls[-1]["seconds"] == 2 and colours(result.video) == [3]
    assert result.status == "fallback" and result.unverified_steps == [2]


# ------------------------------------------------------------------------- module switch, options


def test_m1_alone_verifies_nothing_and_lets_the_next_plan_end_the_run():
    result, vgm, vlm = go(plan(left=1), plan(), plan("", done=True), modules="m1")
    assert vlm.roles() == "ppp" and len(vgm.calls) == 2
    assert result.status == "complete" and result.unverified_steps == [1, 2]


def test_m2_alone_plans_nothing_and_what_it_accepts_is_complete():
    result, vgm, vlm = go(reject(), accept("partial"), modules="m2", q="solve it")
    assert vlm.roles() == "vv" and vgm.calls[0]["prompt"] == "solve it"
    assert result.status == "complete"
    result, _, vlm = go(reject(), reject(), reject(), route("fallback"), modules="m2")
    assert "regen, fallback" in vlm.calls[-1]["text"] and result.status == "fallback"


def test_partial_regeneration_inside_a_step_keeps_every_good_prefix():
    result, vgm, _ = go(plan(), reject(0.5), reject(0.75), accept(), partial=0.4)
    assert [len(np.unique(call["frame"])) for call in vgm.calls] == [1, 1, 1]
    assert (vgm.calls[1]["frame"] == 1).all() and (vgm.calls[2]["frame"] == 2).all()
    assert colours(result.video) == [1, 2, 3] and result.cost.vgm_seconds == 6
    _, vgm, _ = go(plan(), reject(0.3), accept(), partial=0.4)
    assert (vgm.calls[1]["frame"] == I0).all()


def test_max_vgm_seconds_ends_the_run_with_what_was_accepted():
    result, vgm, _ = go(plan(left=2), accept(), plan(), reject(), max_vgm_seconds=3)
    assert result.status == "step_cap" and result.cost.vgm_seconds == 3 and len(vgm.calls) == 2
    with pytest.raises(c.Problem, match="max-vgm-seconds"):
        go(plan(), max_vgm_seconds=1)


@pytest.mark.parametrize("config, clips, seconds", [
    ({}, 12, 48.0), ({"on_exhausted": "best"}, 9, 36.0), ({"modules": "m1"}, 3, 12.0),
    ({"modules": "m2"}, 4, 24.0), ({"N_max": 1, "M": 1}, 2, 12.0),
    ({"max_vgm_seconds": 20}, 12, 20)])
def test_the_worst_case_is_what_a_run_of_rejections_costs(config, clips, seconds):
    assert c.Config(**config).worst_case()[0] == clips
    worst = c.Config(**config).worst_case()[1]
    assert seconds <= worst <= seconds + 3  # a last fallback is as long as step 1


# --------------------------------------------------------------------------- replies of the VLM

BAD_REPLIES = {
    "missing": "", "prose": "Accept.", "cut off": '{"reason": "as pl', "a list": "[]",
    "null": "null", "markup": "<html>busy</html>",
    "wrong type": accept() | {"good_fraction": "1.0"},
    "fraction out of range": accept() | {"good_fraction": 1.7},
    "not a number": accept() | {"good_fraction": float("nan")},
    "another verdict": accept() | {"verdict": "Accept."}, "maybe": accept() | {"verdict": "maybe"},
    "a field missing": {k: v for k, v in accept().items() if k != "reason"},
    "a field too many": accept() | {"note": 1},
    "two verdicts": json.dumps(accept())[:-1] + ', "verdict": "accept"}',
    "prose around": f"Sure: {json.dumps(accept())}",
    "deep": "[" * 50_000, "long": json.dumps(accept() | {"reason": "x" * 200_000}),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_that_does_not_fit_is_asked_for_again_and_never_an_accept(name):
    bad = BAD_REPLIES[name]
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    result, vgm, vlm = go(plan(), bad, reject(), accept())
    assert len(vgm.calls) == 2 and "could not be used" in vlm.calls[2]["text"]
    assert result.cost.vlm_calls == {"planner": 1, "verifier": 3, "router": 0}
    with pytest.raises(c.Problem, match="verifier gave no usable reply"):
        go(plan(), bad, bad, bad)


@pytest.mark.parametrize("fault", ["finish_reason length", "finish_reason content_filter",
                                   "I cannot help with that"])
def test_a_reply_that_was_cut_off_or_refused_is_not_used_even_if_it_parses(fault):
    def vlm(instructions, parts, schema):
        if schema is c.Plan:
            return json.dumps(plan()), {}
        return json.dumps(accept()), {"fault": fault}

    with pytest.raises(c.Problem, match=fault):
        c.CollabVR(Painter(), vlm).run(I0, "q")


def test_fences_around_a_reply_are_stripped():
    result, _, _ = go(f"```json\n{json.dumps(plan())}\n```", f"```\n{json.dumps(accept())}```")
    assert result.status == "complete"


# ----------------------------------------------------------------------------------------- cost


def test_cost_counts_rejected_and_routed_clips_in_seconds_and_calls_by_role():
    result, _, _ = go(plan(left=2), reject(), reject(), reject(), route("regen"), reject(),
                      plan(), "?", accept())
    cost = result.cost
    assert (cost.clips, cost.steps, cost.regenerations, cost.vgm_seconds) == (5, 2, 3, 2 * 4 + 1)
    assert cost.vlm_calls == {"planner": 2, "verifier": 6, "router": 1}
    assert cost.tokens_in["verifier"] == 600 and cost.tokens_out["router"] == 10
    assert result.models == ["script-1"]
    assert "9.0 s of video in 5 clips: 2 steps, 3 re-generations" in str(cost)
    assert "9 calls: planner 2" in str(cost)


def test_a_failed_generation_is_tried_once_more_with_the_next_seed_and_costs_no_attempt():
    result, vgm, _ = go(plan(), reject(), accept(), vgm=Painter(fail=[1, 3]), M=2)
    assert [call["seed"] for call in vgm.calls] == [0, 1, 2, 3]
    assert (result.cost.generator_errors, result.cost.clips, result.cost.vgm_seconds) == (2, 2, 4)
    assert [a["status"] for a in result.steps[0]["attempts"]] == [
        "generator_error", "reject", "generator_error", "accept"]


def test_a_second_failure_in_a_row_stops_the_run():
    with pytest.raises(c.Problem, match="failed twice in a row .*out of memory"):
        go(plan(), vgm=Painter(fail=[1, 2]))


@pytest.mark.parametrize("frames", [
    np.zeros((1, 8, 8, 3), np.uint8), np.zeros((5, 8, 8), np.uint8), np.zeros((5, 8, 8, 3)), None,
    np.full((5, 8, 8, 3), np.nan)])
def test_a_clip_that_breaks_the_contract_is_a_failed_generation(frames):
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=lambda frame, prompt, seconds, seed: c.Clip(frames, 8))


@pytest.mark.parametrize("second", [((40, 48), 4), ((32, 48), 8)])
def test_a_clip_that_cannot_be_joined_to_those_before_is_a_failed_generation(second):
    made = iter([((32, 48), 4), second, second])

    def vgm(frame, prompt, seconds, seed):
        size, fps = next(made)
        return c.Clip(np.zeros((9, *size, 3), np.uint8), fps)

    with pytest.raises(c.Problem, match="failed twice in a row .*does not go with"):
        go(plan(left=2), accept(), plan(), vgm=vgm)


def test_a_clip_that_does_not_start_with_the_conditioning_frame_gets_a_warning(caplog):
    go(plan(), accept())
    assert "conditioning frame" not in caplog.text
    noise = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    for frames in (noise, np.zeros_like(noise)):  # or a black one
        caplog.clear()
        go(plan(), accept(), vgm=lambda *request, frames=frames: c.Clip(frames, 4))
        assert "frame 0 is not the conditioning frame (SSIM 0.0" in caplog.text


def test_ssim_is_1_for_the_same_picture_and_falls_with_noise_and_takes_any_size():
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    assert c.ssim(picture, picture) == pytest.approx(1)
    noisy = [np.clip(picture + rng.normal(0, s, picture.shape), 0, 255).astype(np.uint8)
             for s in (5, 20, 80)]
    found = [c.ssim(picture, n) for n in noisy]
    assert found == sorted(found, reverse=True) and found[0] > 0.8 > found[2]
    assert c.ssim(picture, picture[::2, ::2]) > 0.5 and c.ssim(picture, picture[:3, :5]) <= 1


# ------------------------------------------------------------------------------- clips and files


@pytest.mark.parametrize("T, fps, rate, indexes", [
    (97, 16, 1, [0, 16, 32, 48, 64, 80, 96]), (17, 8, 8, list(range(17))), (17, 8, 1, [0, 8, 16]),
    (2, 16, 1, [0, 1]), (50, 16, 1, [0, 16, 33, 49]), (17, 8, 1000, list(range(17)))])
def test_the_verifier_sees_evenly_spread_frames_the_first_and_the_last_among_them(
        T, fps, rate, indexes):
    assert c.sample(c.Clip(np.zeros((T, 1, 1, 3), np.uint8), fps), rate) == indexes


def test_joining_drops_the_repeated_frame_and_adds_up_the_seconds():
    a, b = (c.Clip(np.full((T, 2, 2, 3), T, np.uint8), 16) for T in (97, 49))
    assert len(c.concat([a, b]).frames) == 145
    assert c.concat([a, b]).seconds == a.seconds + b.seconds == 9


@pytest.mark.parametrize("size, multiple, fitted", [
    ((832, 480), 16, (832, 480)), ((1920, 1080), 16, (832, 464)), ((96, 96), 16, (96, 96)),
    ((100, 90), 16, (96, 80)), ((480, 832), 32, (480, 832)), ((20, 20), 32, (32, 32))])
def test_pictures_shrink_to_the_area_but_never_grow(size, multiple, fitted):
    assert c.fit(*size, multiple) == fitted


def test_the_same_frames_make_the_same_video_bit_for_bit():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (12, 12, 12, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    assert len({c.encode_video(c.Clip(frames, 8)) for _ in range(20)}) == 1


@pytest.mark.parametrize(("shape", "codec"), [
    ((9, 33, 47, 3), "rawvideo"), ((49, 233, 247, 3), "ffv1")])
def test_stored_clips_are_exact(tmp_path, shape, codec):
    import imageio.v3 as iio

    clip = c.Clip(np.random.default_rng(0).integers(0, 256, shape, np.uint8), 8)
    (tmp_path / "a.avi").write_bytes(c.encode_video(clip, lossless=True))
    assert iio.immeta(tmp_path / "a.avi", plugin="pyav")["codec"] == codec
    assert (iio.imread(tmp_path / "a.avi", plugin="pyav") == clip.frames).all()


def test_the_video_plays_anywhere(tmp_path):
    import imageio.v3 as iio

    clip = c.Clip(np.random.default_rng(0).integers(0, 256, (9, 33, 47, 3), np.uint8), 8)
    (tmp_path / "a.mp4").write_bytes(c.encode_video(clip))
    meta = iio.immeta(tmp_path / "a.mp4", plugin="pyav")
    assert meta["video_format"] == "yuv420p" and meta["codec"] == "h264" and meta["fps"] == 8
    assert iio.imread(tmp_path / "a.mp4", plugin="pyav").shape == (9, 34, 48, 3)


def saved(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return c.load_image(str(tmp_path / name))


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert saved(tmp_path, Image.new("RGB", (40, 20)), "x.jpg", exif=exif).shape == (40, 20, 3)


def test_alpha_is_flattened_on_white_and_palettes_cmyk_and_grey_are_converted(tmp_path):
    assert (saved(tmp_path, Image.new("RGBA", (20, 20), (9, 9, 9, 0))) == 255).all()
    palette = Image.new("P", (20, 20))
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (saved(tmp_path, palette) == (10, 20, 30)).all()
    assert (saved(tmp_path, palette, transparency=0) == 255).all()
    assert saved(tmp_path, Image.new("CMYK", (20, 20)), "x.jpg").shape == (20, 20, 3)
    assert (saved(tmp_path, Image.new("LA", (20, 20), (7, 255))) == 7).all()


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.full((20, 20), 32896, np.uint16)
    assert (saved(tmp_path, Image.fromarray(grey)) == 128).all()


# -------------------------------------------------------------------------------------- journal


def journaled(tmp_path, *replies, vgm, **config):
    vlm = Script(*replies)
    config = c.Config(seconds_first=2, seconds_next=1, **config)
    return c.CollabVR(vgm, vlm, config, c.Journal(tmp_path)).run(I0, "q"), vlm


FULL = [plan(left=2), reject(), accept("partial"), plan(), accept()]


def without_wall(result):
    cost = {k: v for k, v in vars(result.cost).items() if "wall" not in k}
    facts = [result.status, result.steps, cost, result.models]
    return json.dumps(facts), result.video.frames.tobytes()


@pytest.mark.parametrize("vlm_calls", range(5))
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_resumes_without_paying_twice(tmp_path, vlm_calls, fault):
    undisturbed = without_wall(journaled(tmp_path / "a" / "journal", *FULL, vgm=Painter())[0])
    vgm = Painter()

    class Dies(Script):
        def __call__(self, *args):
            if len(self.calls) == vlm_calls:
                raise fault
            return super().__call__(*args)

    first = Dies(*FULL)
    config, folder = c.Config(seconds_first=2, seconds_next=1), tmp_path / "b" / "journal"
    with pytest.raises(fault):
        c.CollabVR(vgm, first, config, c.Journal(folder)).run(I0, "q")
    result, second = journaled(tmp_path / "b" / "journal", *FULL[vlm_calls:], vgm=vgm)
    assert len(vgm.calls) == 3 and len(first.calls) + len(second.calls) == 5
    result = without_wall(result)
    assert result == undisturbed


def test_a_finished_run_replays_without_its_models(tmp_path):
    done, _ = journaled(tmp_path, *FULL, vgm=Painter())
    again, _ = journaled(tmp_path, vgm=None)
    assert without_wall(again) == without_wall(done) and again.cost == done.cost


def test_settings_may_change_and_what_they_do_not_touch_is_replayed(tmp_path):
    journaled(tmp_path, *FULL, vgm=Painter())
    result, vlm = journaled(tmp_path, plan(left=2), plan(), vgm=(vgm := Painter()), N_max=2)
    assert vlm.roles() == "pp"  # only the planner is told the cap
    assert not vgm.calls and result.cost.clips == 3


def test_unusable_replies_are_counted_for_ever_but_asked_for_afresh(tmp_path):
    with pytest.raises(c.Problem):
        journaled(tmp_path, "?", "?", "?", vgm=Painter())
    result, vlm = journaled(tmp_path, "?", plan(), accept(), vgm=Painter())
    assert result.cost.vlm_calls["planner"] == 5 and len(vlm.calls) == 3
    assert journaled(tmp_path, vgm=None)[0].cost == result.cost


def test_failures_of_an_earlier_start_are_counted_and_the_seeds_go_on(tmp_path):
    with pytest.raises(c.Problem):
        journaled(tmp_path, plan(), vgm=Painter(fail=[1, 2]))
    result, _ = journaled(tmp_path, accept(), vgm=(vgm := Painter()))
    assert vgm.calls[0]["seed"] == 2
    assert result.cost.generator_errors == 2 and result.cost.clips == 1
    assert journaled(tmp_path, vgm=None)[0].cost == result.cost


def test_damaged_entries_are_noticed_and_made_again(tmp_path):
    done = without_wall(journaled(tmp_path, *FULL, vgm=Painter())[0])
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        flipped = whole[:80] + bytes([whole[80] ^ 1]) + whole[81:]
        for broken in (whole[: len(whole) // 2], b"", flipped):
            path.write_bytes(broken)
            role = path.name.split("-")[0]
            lost = {"planner": [plan(left=2)], "verifier": [reject()], "vgm": []}[role]
            try:
                result, _ = journaled(tmp_path, *lost, vgm=Painter())
            except (IndexError, AssertionError):
                # the entry was another of that role: what matters is that it was asked for again
                continue
            assert role == "vgm" or without_wall(result)[0] == done[0]
            path.write_bytes(whole)


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_power_cut_between_write_and_rename_costs_the_call_under_way_at_most(
        cut, tmp_path, monkeypatch):
    undisturbed = without_wall(journaled(tmp_path / "a" / "journal", *FULL, vgm=Painter())[0])
    renames, replace, vgm, first = itertools.count(1), Path.replace, Painter(), Script(*FULL)

    def power(path, target):
        if next(renames) == cut:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", power)
    config, folder = c.Config(seconds_first=2, seconds_next=1), tmp_path / "b" / "journal"
    with pytest.raises(KeyboardInterrupt):
        c.CollabVR(vgm, first, config, c.Journal(folder)).run(I0, "q")
    monkeypatch.undo()
    assert list(folder.glob("*.tmp"))
    kept = [json.loads(p.read_bytes().partition(b"\n")[2]) for p in folder.glob("[pv]*.json")]
    replies, clips = (sum(k in entry for entry in kept) for k in ("replies", "errors"))
    assert len(first.calls) + len(vgm.calls) - len(kept) <= 1
    vgm.calls = vgm.calls[:clips]  # Painter's colours are the numbers of its calls
    result, _ = journaled(folder, *FULL[replies:], vgm=vgm)
    assert without_wall(result) == undisturbed


def test_over_200_steps_memory_grows_by_the_accepted_frames_and_a_step_costs_the_same(tmp_path):
    import tracemalloc

    steps, marks, frame = 200, [], np.zeros((64, 64, 3), np.uint8)

    def vlm(instructions, parts, schema):
        if schema is c.Plan:
            marks.append((time.process_time(), tracemalloc.get_traced_memory()[0]))
        return json.dumps(plan(left=2) if schema is c.Plan else accept("partial")), {}

    config = c.Config(N_max=steps, seconds_first=4, seconds_next=4)
    tracemalloc.start()
    try:
        result = c.CollabVR(Painter(), vlm, config, c.Journal(tmp_path)).run(frame, "q")
    finally:
        tracemalloc.stop()
    one = 17 * 64 * 64 * 3
    # Painter keeps a copy of the conditioning frame itself; the plans' lines are text
    assert result.cost.clips == steps and len(marks) == steps
    grown = marks[-1][1] - marks[50][1]
    assert grown < 1.2 * one * (steps - 51)
    early, late = (marks[b][0] - marks[a][0] for a, b in ((20, 80), (139, 199)))
    assert late < 1.5 * early + 0.2


def test_equal_requests_are_kept_apart(tmp_path):
    journal = c.Journal(tmp_path)
    keys = [journal.key("vgm", I0, "p", 1.0), journal.key("vgm", I0, "p", 1.0),
            c.Journal(tmp_path).key("vgm", I0, "p", 1.0)]
    assert keys[0] != keys[1] and keys[0] == keys[2]


# -------------------------------------------------------------------------------- command line


def cli(*argv, **env):
    """(exit status, stdout, stderr) of a real process."""
    env = {k: v for k, v in os.environ.items() if "API_KEY" not in k} | {
        k: str(v) for k, v in env.items()}
    done = subprocess.run([sys.executable, str(ROOT / "collabvr.py"), *map(str, argv)], check=False,
                          capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(I0).save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def bad(capsys, *argv):
    """main() on bad input: its one sentence, after checking that it is one."""
    assert c.main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("collabvr: ") and err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("argv, said", [
    (["--task", "t"], "--image"),
    (["--image", "nowhere.png", "--task", "t"], "nowhere.png cannot be read"),
    (["--image", __file__, "--task", "t"], "cannot be read as a picture"),
    (["--image", "X", "--task", "  "], "task is empty"),
    (["--image", "X", "--task", "move \udcff"], "no text"),
    (["--image", "X", "--task", "t", "--n-max", "0"], "--n-max"),
    (["--image", "X", "--task", "t", "--n-max", "99999999999"], "--n-max"),
    (["--image", "X", "--task", "t", "--attempts", "two"], "--attempts"),
    (["--image", "X", "--task", "t", "--seconds-first", "nan"], "--seconds-first"),
    (["--image", "X", "--task", "t", "--partial", "1.5"], "--partial"),
    (["--image", "X", "--task", "t", "--modules", "m3"], "modules"),
    (["--image", "X", "--task", "t", "--request-extra", "{"], "--request-extra"),
    (["--image", "X", "--task", "t", "--vgm", "no.py:g"], "--vgm no.py:g cannot be loaded"),
    (["--image", "X", "--task", "t", "--colour"], "--colour"),
    (["--image", "X", "--task", "t"], "No API key for generativelanguage.googleapis.com"),
    (["--image", "X", "--task", "t", "--vlm-url", "http://127.0.0.1:9/v1", "--vlm", "m"],
     "127.0.0.1 answered nothing usable"),
    (["--image", "X", "--task", "t", "--vlm-url", "user:secret@example.org/v1"], "http://HOST"),
    (["--image", "X", "--task", "t", "--vlm-url", "http://user:secret@example.org/v1"],
     "without user, password"),
    (["--image", "X", "--task", "t", "--vlm-url", "http://example.org/v1?key=secret"],
     "without user, password"),
    (["--image", "X", "--task", "t", "--vlm-url", "http://[::1/v1"], "--vlm-url"),
    (["--image", "X", "--task", "t", "--vlm-url", "http://example.org:80x/v1"], "--vlm-url"),
    (["--image", "X", "--task", "t", "--max-vgm-seconds", "5"], "--max-vgm-seconds must allow"),
    (["--image", "X", "--task", "t", "--vgm", "./no-folder", "--vlm-url", "http://127.0.0.1:9/v1"],
     "127.0.0.1 answered nothing usable"),
])
def test_bad_input_gets_one_sentence_and_exit_status_2(
        argv, said, capsys, picture, tmp_path, monkeypatch):
    for key in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    # the client's pauses between its retries
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    out = [] if "X" not in argv else ["--out", tmp_path / "out"]
    sentence = bad(capsys, *[picture if a == "X" else a for a in argv], *out)
    assert said in sentence and "secret" not in sentence
    assert not list(tmp_path.glob("out/*.mp4"))


@pytest.mark.parametrize("text", ["[1]", "{", '{"colour": 1}', "\xff"])
def test_options_that_come_with_a_checkpoint_are_checked(text, tmp_path, picture, capsys):
    (tmp_path / "collabvr.json").write_text(text, encoding="latin-1")
    said = bad(capsys, "--image", picture, "--task", "t", "--vgm", tmp_path)
    assert "collabvr.json holds no options" in said


def test_a_picture_of_absurd_size_is_refused(tmp_path, capsys):
    Image.new("1", (9000, 9000)).save(tmp_path / "big.png")
    Image.new("1", (9, 9)).save(tmp_path / "small.png")
    for name in ("big", "small"):
        assert "pixels" in bad(capsys, "--image", tmp_path / f"{name}.png", "--task", "t")


def test_importing_and_help_need_no_heavy_package():
    heavy = ["torch", "diffusers", "transformers", "openai", "numpy", "imageio", "av", "PIL"]
    code = f"import sys, collabvr; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                          cwd=ROOT)
    assert done.stdout == "[]\n"
    status, out, _ = cli("--help")
    assert status == 0 and "--on-exhausted" in out and "App. A.1" in out


class Endpoint:
    """A real OpenAI-compatible server on a free port that plays a list of behaviours, one per chat
    request."""

    def __init__(self, *behaviours):
        self.behaviours, self.requests, outer = list(behaviours), [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                model = {"id": "models/test", "object": "model", "created": 0, "owned_by": "x"}
                self.send(200, {"object": "list", "data": [model]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.headers["Authorization"], body))
                do = outer.behaviours.pop(0)
                if callable(do):
                    return do(self)
                if isinstance(do, tuple):
                    return self.send(*do)
                content = do if do is None or isinstance(do, str) else json.dumps(do)
                message = {"role": "assistant", "content": content}
                self.send(200, {
                    "id": "1", "object": "chat.completion", "created": 0, "model": "test-0926",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                    "usage": {"prompt_tokens": 9999, "completion_tokens": 5, "total_tokens": 1}})

            def send(self, status, body, **headers):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                kind = "text/html" if isinstance(body, str) else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                for k, v in headers.items():
                    self.send_header(k.replace("_", "-"), v)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", "choi')
    handler.close_connection = True
    handler.connection.close()


def hang(handler):
    time.sleep(1.0)
    with contextlib.suppress(OSError):
        handler.send(200, {})


GENERATOR = """
import numpy as np, collabvr, os
def painter(frame, prompt, seconds, seed):
    with open(os.environ["COUNT"], "a") as f: f.write("x")
    frames = np.repeat(frame[None], int(seconds * 4) + 1, 0)
    frames[1:, :8] = seed * 40
    return collabvr.Clip(frames, 4)
"""


def spellings(secret):
    """A secret as bytes: as it is, in a URL, and in base64 at the three places in a group."""
    secret = secret.encode()
    yield secret
    yield urllib.parse.quote(secret, safe="").encode()
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret + b"x")
        yield text[(8 * before + 5) // 6 : 8 * (before + len(secret)) // 6]


@pytest.fixture
def job(tmp_path, picture, monkeypatch, capsys):
    """The arguments of a whole run with a generator from a file; COUNT counts its calls. Whatever
    a test does with it, the key is found neither in what was written nor in what was printed."""
    (tmp_path / "gen.py").write_text(GENERATOR)
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    yield ["--image", picture, "--task", "t", "--out", str(tmp_path / "out"),
           "--vgm", f"{tmp_path / 'gen.py'}:painter", "--vlm", "test",
           "--seconds-first", "2", "--seconds-next", "1"]
    seen = "".join(capsys.readouterr()).encode() + b"".join(
        p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert not [text for text in spellings("sk-secret-123") if text in seen]


def test_a_whole_run_over_http_with_429_500_503_a_cut_connection_and_a_hang(
        job, tmp_path, capsys, monkeypatch):
    naps, real, main = [], time.sleep, threading.main_thread()
    monkeypatch.setattr(time, "sleep", lambda s: (
        real(s) if threading.current_thread() is not main else naps.append(s)))
    overloaded = [{"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}]
    faults = [lambda h: h.send(429, {"error": {}}, Retry_After="2"), (500, {}), (503, overloaded),
              cut, hang, None, "Accept."]
    replies = [*faults[:5], plan(left=2), *faults[5:], accept("partial"), plan(), accept()]
    with Endpoint(*replies) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--timeout", "0.5"]) == 0
    out, err = capsys.readouterr()
    assert "status     complete" in out and len(naps) >= 5 and 2.0 in naps
    assert endpoint.requests[0][0] == "Bearer sk-secret-123"
    body = endpoint.requests[-1][1]
    assert body["temperature"] == 0.2
    assert body["response_format"]["json_schema"]["name"] == "Verification"
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert trace["status"] == "complete" and trace["models"] == ["test-0926"]
    assert trace["cost"]["vgm_seconds"] == 3
    assert trace["cost"]["vlm_calls"] == {"planner": 2, "verifier": 4, "router": 0}
    assert [a["status"] for s in trace["steps"] for a in s["attempts"]] == ["accept", "accept"]
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert b"sk-secret" not in written and "sk-secret" not in out + err
    # the same command again needs neither endpoint nor key nor generator
    monkeypatch.delenv("OPENAI_API_KEY")
    before = (tmp_path / "count").read_text()
    assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert (tmp_path / "count").read_text() == before
    assert json.loads((tmp_path / "out" / "trace.json").read_text())["cost"] == trace["cost"]


def test_an_endpoint_that_refuses_ends_the_run_in_one_sentence_and_the_next_start_goes_on(
        job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    refusal = (400, [{"error": {"message": "bad key sk-secret-123", "status": "INVALID_ARGUMENT"}}])
    with Endpoint(plan(left=2), accept(), refusal) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 1
    err = capsys.readouterr().err
    assert "INVALID_ARGUMENT" in err and "Traceback" not in err and "sk-secret" not in err
    assert "the same command goes on" in err
    partial = tmp_path / "out" / "partial.mp4"
    assert partial.exists() and not (tmp_path / "out" / "video.mp4").exists()
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert len((tmp_path / "count").read_text()) == 2 and not partial.exists()


def chat(content, **others):
    """A chat completion's body with that content, and what differs from the usual."""
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "test",
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 9999, "completion_tokens": 5, "total_tokens": 10004}}
    return 200, body | others


YES = json.dumps(accept())
NO_MESSAGE = [{"index": 0, "finish_reason": "stop", "message": None}]
SAID = {"role": "assistant", "content": YES}
CUT_OFF = [{"index": 0, "finish_reason": "length", "message": SAID}]
FILTERED = [{"index": 0, "finish_reason": "content_filter", "message": SAID}]


@pytest.mark.parametrize("odd", [
    chat(YES, choices=[]), chat(YES, choices=None), chat(YES, choices=NO_MESSAGE),
    chat(YES, choices=CUT_OFF), chat(YES, choices=FILTERED), chat(None), chat([YES]), chat(""),
    chat("Accept."), chat(YES[:-20]), chat(YES + YES), chat(f"Here it is: {YES}"),
    chat(YES.replace("accept", "maybe")), chat(YES.replace("accept", "Accept.")),
    chat(YES.replace("1.0", "1.7")), chat(YES.replace("1.0", "NaN")),
    chat(YES.replace("1.0", '"1.0"')), chat(YES.replace("as planned", "\\ud83d")),
    chat(YES.replace('"confidence"', '"verdict": "accept", "confidence"')),
    chat("x" * 10_000_000), chat("[" * 100_000), (200, "<html>busy</html>"),
    lambda h: h.send(200, "{", Content_Type="application/json"),
], ids=lambda x: None)
def test_an_odd_answer_is_asked_for_again_and_never_an_accept(odd, job, tmp_path):
    with Endpoint(plan(left=1), odd, reject(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    (step,) = json.loads((tmp_path / "out" / "trace.json").read_text())["steps"]
    assert [a["status"] for a in step["attempts"]] == ["reject", "accept"]
    assert len(endpoint.requests) == 4


def test_replies_in_fences_with_markup_or_without_usage_are_taken_as_they_are(job, tmp_path):
    markup = accept() | {"reason": "<b>\x1b[2J\x07\u202e</b> ![x](http://example.org)"}
    fenced = f"```json\n{json.dumps(markup)}\n```"
    with Endpoint(plan(), chat(fenced, usage=None)) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert trace["steps"][0]["attempts"][0]["reason"] == markup["reason"]


def test_nothing_that_a_model_says_can_steer_the_terminal(job):
    sly = accept() | {"reason": "\x1b[2J\x1b]0;owned\x07\u202e"}
    with Endpoint(plan(), sly) as endpoint:
        status, out, err = cli(*job, "--vlm-url", endpoint.url, OPENAI_API_KEY="k", PYTHONPATH=ROOT)
    assert status == 0 and "[2J" in err and not {"\x1b", "\x07", "\u202e"} & set(out + err)


def test_thoughts_that_an_endpoint_does_not_count_as_completion_are_counted(job, tmp_path):
    usage = {"prompt_tokens": 9000, "completion_tokens": 5, "total_tokens": 9800}
    with Endpoint(plan(), chat(YES, usage=usage)) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    cost = json.loads((tmp_path / "out" / "trace.json").read_text())["cost"]
    assert cost["tokens_out"]["verifier"] == 800


def test_a_key_that_an_endpoint_or_a_generator_repeats_is_printed_and_written_nowhere(
        job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    monkeypatch.setenv("MY_TOKEN", "t-secret-456")
    (tmp_path / "gen.py").write_text(
        "import os\ndef painter(*a): raise ValueError('no ' + os.environ['MY_TOKEN'])")
    refusal = (401, {"error": {"message": "x" * 260 + "bad key sk-secret-123 is not valid"}})
    with Endpoint(plan(), refusal) as endpoint:
        for _ in range(2):
            assert c.main([*job, "--vlm-url", endpoint.url, "--vgm-arg", "key=t-secret-456"]) == 1
    out, err = capsys.readouterr()
    written = b"".join(p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())
    for secret in ("sk-secret", "t-secret"):
        assert secret not in out + err and secret.encode() not in written


def test_another_generator_in_the_same_folder_is_not_taken_for_the_first(job, tmp_path):
    with Endpoint(plan(), accept(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
        (tmp_path / "other.py").write_text(GENERATOR)
        job[job.index("--vgm") + 1] = f"{tmp_path / 'other.py'}:painter"
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_a_generator_can_be_a_class_with_arguments_in_a_file_with_postponed_annotations(
        job, tmp_path):
    (tmp_path / "gen.py").write_text("from __future__ import annotations\n" + GENERATOR + """
from dataclasses import dataclass
@dataclass
class Painter:
    colour: str
    fps: int = 4
    def __call__(self, *request):
        assert self.colour == "a=b"
        return painter(*request)
""")
    job[job.index("--vgm") + 1] = f"{tmp_path / 'gen.py'}:Painter"
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--vgm-arg", "colour=a=b"]) == 0


def test_a_page_in_place_of_the_list_of_models_is_noticed(job, capsys):
    with Endpoint() as endpoint:
        endpoint.server.RequestHandlerClass.do_GET = lambda h: h.send(200, "<html>hello</html>")
        assert "answered nothing usable" in bad(capsys, *job, "--vlm-url", endpoint.url)


def test_an_unknown_model_is_noticed_before_anything_is_asked(job, capsys):
    with Endpoint() as endpoint:
        said = bad(capsys, *job, "--vlm-url", endpoint.url, "--vlm", "other")
        assert "has no model 'other'; it has test" in said


def test_clips_can_be_sent_as_raw_video_and_extra_fields_as_json(job, tmp_path):
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--video-input", "video",
                       "--temperature", "none", "--request-extra", '{"top_k": 5}']) == 0
    body = endpoint.requests[-1][1]
    assert "temperature" not in body and body["top_k"] == 5
    kinds = [piece["type"] for piece in body["messages"][1]["content"]]
    assert kinds.count("video_url") == 1 and kinds.count("image_url") == 1


def test_media_that_an_endpoint_drops_are_noticed(job, caplog):
    def few_tokens(handler):
        message = {"role": "assistant", "content": json.dumps(accept())}
        handler.send(200, {
            "id": "1", "object": "chat.completion", "created": 0, "model": "test",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}})

    with Endpoint(plan(), few_tokens) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert caplog.text.count("drop the media") == 1


def test_a_full_disk_ends_the_run_in_one_sentence_and_loses_nothing(job, tmp_path):
    import resource

    noise = GENERATOR.replace("seed * 40", "np.random.default_rng(seed).integers(0, 256, "
                                           "frames[1:, :8].shape)")
    (tmp_path / "gen.py").write_text(noise)
    with Endpoint(plan(), accept()) as endpoint:
        done = subprocess.run(
            [sys.executable, str(ROOT / "collabvr.py"), *job, "--vlm-url", endpoint.url],
            check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "File too large" in done.stderr and "same command goes on" in done.stderr
        assert not list((tmp_path / "out").rglob("*.mp4"))
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert len(endpoint.requests) == 2  # the plan was safe
    assert (tmp_path / "count").read_text() == "xx"  # the clip could not be kept


def test_google_keys_go_to_googles_host_only(monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "g"), monkeypatch.setenv("OPENAI_API_KEY", "o")
    assert c.OpenAIVLM().key == "g"
    elsewhere = c.OpenAIVLM(vlm_url="http://example.org:80/generativelanguage.googleapis.com")
    assert (elsewhere.key, elsewhere.host) == ("o", "example.org")
    assert c.OpenAIVLM(vlm_url="http://generativelanguage.googleapis.com.evil.org").key == "o"


def test_a_dry_run_checks_everything_and_generates_nothing(job, tmp_path, capsys, caplog):
    with Endpoint() as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--dry-run"]) == 0
    assert "nothing was generated" in capsys.readouterr().out
    assert "127.0.0.1 will see the pictures. At worst: 12 clips" in caplog.text
    assert not (tmp_path / "out").exists() and not (tmp_path / "count").exists()


def test_another_task_in_the_same_folder_is_refused(job, capsys):
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    capsys.readouterr()
    job[job.index("--task") + 1] = "another"
    said = bad(capsys, *job, "--vlm-url", endpoint.url)
    assert "belongs to a run with another image or task" in said


def test_a_second_process_on_one_folder_is_refused_and_sigterm_leaves_the_folder_to_the_next(
        job, tmp_path, capsys):
    with Endpoint(plan(), hang, accept()) as endpoint:
        endpoint.behaviours[1] = lambda handler: time.sleep(3)
        command = [sys.executable, str(ROOT / "collabvr.py"), *job, "--vlm-url", endpoint.url]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as other:
            while len(endpoint.requests) < 2:
                time.sleep(0.02)
            assert "Another process is at work" in bad(capsys, *job, "--vlm-url", endpoint.url)
            other.send_signal(signal.SIGTERM)
            assert "Interrupted" in other.stderr.read()
        assert other.returncode == 130
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert (tmp_path / "count").read_text() == "x" and len(endpoint.requests) == 3


def test_kill_9_loses_at_most_the_call_under_way(job, tmp_path):
    with Endpoint(plan(), None, accept()) as endpoint:
        endpoint.behaviours[1] = lambda handler: time.sleep(3)
        command = [sys.executable, str(ROOT / "collabvr.py"), *job, "--vlm-url", endpoint.url]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=env) as other:
            while len(endpoint.requests) < 2:
                time.sleep(0.02)
            other.kill()
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert (tmp_path / "count").read_text() == "x" and len(endpoint.requests) == 3


# ------------------------------------------------------------------------------------- anything


quick = hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(
    hypothesis.HealthCheck))
words = st.text(st.characters(exclude_characters="\0"))


@pytest.fixture(scope="module")
def listener():
    with Endpoint() as endpoint:
        yield endpoint.url


@quick
@hypothesis.given(task=words, name=st.sampled_from([
    "--n-max", "--attempts", "--seconds-first", "--seconds-next", "--max-vgm-seconds", "--seed",
    "--partial", "--modules", "--temperature", "--verify-fps", "--timeout", "--request-extra",
    "--on-exhausted", "--video-input", "--fps", "--offload", "--vlm", "--vgm-arg", "--vlm-url"]),
    value=words | st.floats().map(str) | st.integers().map(str))
def test_whatever_is_typed_is_taken_or_refused_in_one_sentence(
        task, name, value, job, listener, capsys, tmp_path):
    hypothesis.assume(name != "--vlm-url" or not value.startswith("http"))  # it would be called
    job[job.index("--task") + 1] = task
    status = c.main([*job, "--vlm-url", listener, "--dry-run", name, value])
    out, err = capsys.readouterr()
    assert (status, out[-1:]) in ((0, "\n"), (2, ""))
    assert status == 0 or err.startswith("collabvr: ") and err.rstrip("\n").isprintable()
    assert not (tmp_path / "out").exists()


@quick
@hypothesis.given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_picture_is_read_or_refused(data, kind, tmp_path):
    raw = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    Image.fromarray(noise).save(raw, kind)
    raw = bytearray(raw.getvalue())
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        picture = c.load_image(str(tmp_path / "x"))
    except c.Problem as problem:
        assert "cannot be read" in str(problem) or "pixels" in str(problem)
    else:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
almost = st.fixed_dictionaries({k: st.just(v) | anything for k, v in accept().items()})


@quick
@hypothesis.given(reply=anything | almost)
def test_a_reply_is_a_verdict_only_if_every_field_of_it_is_what_it_should_be(reply):
    run = c.CollabVR(None, None)
    run.begin()
    text = json.dumps(reply)
    d, fault = run.receive("verifier", {"text": text, "wall_seconds": 0.0}, c.Verification, {})
    assert (d is None) == (fault is not None)
    if d:
        assert reply["verdict"] == d.verdict and 0 <= reply["good_fraction"] <= 1
        assert type(reply["action_executed"]) is bool and set(reply) == set(accept())


def is_a_name(text):
    with contextlib.suppress(UnicodeEncodeError):  # half a character, which no file is called
        return "/" not in text and "\0" not in text and len(os.fsencode(text)) < 100


@quick
@hypothesis.given(stem=(words | st.binary().map(os.fsdecode)).filter(is_a_name))
@hypothesis.example(stem="\udcff")  # a byte that is no UTF-8
def test_no_name_of_a_picture_leads_out_of_the_runs_folder(stem, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = tmp_path / f"x{stem}.png"
    Image.fromarray(I0).save(named, "PNG")
    at = job.index("--out")
    replies = [json.dumps(plan()), json.dumps(accept())]
    monkeypatch.setattr(c.OpenAIVLM, "__call__", lambda *_: (replies.pop(0), {}))
    monkeypatch.setattr(c.OpenAIVLM, "check", lambda _: None)
    argv = [*job[:at], *job[at + 2 :], "--vlm-url", "http://127.0.0.1:9/v1"]
    argv[argv.index("--image") + 1] = str(named)
    before = {p.name for p in tmp_path.iterdir()}
    try:
        assert c.main(argv) == 0
        (made,) = (tmp_path / "runs").iterdir()
        assert (made / "video.mp4").exists()
        assert json.loads((made / "trace.json").read_bytes())["image"] == str(named)
        assert {p.name for p in tmp_path.iterdir()} - before <= {"runs", "count"}
    finally:
        named.unlink()
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)


# ------------------------------------------------------------------------------- the real pipeline


@pytest.fixture(scope="module")
def wan():
    defaults = json.loads((TINY_WAN / "collabvr.json").read_text())
    known = {k: v for k, v in defaults.items() if k in c.Wan.__pydantic_fields__}
    return c.Wan(vgm=str(TINY_WAN), **known)


def test_tiny_wan_makes_the_same_clip_from_the_same_seed_bit_for_bit(wan):
    frame = np.full((64, 64, 3), 200, np.uint8)
    prompt = "Move the red circle right 2 cells."
    one, two, other = (wan(frame, prompt, 2.0, seed) for seed in (5, 5, 6))
    assert one.frames.shape == (17, 64, 64, 3) and one.frames.dtype == np.uint8 and one.seconds == 2
    assert (one.frames == two.frames).all() and (one.frames != other.frames).any()


def test_frames_per_clip_are_4_k_plus_1(wan):
    frame = np.full((64, 80, 3), 200, np.uint8)
    assert [len(wan(frame, "x", s, 0).frames) for s in (0.5, 1.0, 1.2)] == [5, 9, 9]


def test_frames_that_are_not_finite_and_too_little_memory_are_failed_generations(wan, monkeypatch):
    import torch

    weight = wan.pipe.vae.decoder.conv_out.weight
    kept = weight.detach().clone()
    torch.nn.init.constant_(weight, float("nan"))
    try:
        with pytest.raises(c.Problem, match="failed twice in a row .*not finite"):
            go(plan(), vgm=wan)
    finally:
        weight.data.copy_(kept)

    def full(*args, **others):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(wan.pipe.vae, "decode", full)
    with pytest.raises(c.Problem, match="failed twice in a row .*out of memory"):
        go(plan(), vgm=wan)


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_come_from_safetensors_only_and_code_in_a_checkpoint_is_not_run(tmp_path):
    folder, trap = shutil.copytree(TINY_WAN, tmp_path / "wan"), tmp_path / "executed"
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(c.Problem, match="cannot be loaded"):
        _ = c.Wan(vgm=str(folder)).pipe
    shutil.copy(TINY_WAN / "text_encoder" / "model.safetensors", folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": ["pipeline", "Own"], "scheduler": ["own_scheduler", "Own"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    code = f"from pathlib import Path; Path({str(trap)!r}).touch()\nclass Own: pass\n"
    for path in ("pipeline.py", "scheduler/own_scheduler.py"):
        (folder / path).write_text(code)
    with pytest.raises(c.Problem, match="cannot be loaded"):
        _ = c.Wan(vgm=str(folder)).pipe
    assert not trap.exists()


def test_without_a_gpu_the_big_checkpoint_is_refused_with_the_offline_command(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(c.Problem, match="needs a CUDA GPU.*examples/maze/run.py"):
        c.Wan().place()


# ------------------------------------------------------------------- the file keeps its promises


def test_the_line_tags_of_algorithm_1_ascend_and_are_all_there():
    source = (ROOT / "collabvr.py").read_text()
    tags = [int(n) for n in re.findall(r"# line (\d+)$", source, re.MULTILINE)]
    assert tags == sorted(tags) and set(tags) >= {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 19}


def test_every_departure_is_listed_tagged_where_it_happens_and_explained_in_the_readme():
    source, readme = (ROOT / "collabvr.py").read_text(), (ROOT / "README.md").read_text()
    head, body = c.__doc__, source.replace(c.__doc__, "")
    listed = re.findall(r"^\[(D\d+)\]", head, re.MULTILINE)
    assert listed == [f"D{i}" for i in range(1, len(listed) + 1)]
    assert set(re.findall(r"\[(D\d+)\]", body)) == set(listed)
    assert set(re.findall(r"\b(D\d+)\b", readme)) >= set(listed)
    explained = set(re.findall(r"\[(D\d+)\] Paper:.*?Here:.*?Because:", body, re.DOTALL))
    assert explained == set(listed)


def test_the_inline_metadata_pins_what_requirements_txt_pins():
    source = (ROOT / "collabvr.py").read_text()
    block = re.search(r"# dependencies = \[(.*?)\]\n", source, re.DOTALL)[1]
    pins = set(re.findall(r'"([^"]+)"', block))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = {line.split("#")[0].strip() for line in lines} - {""}
    assert pins <= required
    others = {"pytest", "ruff", "tqdm", "hypothesis", "matplotlib"}
    assert {p.split("==")[0] for p in required - pins} <= others


def test_the_examples_main_job_runs_offline_and_ends_in_a_verified_video(tmp_path):
    example = ROOT / "examples" / "maze" / "run.py"
    command = [sys.executable, str(example), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert trace["cost"]["clips"] >= 3 and trace["cost"]["vlm_calls"]["verifier"] >= 3
    assert trace["models"] == ["maze-reader"]
    assert "by rule" in done.stdout and (tmp_path / "run" / "video.mp4").stat().st_size > 1000
