"""Tests of collabvr.py: no network, no GPU. Their names, read in order, tell what the method does.

The models are scripted: `Painter` is a generator that paints the number of its call into the
frames, `Script` a VLM that reads its replies from a list. No mock library.
"""

import base64
import contextlib
import http.server
import importlib.util
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from fractions import Fraction
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
ROLE = {"FirstPlan": "planner", "Plan": "planner", "Verification": "verifier",
        "Routing": "router", "LastRouting": "router"}


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
        return painted(frame, seconds, len(self.calls), self.fps)


def painted(frame, seconds, colour, fps=4):
    frames = np.repeat(frame[None], int(seconds * fps) + 1, 0)
    frames[1:] = colour
    return c.Clip(frames, fps)


class Script:
    """A VLM: answers from a list, checks that the right role asks, keeps what it was shown."""

    def __init__(self, *replies):
        self.replies, self.calls = list(replies), []

    def __call__(self, instructions, parts, schema):
        self.calls.append({"role": ROLE[schema.__name__], "parts": parts, "text": text_of(parts),
                           "instructions": instructions, "schema": schema.__name__})
        reply = self.replies.pop(0)
        if isinstance(reply, dict):
            asked = f"{schema.__name__} was asked for, the script has {reply}"
            assert set(schema.model_fields) == set(reply), asked
        return said(reply)

    def roles(self):
        return "".join(call["role"][0] for call in self.calls)


def said(reply, **others):
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return {"text": text, "tokens_in": 100, "tokens_out": 10, "model": "script-1"} | others


def text_of(parts):
    return "\n".join(p for p in parts if isinstance(p, str))


def plan(instruction="move it", left=1, done=False, target="there"):
    return {"observation": "a maze", "remaining_goal": "the rest", "task_complete": done,
            "instruction": instruction, "target_state": target, "estimated_steps_remaining": left}


def accept(progress="complete", executed=True):
    return {"reason": "as planned", "action_executed": executed, "progress": progress,
            "good_fraction": 1.0, "suggestion": "", "confidence": "high", "verdict": "accept"}


def reject(good=0.5, suggestion="go left", reason="it went right"):
    return {"reason": reason, "action_executed": False, "progress": "none", "good_fraction": good,
            "suggestion": suggestion, "confidence": "low", "verdict": "reject"}


def route(action, suggestion="slower", steps=0):
    return {"reason": "so it is", "action": action, "suggestion": suggestion,
            "estimated_steps": steps}


def go(*replies, vgm=None, vlm=None, folder=None, q="solve the maze", seed=0, **config):
    """Runs a script to its end; (result, generator, VLM, models)."""
    vgm, vlm = vgm or Painter(), vlm or Script(*replies)
    models = c.RecordedModels(vgm, vlm, folder, seed) if folder else c.Models(vgm, vlm, seed)
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    try:
        result = c.CollabVR(models, config).run(I0, q)
    finally:
        if folder:
            models.lock.release()
    assert not getattr(vlm, "replies", None), "the run ended before the script did"
    return result, vgm, vlm, models


def colours(clip):
    """The calls that the frames come from, frame 0 apart."""
    return [k for k, _ in itertools.groupby(clip.frames[1:, 0, 0, 0].tolist())]


@pytest.fixture
def unsynced(monkeypatch):
    """Many calls that do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


# -------------------------------------------------------------------------------- Algorithm 1


def test_the_trace_of_figure_10_reject_evolve_accept_plan_again_accept():
    result, vgm, vlm, _ = go(plan("go right", left=2), reject(suggestion="to the right, not up"),
                             accept("partial"), plan("go down", left=1), accept())
    assert vlm.roles() == "pvvpv"
    assert [call["prompt"] for call in vgm.calls] == [
        "go right", "go right Correction: to the right, not up", "go down"]
    assert result.status == "complete" and result.unverified_steps == []
    assert colours(result.video) == [2, 3]  # the rejected first clip is not in it
    assert result.video.seconds == 3 and len(result.video.frames) == 3 * 4 + 1


def test_figure_10_the_clip_that_follows_the_evolved_action_and_not_the_first_plan_is_accepted():
    places = {"right of the last green book": 1, "first empty gap": 2}

    def named_last(text):
        return max(places, key=text.rfind)

    def vgm(frame, prompt, seconds, seed):  # the first plan is beyond it
        colour = places[named_last(prompt)]
        return painted(frame, seconds, 9 if colour == 1 else colour)

    def vlm(instructions, parts, schema):  # compares the clip with what it was told
        if ROLE[schema.__name__] == "planner":
            return said(plan("put the book right of the last green book", target="it stands"))
        (told,) = (x for x in parts if isinstance(x, str) and x.startswith("Planned action: "))
        shown = [x for x in parts if isinstance(x, c.Clip)][-1].frames[-1, 0, 0, 0]
        right = shown == places[named_last(told)]
        return said(accept() if right else reject(suggestion="put it into the first empty gap"))

    result, *_, models = go(vgm=vgm, vlm=vlm, on_exhausted="replan")
    assert result.status == "complete" and colours(result.video) == [2]
    assert [x["role"] for x in models.calls] == ["planner", *["vgm", "verifier"] * 2]


def test_every_attempt_of_a_step_starts_from_one_frame_and_the_next_step_from_the_accepted_last():
    _, vgm, *_ = go(plan(left=2), reject(), accept(), plan(), accept())
    first, second, third = (call["frame"] for call in vgm.calls)
    assert (first == I0).all() and (second == I0).all() and (third == 2).all()


def test_each_attempt_of_a_step_is_as_long_as_the_step():
    _, vgm, *_ = go(plan(left=2), reject(), accept(), plan(), reject(), accept())
    assert [call["seconds"] for call in vgm.calls] == [2, 2, 1, 1]


def test_a_run_needs_between_1_and_9_clips_and_2_and_12_vlm_calls_without_the_router(unsynced):
    seen, steps = set(), []
    for seed in range(60):
        rng = random.Random(seed)

        def vlm(instructions, parts, schema, rng=rng, never=seed == 0):
            if ROLE[schema.__name__] == "planner":
                return said(plan(left=rng.choice([1, 2]),
                                 done=schema.__name__ == "Plan" and rng.random() < 0.2))
            return said(reject() if never else rng.choice(
                [accept("complete"), accept("partial"), reject(), reject(), reject()]))

        *_, models = go(vlm=vlm, on_exhausted=rng.choice(["replan", "best"]))
        cost = models.cost()
        assert "router" not in cost["calls"]
        assert cost["clips"] == cost["steps"] + cost["regenerations"]
        seen.add((cost["clips"], sum(cost["calls"].values()) - cost["calls"]["vgm"]))
        steps.append(cost["steps"])
    assert (min(n for n, _ in seen), max(n for n, _ in seen)) == (1, 9)
    assert (min(n for _, n in seen), max(n for _, n in seen)) == (2, 12)
    assert set(steps) == {1, 2, 3}


def test_complete_needs_the_last_step_of_the_plan_and_complete_progress():
    assert go(plan(left=1), accept("complete"))[0].status == "complete"
    result, _, vlm, _ = go(plan(left=2), accept("complete"), plan(left=1), accept("partial"),
                           plan(left=1), accept())
    assert vlm.roles() == "pvpvpv" and result.status == "complete"


def test_the_step_cap_ends_a_run_that_is_not_complete():
    result, vgm, *_ = go(*[plan(left=1), accept("partial")] * 3)
    assert result.status == "step_cap" and len(vgm.calls) == 3


def test_at_the_last_allowed_step_a_plan_that_sees_more_steps_left_ends_as_step_cap():
    result, *_ = go(*[plan(left=2), accept()] * 3)
    assert result.status == "step_cap" and result.unverified_steps == []
    assert go(plan(left=5), accept(), N_max=1)[0].status == "step_cap"


def test_the_planner_may_end_the_run_but_not_before_a_clip_joined():
    result, vgm, *_ = go(plan(left=2), accept("partial"), plan("", done=True))
    assert result.status == "complete" and len(vgm.calls) == 1
    result, vgm, vlm, _ = go(plan("then move", done=True), plan("move"), accept())
    assert vlm.roles() == "ppv" and [call["prompt"] for call in vgm.calls] == ["move"]


def test_the_schema_rules_out_task_complete_before_a_first_clip_and_split_at_the_last_step():
    first, later = (x.model_json_schema()["properties"]["task_complete"]
                    for x in (c.CollabVR.FirstPlan, c.CollabVR.Plan))
    assert first["const"] is False and later["type"] == "boolean" and "const" not in later
    early, last = (x.model_json_schema()["properties"]["action"]["enum"]
                   for x in (c.CollabVR.Routing, c.CollabVR.LastRouting))
    assert set(early) == {"regen", "split", "fallback"} and set(last) == {"regen", "fallback"}
    _, _, vlm, _ = go(plan(left=2), reject(), route("split"), plan(left=2), accept(),
                      plan(), reject(), route("fallback"), M=1)
    assert [call["schema"] for call in vlm.calls if call["role"] != "verifier"] == [
        "FirstPlan", "Routing", "FirstPlan", "Plan", "LastRouting"]


@pytest.mark.parametrize("empty", [plan(instruction=" "), plan(target="")])
def test_a_plan_without_an_action_or_its_target_state_is_asked_for_again(empty):
    _, vgm, _, models = go(empty, plan(), accept())
    assert models.cost()["calls"]["planner"] == 2 and vgm.calls[0]["prompt"] == "move it"


def test_every_clip_has_a_seed_of_its_own():
    _, vgm, *_ = go(plan(left=2), reject(), accept(), plan(), accept(), seed=40)
    assert [call["seed"] for call in vgm.calls] == [40, 41, 42]


# ------------------------------------------------------------- what the roles see, and evolve


def test_evolve_accumulates_and_falls_back_on_the_reason():
    _, vgm, *_ = go(plan("go"), reject(suggestion=" ", reason="it fell"),
                    reject(suggestion="go up"), accept())
    assert vgm.calls[2]["prompt"] == "go Correction: it fell Correction: go up"


def test_the_verifier_judges_the_action_as_it_stands_evolved_with_the_plans_target_state():
    _, _, vlm, _ = go(plan("go right", target="at the door"), reject(suggestion="hop"), accept())
    first, second = vlm.calls[1]["text"], vlm.calls[2]["text"]
    assert "Planned action: go right\nTarget state: at the door" in first and "hop" not in first
    assert "Planned action: go right Correction: hop\nTarget state: at the door" in second


def test_the_planner_sees_the_input_the_joined_clips_last_frames_and_what_came_of_each_step():
    _, _, vlm, _ = go(plan("one", left=3), accept("partial"), plan("two", left=2),
                      reject(reason="it fell"), reject(), reject(reason="no door"),
                      plan("three"), accept(), on_exhausted="replan")
    first, last = vlm.calls[0], vlm.calls[-2]
    assert "Steps so far:\nnone" in first["text"] and "Step: 1 of at most 3" in first["text"]
    assert [p.shape for p in last["parts"] if not isinstance(p, str)] == [I0.shape] * 2
    assert "one Outcome: accepted, progress partial" in last["text"]
    assert re.search("two.* Outcome: rejected, nothing was kept: no door", last["text"])
    assert "last allowed step" in last["text"] and "last allowed step" not in first["text"]


def test_the_planner_is_told_how_many_seconds_its_clip_will_show():
    _, _, vlm, _ = go(plan(left=2), accept("partial"), plan(), accept(), seconds_next=0.5)
    told = [call["text"] for call in vlm.calls if call["role"] == "planner"]
    assert "Clip length: 2 s" in told[0] and "Clip length: 0.5 s" in told[1]


@pytest.mark.parametrize("replies", [
    [plan(left=3), reject(), plan(left=2), reject(), plan(), reject()],
    [plan(left=3), reject(), route("regen"), reject(), plan(left=2), reject(), route("regen"),
     reject(), plan(), reject(), route("fallback")]])
def test_no_prompt_calls_a_clip_accepted_that_never_was(replies):
    kept = "route" if len(replies) > 6 else "best"
    _, _, vlm, _ = go(*replies, M=1, on_exhausted=kept)
    later = [call["text"] for call in vlm.calls if "Last frame of step 1" in call["text"]]
    assert later and all(re.search("Outcome: rejected, kept.*: it went", x) for x in later)
    assert not [x for x in vlm.calls if "accepted" in x["instructions"] + x["text"]]


def test_no_role_sees_more_than_the_newest_eight_clips():
    replies = [x for i in range(12) for x in (plan(str(i), left=2), accept("partial"))]
    _, _, vlm, _ = go(*replies, N_max=12)
    for call in vlm.calls[-2:]:
        frames = [p for p in call["parts"] if isinstance(p, str) and "Last frame of" in p]
        assert len(frames) == 8 and "step 11" in frames[-1]


# ------------------------------------------------------------------ when a step is exhausted


def test_of_a_router_without_a_suggestion_the_verifiers_counts():
    for action in ("regen", "fallback"):
        then = [accept()] * (action == "regen")
        _, vgm, *_ = go(plan(), reject(suggestion="go left"), route(action, " "), *then, M=1)
        assert vgm.calls[1]["prompt"].endswith(" Correction: go left")


def test_replan_is_algorithm_1_to_the_letter_nothing_joins_and_the_frame_stays():
    result, vgm, *_ = go(plan(left=2), reject(), reject(), plan(), accept(),
                         M=2, on_exhausted="replan")
    assert (vgm.calls[2]["frame"] == I0).all() and colours(result.video) == [3]


def test_best_joins_the_attempt_with_the_most_good_seconds_the_latest_of_equals():
    result, vgm, *_ = go(plan(left=2), reject(0.7), reject(0.7), reject(0.1), plan(), accept(),
                         on_exhausted="best")
    assert colours(result.video) == [2, 4] and result.unverified_steps == [1]
    assert (vgm.calls[3]["frame"] == 2).all()


def test_a_run_that_accepts_nothing_returns_the_attempt_with_the_most_good_seconds_marked_so():
    replies = [plan(), reject(0.2), plan(), reject(0.6), plan(), reject(0.3)]
    result, *_ = go(*replies, M=1, on_exhausted="replan")
    assert result.status == "best_attempt" and colours(result.video) == [2]
    assert result.unverified_steps == [2]
    replies = [plan(), reject(0.5), plan(), reject(0.9)]  # 0.5 of 2 s are more than 0.9 of 1 s
    result, *_ = go(*replies, M=1, N_max=2, on_exhausted="replan")
    assert colours(result.video) == [1] and result.video.seconds == 2


def test_route_regen_keeps_the_good_part_of_the_best_attempt_and_verifies_the_joined_clip():
    result, vgm, vlm, models = go(plan(), reject(0.2), reject(0.5), reject(0.3),
                                  route("regen", "slower"), accept())
    assert vlm.roles() == "pvvvrv" and len(vgm.calls) == 4
    assert (vgm.calls[3]["frame"] == 2).all() and vgm.calls[3]["seconds"] == 2
    k = int(0.5 * 8)
    (judged,) = (x for x in vlm.calls[-1]["parts"] if isinstance(x, c.Clip))
    assert colours(judged) == colours(result.video) == [2, 4]
    assert len(judged.frames) == len(result.video.frames) == k + 1 + 8
    assert result.status == "complete" and result.unverified_steps == []
    assert models.cost()["vgm_seconds"] == 8 and models.cost()["regenerations"] == 3


def test_route_regen_repairs_the_best_attempt_with_that_attempts_prompt():
    _, vgm, vlm, _ = go(plan("go"), reject(0.2, "up"), reject(0.8, "down"), reject(0.3, "left"),
                        route("regen", "slower"), accept())
    assert vgm.calls[3]["prompt"] == "go Correction: up Correction: slower"
    assert "Planned action: go Correction: up Correction: slower\n" in vlm.calls[-1]["text"]


def test_route_regen_that_is_rejected_goes_on_with_the_most_good_seconds():
    for first, second, kept in [  # of 2 s, and of 2 s more than the good part of those
            (0.2, 0.9, [1, 2]), (0.5, 0.1, [1]), (0.6, 0.5, [1, 2])]:
        result, *_ = go(plan(left=2), reject(first), route("regen"), reject(second),
                        plan(), accept(), M=1)
        assert result.unverified_steps == [1] and colours(result.video) == [*kept, 3]


def test_the_router_sees_what_came_of_the_steps_what_was_planned_and_the_best_failed_clip():
    _, _, vlm, _ = go(plan(left=2), accept(), plan("go down"), reject(0.1, "hop"),
                      reject(0.6, "run", reason="late"), reject(0.3), route("fallback"))
    text = vlm.calls[-1]["text"]
    assert "Last frame of step 1:" in text and "Planned action: go down Correction: hop\n" in text
    assert "Reason: late\nSuggestion: run\nGood fraction: 0.60" in text
    (clip,) = (x for x in vlm.calls[-1]["parts"] if isinstance(x, c.Clip))
    assert colours(clip) == [3]


def test_the_next_plan_is_told_why_the_attempt_that_was_kept_was_rejected():
    _, _, vlm, _ = go(plan(left=2), reject(0.6, reason="too late"), reject(0.1, reason="astray"),
                      plan(), accept(), M=2, on_exhausted="best")
    assert re.search("Outcome: rejected, kept.*: too late", vlm.calls[3]["text"])
    assert "astray" not in vlm.calls[3]["text"]


def test_route_split_tells_the_next_plan_and_changes_nothing_else():
    result, vgm, vlm, _ = go(plan("all of it"), reject(reason="too much"),
                             route("split", "in two moves", 2), plan("half"), accept(), M=1)
    told = "Outcome: rejected, nothing was kept: too much.* Advice: in two moves .*2"
    assert re.search(told, vlm.calls[3]["text"])
    assert (vgm.calls[1]["frame"] == I0).all() and colours(result.video) == [2]


def test_route_split_is_not_offered_at_the_last_step_and_not_accepted_there():
    _, _, vlm, _ = go(plan(), reject(), route("split"), route("fallback"), M=1, N_max=1)
    assert "Allowed actions: regen, fallback" in vlm.calls[2]["text"]
    assert "could not be used: action: Input should be 'regen' or 'fallback'" in (
        vlm.calls[3]["text"])


def test_route_fallback_is_one_unverified_clip_of_the_task_from_the_input_with_the_suggestion():
    result, vgm, *_ = go(plan(left=2), accept(), plan(), reject(), route("fallback", "in one go"),
                         M=1, q="the task")
    assert vgm.calls[-1]["prompt"] == "the task Correction: in one go"
    assert (vgm.calls[-1]["frame"] == I0).all()
    assert vgm.calls[-1]["seconds"] == 2 and colours(result.video) == [3]
    assert result.status == "fallback" and result.unverified_steps == [2]


@pytest.mark.parametrize("config", [
    {}, {"on_exhausted": "best"}, {"on_exhausted": "replan", "seconds_next": 3},
    {"N_max": 1, "M": 1}, {"N_max": 4, "M": 2, "seconds_first": 1, "seconds_next": 2}])
def test_the_worst_case_is_what_a_run_of_rejections_costs(config):
    costs = []
    for last in ("regen", "fallback"):
        def vlm(instructions, parts, schema, last=last):
            if ROLE[schema.__name__] == "planner":
                return said(plan())
            if ROLE[schema.__name__] == "verifier":
                return said(reject())
            return said(route(last if schema.__name__ == "LastRouting" else "regen"))

        *_, models = go(vlm=vlm, **config)
        cost = models.cost()
        costs.append((cost["clips"], cost["vgm_seconds"],
                      sum(cost["calls"].values()) - cost["calls"]["vgm"]))
    worst = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config).worst_case()
    assert worst == tuple(map(max, *costs))


@pytest.mark.parametrize("kind, wrong", [
    *((c.Config, x) for x in [
        {"n_max": 5}, {"attempts": 2}, {"N_max": 0}, {"M": 0}, {"M": 1.5}, {"seconds_first": -1},
        {"seconds_next": float("nan")}, {"seconds_first": float("inf")}, {"on_exhausted": "stop"}]),
    *((c.OpenAIVLM, x) for x in [{"model": "m"}, {"verify_fps": 0}, {"temperature": -1}]),
    *((c.Wan, x) for x in [{"fps": -1}, {"steps": 3}, {"offload": "all"}])])
def test_settings_that_are_misspelt_or_out_of_range_are_refused_in_python_too(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)


# --------------------------------------------------------------------------- replies of the VLM

BAD_REPLIES = {
    "missing": "", "prose": "Accept.", "cut off": '{"reason": "as pl', "an empty list": "[]",
    "null": "null", "markup": "<html>busy</html>",
    "wrong type": accept() | {"good_fraction": "1.0"},
    "fraction out of range": accept() | {"good_fraction": 1.7},
    "not a number": accept() | {"good_fraction": float("nan")},
    "another verdict": accept() | {"verdict": "Accept."}, "maybe": accept() | {"verdict": "maybe"},
    "a field missing": {k: v for k, v in accept().items() if k != "reason"},
    "a field too many": accept() | {"note": 1},
    "two verdicts": json.dumps(accept())[:-1] + ', "verdict": "accept"}',
    "two objects": json.dumps(accept()) * 2,
    "only thought": f"<think>{json.dumps(accept())}</think>",
    "still thinking": f"<think>maybe {json.dumps(accept())} but no, it fell",
    "a list of one": f"[{json.dumps(accept())}]", "a list": f'["so", {json.dumps(accept())}]',
    "a fenced list": f'\n```json\n[1, {json.dumps(accept())}]```',
    "thought over": f"{json.dumps(accept())}</think>no",
    "confidence in numbers": accept() | {"confidence": 0.9},
    "accepted though not executed": accept(executed=False),
    "accepted without progress": accept("none"), "half a character": '{"reason": "\\ud83d"}',
    "deep": "[" * 50_000, "deep objects": '{"reason":' * 20_000 + "1" + "}" * 20_000,
    "long": json.dumps(accept() | {"reason": "x" * 200_000}),
}


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_reply_that_does_not_fit_is_asked_for_again_and_never_an_accept(name):
    bad = BAD_REPLIES[name]
    bad = bad if isinstance(bad, str) else json.dumps(bad)
    _, vgm, vlm, models = go(plan(), bad, reject(), accept())
    assert len(vgm.calls) == 2 and "could not be used" in vlm.calls[2]["text"]
    assert models.cost()["calls"] == {"planner": 1, "vgm": 2, "verifier": 3}
    with pytest.raises(c.Problem, match="verifier gave no usable reply") as stopped:
        go(plan(), bad, bad, bad)
    assert repr(bad[:99])[:-1] in str(stopped.value)  # the raw reply, so that one can see


def test_an_accept_that_contradicts_itself_is_told_so():
    for wrong in (accept(executed=False), accept("none")):
        _, _, vlm, _ = go(plan(), wrong, accept())
        assert "an accept needs action_executed true and progress not none" in (
            vlm.calls[2]["text"])


@pytest.mark.parametrize("fault", ["finish_reason length", "finish_reason content_filter",
                                   "I cannot help with that"])
def test_a_reply_that_was_cut_off_or_refused_is_not_used_even_if_it_parses(fault):
    def vlm(instructions, parts, schema):
        if ROLE[schema.__name__] == "planner":
            return said(plan())
        return said(accept(), fault=fault)

    with pytest.raises(c.Problem, match=fault):
        go(vlm=vlm)


@pytest.mark.parametrize("wrapped", [
    "```json\nREPLY\n```", "```\nREPLY```", "Sure, here it is: REPLY Good luck!",
    "<think>It is {so}, or is it?</think>\nREPLY", "<think>a</think>{}</think>```REPLY```",
    "half a thought, then</think>Here: REPLY\n", "After [step 1] comes: REPLY"])
def test_thinking_tags_fences_and_a_sentence_around_a_reply_do_no_harm(wrapped):
    result, _, vlm, _ = go(*(wrapped.replace("REPLY", json.dumps(x)) for x in (plan(), accept())))
    assert result.status == "complete" and vlm.roles() == "pv"


def test_each_model_is_announced_before_it_is_waited_for_and_what_it_said_after(caplog):
    caplog.set_level("INFO", "collabvr")
    before = []

    class Watched(Script):
        def __call__(self, *request):
            before.append(caplog.messages[-1])
            return super().__call__(*request)

    go(vlm=Watched(plan(left=2), reject(reason="too far"), "?", accept(), plan(), accept()))
    assert [re.fullmatch(r"step (\d): (\w+): waiting", x).groups() for x in before] == [
        ("1", "planner"), *[("1", "verifier")] * 3, ("2", "planner"), ("2", "verifier")]
    assert "reason: too far" in caplog.text and caplog.text.count("vgm: waiting") == 3


# ----------------------------------------------------------------------------------------- cost


def test_cost_counts_rejected_and_routed_clips_in_seconds_and_calls_by_role():
    *_, models = go(plan(left=2), reject(), reject(), reject(), route("regen"), reject(),
                    plan(), "?", accept())
    cost = models.cost()
    assert (cost["clips"], cost["steps"], cost["regenerations"]) == (5, 2, 3)
    assert cost["vgm_seconds"] == 2 * 4 + 1 and cost["generator_errors"] == 0
    assert cost["calls"] == {"planner": 2, "vgm": 5, "verifier": 6, "router": 1}
    assert cost["tokens_in"]["verifier"] == 600 and cost["tokens_out"]["router"] == 10
    assert set(cost["wall_seconds"]) == set(cost["calls"])
    assert all(seconds >= 0 for seconds in cost["wall_seconds"].values())
    assert {x["model"] for x in models.calls if x["role"] != "vgm"} == {"script-1"}


def test_a_failed_generation_is_tried_once_more_with_the_next_seed_and_costs_no_attempt():
    *_, vgm, _, models = go(plan(), reject(), accept(), vgm=Painter(fail=[1, 3]), M=2)
    assert [call["seed"] for call in vgm.calls] == [0, 1, 2, 3]
    cost = models.cost()
    assert (cost["generator_errors"], cost["clips"], cost["vgm_seconds"]) == (2, 2, 4)
    assert ["error" if "error" in x else "clip" for x in models.calls if x["role"] == "vgm"] == [
        "error", "clip", "error", "clip"]


def test_a_second_failure_in_a_row_stops_the_run():
    with pytest.raises(c.Problem, match="failed twice in a row .*out of memory"):
        go(plan(), vgm=Painter(fail=[1, 2]))


def test_a_given_seed_that_failed_is_replaced_by_one_that_no_other_candidate_has():
    models = c.Models(vgm := Painter(fail=[2]), None)
    for seed in (1, 2, 3, 4):
        models.generate(I0, "q", 2, seed=seed)
    one, failed, instead, *others = [call["seed"] for call in vgm.calls]
    assert [one, failed, *others] == [1, 2, 3, 4] and not 0 <= instead <= 100
    assert models.cost()["clips"] == 4 and models.cost()["generator_errors"] == 1


@pytest.mark.parametrize("frames", [
    np.zeros((1, 8, 8, 3), np.uint8), np.zeros((5, 8, 8), np.uint8), np.zeros((5, 8, 8, 3)), None,
    np.full((5, 8, 8, 3), np.nan), np.zeros((5, 8, 8, 4), np.uint8)])
def test_a_clip_that_breaks_the_contract_is_a_failed_generation(frames):
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=lambda frame, prompt, seconds, seed: c.Clip(frames, 8))


@pytest.mark.parametrize("made", [np.zeros((9, 32, 48, 3), np.uint8), None, [1, 2]])
def test_a_generator_that_returns_an_array_or_nothing_in_place_of_a_clip_is_told_so(made):
    with pytest.raises(c.Problem, match="a generator returns a Clip of uint8"):
        go(plan(), vgm=lambda *request: made)


def test_a_generator_that_uses_one_buffer_again_and_again_spoils_no_clip(tmp_path):
    buffer = np.zeros((5, *I0.shape), np.uint8)

    def vgm(frame, prompt, seconds, seed):
        buffer[:] = frame
        buffer[1:] = 100 + seed
        return c.Clip(buffer, 4)

    result, *_ = go(plan(left=2), accept("partial"), plan(), accept(), vgm=vgm, folder=tmp_path)
    assert colours(result.video) == [100, 101]
    again, *_ = go(vgm=vgm, folder=tmp_path)
    assert (again.video.frames == result.video.frames).all()


@pytest.mark.parametrize("picture", [Image.fromarray(I0), I0 / 255, I0[..., 0], "x.png", None])
def test_a_picture_that_is_no_uint8_rgb_array_gets_a_sentence_that_says_so(picture):
    vlm = Script(plan(), accept())
    with pytest.raises(c.Problem, match="a uint8 RGB array"):
        c.CollabVR(c.Models(Painter(), vlm)).run(picture, "q")
    assert not vlm.calls, "nothing was paid for"


def test_a_generator_that_writes_into_its_frame_spoils_neither_the_input_nor_the_video():
    def vgm(frame, prompt, seconds, seed):
        frames = np.repeat(frame[None], 5, 0)
        frames[1:] = 100 + seed
        frame[:] = 0
        return c.Clip(frames, 4)

    image = I0.copy()
    vlm = Script(plan(left=2), accept("partial"), plan(), accept())
    result = c.CollabVR(c.Models(vgm, vlm)).run(image, "q")
    assert (image == I0).all()
    assert result.video.frames[:, 0, 0, 0].tolist() == [250] + [100] * 4 + [101] * 4


@pytest.mark.parametrize("fps", [np.float32(29.97), Fraction(8), np.int64(8)])
def test_any_kind_of_number_will_do_as_frames_per_second(fps):
    models = c.Models(lambda frame, *_: c.Clip(np.repeat(frame[None], 9, 0), fps), None)
    assert models.generate(I0, "p", 1.0).fps == float(fps)
    assert json.dumps(models.calls)


def test_a_vlm_that_gives_no_text_or_claims_more_than_text_is_asked_again():
    odd = [{"text": None}, {}, {"text": 5}, {"text": "no", "reply": accept(), "role": "x"}]
    for answer in odd:
        answers = [said(plan()), answer, said(accept())]
        models = c.Models(Painter(), lambda *_, left=answers: left.pop(0))
        assert c.CollabVR(models).run(I0, "q").status == "complete"
        assert models.cost()["calls"] == {"planner": 1, "vgm": 1, "verifier": 2}


def test_a_damaged_run_folder_is_refused_in_one_sentence(tmp_path):
    for text in ("garbage\n", "{}\n", "[]\n"):
        (tmp_path / "calls.jsonl").write_text(text)
        with pytest.raises(c.Problem, match="calls.jsonl is damaged"):
            c.Models(None, None, tmp_path)


@pytest.mark.parametrize("second", [((40, 48), 4), ((32, 48), 8)])
def test_a_clip_that_cannot_be_joined_to_those_before_is_a_failed_generation(second):
    made = iter([((32, 48), 4), second, second])

    def vgm(frame, prompt, seconds, seed):
        size, fps = next(made)
        return c.Clip(np.zeros((9, *size, 3), np.uint8), fps)

    with pytest.raises(c.Problem, match="failed twice in a row .*does not go with"):
        go(plan(left=2), accept(), plan(), vgm=vgm)


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


def noise(*shape):
    return c.Clip(np.random.default_rng(0).integers(0, 256, shape, np.uint8), 8)


def test_the_same_frames_make_the_same_video_bit_for_bit():
    clip = noise(12, 12, 12, 3)
    clip = c.Clip(clip.frames.repeat(8, 1).repeat(8, 2), 8)
    assert len({c.encode_video(clip) for _ in range(20)}) == 1


def decoded(path, data):
    """A video's frames, and what is known of it."""
    import imageio.v3 as iio

    path.write_bytes(data)
    return iio.imread(path, plugin="pyav"), iio.immeta(path, plugin="pyav")


@pytest.mark.parametrize("shape", [(9, 33, 47, 3), (49, 233, 247, 3), (2, 16, 300, 3)])
def test_stored_clips_are_exact(tmp_path, shape):
    clip = noise(*shape)
    frames, meta = decoded(tmp_path / "a.mkv", c.encode_video(clip, lossless=True))
    assert meta["codec"] == "ffv1" and (frames == clip.frames).all()


@pytest.mark.parametrize("size, written", [
    ((33, 47), (264, 376)), ((64, 64), (256, 256)), ((255, 300), (510, 600)),
    ((300, 255), (600, 510)), ((256, 300), (256, 300)), ((257, 301), (258, 302)),
    ((480, 832), (480, 832))])
def test_the_video_plays_anywhere_and_a_side_below_256_is_enlarged_by_a_whole_factor(
        size, written, tmp_path):
    frames, meta = decoded(tmp_path / "a.mp4", c.encode_video(noise(5, *size, 3)))
    assert meta["video_format"] == "yuv420p" and meta["codec"] == "h264" and meta["fps"] == 8
    assert frames.shape == (5, *written, 3)


def test_the_colours_of_small_pictures_survive_in_the_video(tmp_path):
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    frames[:, ::2, ::2, 0] = frames[:, 1::2, 1::2, 2] = 255  # halved colour: 59
    shown, _ = decoded(tmp_path / "a.mp4", c.encode_video(c.Clip(frames, 8)))
    middle = shown[:, 2::4, 2::4]
    assert middle.shape == frames.shape and np.abs(middle.astype(int) - frames).mean() < 12


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


@pytest.mark.parametrize("values, name", [
    (np.linspace(0, 65535, 400).astype(np.uint16), "x.png"), (np.linspace(0, 1, 400), "x.tiff")])
def test_a_picture_of_more_than_8_bits_is_refused_and_not_taken_for_a_white_one(
        values, name, tmp_path):
    Image.fromarray(values.reshape(20, 20).astype(
        np.float32 if values.dtype == float else values.dtype)).save(tmp_path / name)
    with pytest.raises(c.Problem, match="8 bits"):
        c.load_image(tmp_path / name)
