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
    models = c.Models(vgm or Painter(), vlm or Script(*replies), folder, seed)
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1} | config)
    try:
        result = c.CollabVR(models, config).run(I0, q)
    finally:
        models.lock.release()
    assert not getattr(vlm or models.vlm, "replies", None), "the run ended before the script did"
    return result, models.vgm, models.vlm, models


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


# --------------------------------------------------------------------------- calls.jsonl, clips/


FULL = [plan(left=2), reject(), accept("partial"), plan(), accept()]


def facts(result, models):
    """What a run came to, the seconds of waiting and the clips' file names apart."""
    calls = [{k: v for k, v in x.items() if k not in ("wall_seconds", "clip")}
             for x in models.calls]
    cost = {k: v for k, v in models.cost().items() if k != "wall_seconds"}
    return result.status, result.unverified_steps, calls, cost, result.video.frames.tobytes()


def kept(folder):
    """The lines of calls.jsonl."""
    return [json.loads(line) for line in (folder / "calls.jsonl").read_bytes().splitlines()]


@pytest.fixture(scope="module")
def undisturbed():
    result, *_, models = go(*FULL)
    return facts(result, models)


@pytest.mark.parametrize("vlm_calls", range(5))
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_resumes_without_paying_twice(tmp_path, undisturbed, vlm_calls, fault):
    class Dies(Script):
        def __call__(self, *request):
            if len(self.calls) == vlm_calls:
                raise fault
            return super().__call__(*request)

    vgm, first = Painter(), Dies(*FULL)
    with pytest.raises(fault):
        go(vgm=vgm, vlm=first, folder=tmp_path)
    result, _, second, models = go(*FULL[vlm_calls:], vgm=vgm, folder=tmp_path)
    assert len(vgm.calls) == 3 and len(first.calls) + len(second.calls) == 5
    assert facts(result, models) == undisturbed


def test_a_finished_run_replays_without_its_models(tmp_path):
    done, *_, models = go(*FULL, folder=tmp_path)
    lines = (tmp_path / "calls.jsonl").read_bytes()
    again, *_, models2 = go(vgm=lambda *_: 1 / 0, folder=tmp_path)
    assert facts(again, models2) == facts(done, models) and models2.cost() == models.cost()
    assert (tmp_path / "calls.jsonl").read_bytes() == lines


def test_settings_may_change_and_what_they_do_not_touch_is_replayed(tmp_path):
    go(*FULL, folder=tmp_path)
    _, vgm, vlm, models = go(plan(left=2), plan(), folder=tmp_path, N_max=2)
    assert vlm.roles() == "pp"  # only the planner is told the cap
    assert not vgm.calls and models.cost()["clips"] == 3 and models.cost()["calls"]["planner"] == 2


def test_unusable_replies_are_counted_for_ever_but_asked_for_afresh(tmp_path):
    with pytest.raises(c.Problem):
        go("?", "?", "?", folder=tmp_path)
    *_, vlm, models = go("?", plan(), accept(), folder=tmp_path)
    assert models.cost()["calls"]["planner"] == 5 and len(vlm.calls) == 3
    assert go(folder=tmp_path)[-1].cost() == models.cost()


def test_a_replay_decodes_each_clip_once(tmp_path, monkeypatch):
    go(plan(), reject(), reject(), accept(), folder=tmp_path)
    read, decoded = c.read_clip, []
    monkeypatch.setattr(c, "read_clip", lambda *x: decoded.append(x[1]["clip"]) or read(*x))
    go(folder=tmp_path)
    assert decoded == ["clips/001.mkv", "clips/002.mkv", "clips/003.mkv"]


def test_failures_of_an_earlier_start_are_counted_and_the_seeds_go_on(tmp_path):
    with pytest.raises(c.Problem):
        go(plan(), vgm=Painter(fail=[1, 2]), folder=tmp_path)
    _, vgm, _, models = go(accept(), folder=tmp_path)
    assert vgm.calls[0]["seed"] == 2
    assert models.cost()["generator_errors"] == 2 and models.cost()["clips"] == 1
    assert go(folder=tmp_path)[-1].cost() == models.cost()


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_line_whose_clip_is_missing_or_not_whole_counts_as_not_there(
        tmp_path, undisturbed, which):
    go(*FULL, folder=tmp_path)
    path = tmp_path / f"clips/{which:03}.mkv"
    whole = path.read_bytes()
    for broken in (None, b"", whole[:100], whole[: len(whole) // 2], whole[:-100]):
        path.unlink() if broken is None else path.write_bytes(broken)
        vgm = Painter()
        vgm.calls = [{}] * (which - 1)  # its colours are the numbers of its calls
        result, *_, models = go(vgm=vgm, folder=tmp_path)
        assert facts(result, models) == undisturbed and len(vgm.calls) == which
        assert go(folder=tmp_path)[-1].calls == models.calls  # and that is kept
        path.write_bytes(whole)
        (tmp_path / "calls.jsonl").write_text("".join(
            json.dumps(line) + "\n" for line in kept(tmp_path)[:8]))


@pytest.mark.parametrize("torn", [1, 10, 100])
def test_a_torn_last_line_is_dropped(tmp_path, undisturbed, torn):
    go(*FULL, folder=tmp_path)
    whole = (tmp_path / "calls.jsonl").read_bytes()
    (tmp_path / "calls.jsonl").write_bytes(whole[:-torn])
    result, vgm, _, models = go(accept(), folder=tmp_path)
    assert facts(result, models) == undisturbed and not vgm.calls
    assert [x["request"] for x in kept(tmp_path)] == [
        json.loads(line)["request"] for line in whole.splitlines()]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_power_cut_costs_the_call_under_way_at_most(cut, tmp_path, undisturbed, monkeypatch):
    syncs, fsync, vgm, first = itertools.count(1), os.fsync, Painter(), Script(*FULL)

    def power(file):  # goes while the disk is waited for, and what was written is not all there
        if next(syncs) == cut:
            os.ftruncate(file, os.fstat(file).st_size - 20)
            raise KeyboardInterrupt
        return fsync(file)

    monkeypatch.setattr(os, "fsync", power)
    with pytest.raises(KeyboardInterrupt):
        go(vgm=vgm, vlm=first, folder=tmp_path)
    monkeypatch.undo()
    whole = (tmp_path / "calls.jsonl").read_bytes().rpartition(b"\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    assert len(first.calls) + len(vgm.calls) - len(lines) <= 1
    vgm.calls = vgm.calls[: sum("clip" in x for x in lines)]
    result, *_, models = go(*FULL[sum("reply" in x for x in lines) :], vgm=vgm, folder=tmp_path)
    assert facts(result, models) == undisturbed


def test_over_200_steps_memory_grows_by_the_joined_frames_and_a_step_costs_the_same(
        tmp_path, unsynced):
    import tracemalloc

    steps, marks, frame = 200, [], np.zeros((64, 64, 3), np.uint8)

    def vlm(instructions, parts, schema):
        if ROLE[schema.__name__] != "planner":
            return said(accept("partial"))
        marks.append((time.process_time(), tracemalloc.get_traced_memory()[0]))
        return said(plan(left=2))

    models = c.Models(Painter(), vlm, tmp_path)
    tracemalloc.start()
    try:
        c.CollabVR(models, c.Config(N_max=steps, seconds_first=4, seconds_next=4)).run(frame, "q")
    finally:
        tracemalloc.stop()
    one = 17 * 64 * 64 * 3
    # Painter keeps a copy of the conditioning frame itself; the plans' lines are text
    assert models.cost()["clips"] == steps and len(marks) == steps
    assert marks[-1][1] - marks[50][1] < 1.2 * one * (steps - 51)
    early, late = (marks[b][0] - marks[a][0] for a, b in ((20, 80), (139, 199)))
    assert late < 1.5 * early + 0.2


def test_of_clips_that_never_joined_only_the_best_is_kept(unsynced):
    held = []

    class Watching(c.CollabVR):
        def plan(self, I0, q, H, t):
            held.append([x.d.good_fraction for x in H.rejected])
            return super().plan(I0, q, H, t)

    replies = [x for k in (1, 3, 2) for x in (plan(), *[reject(good=k / 10)] * 3)]
    models = c.Models(Painter(), Script(*replies))
    result = Watching(models, c.Config(on_exhausted="replan")).run(I0, "q")
    assert held == [[], [0.1], [0.3]] and result.status == "best_attempt"
    assert colours(result.video) == [6]  # the latest of step 2


def test_equal_requests_are_answered_in_the_order_in_which_they_were_made(tmp_path):
    def ask_twice(*replies):
        models = c.Models(None, vlm := Script(*replies), tmp_path)
        said = [models.ask("planner", "", ["the same"], c.CollabVR.Plan) for _ in range(2)]
        models.lock.release()
        return [x.instruction for x in said], len(vlm.calls)

    assert ask_twice(plan("one"), plan("two")) == (["one", "two"], 2)
    assert ask_twice() == (["one", "two"], 0)


def test_a_result_saved_from_python_is_the_folder_that_the_command_line_makes(tmp_path):
    result, *_, models = go(*FULL, folder=tmp_path)
    assert c.save(result, models, task="t", settings={"M": 3}) == tmp_path / "video.mp4"
    trace = json.loads((tmp_path / "trace.json").read_bytes())
    assert trace["calls"] == models.calls == kept(tmp_path) and trace["cost"] == models.cost()
    assert (trace["status"], trace["unverified_steps"], trace["task"]) == ("complete", [], "t")
    assert (tmp_path / "video.mp4").read_bytes() == c.encode_video(result.video)


# -------------------------------------------------------------------------------- command line


def cli(*argv, **env):
    """(exit status, stdout, stderr) of a real process."""
    env = {k: v for k, v in os.environ.items() if "API_KEY" not in k} | {
        "PYTHONPATH": str(ROOT)} | {k: str(v) for k, v in env.items()}
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


XT = ["--image", "X", "--task", "t"]  # X becomes the picture


@pytest.mark.parametrize("argv, said", [
    (["--task", "t"], "--image"),
    (["--image", "nowhere.png", "--task", "t"], "nowhere.png cannot be read"),
    (["--image", __file__, "--task", "t"], "cannot be read as a picture"),
    (["--image", "X", "--task", "  "], "task is empty"),
    (["--image", "X", "--task", "move \udcff"], "no text"),
    ([*XT, "--N-max", "0"], "N_max"),
    ([*XT, "--N-max", "99999999999"], "N_max"),
    ([*XT, "--M", "two"], "--M"),
    ([*XT, "--seconds-first", "nan"], "seconds_first"),
    ([*XT, "--fps", "-1"], "fps"),
    ([*XT, "--on-exhausted", "stop"], "--on-exhausted"),
    ([*XT, "--request-extra", "{"], "request_extra"),
    ([*XT, "--vgm", "no.py:g"], "--vgm no.py:g cannot be loaded"),
    ([*XT, "--vgm", __file__], "as FILE.py:NAME"),
    ([*XT, "--vgm", __file__ + ":nobody"], "as FILE.py:NAME"),
    ([*XT, "--vgm", __file__ + ":ROLE"], "as FILE.py:NAME"),
    ([*XT, "--vgm", __file__ + ":painted", "--vgm-arg", "fps=4"], "as FILE.py:NAME"),
    ([*XT, "--vgm", "hub/model", "--vgm-arg", "fps=4"], "as FILE.py:NAME"),
    ([*XT, "--colour"], "--colour"),
    ([*XT, "--n-max", "2"], "--n-max"),
    (XT, "No API key for generativelanguage.googleapis.com"),
    ([*XT, "--vlm-url", "http://127.0.0.1:9/v1", "--vlm", "m"],
     "http://127.0.0.1:9/v1 gave no usable answer"),
    ([*XT, "--vlm-url", "user:secret@example.org/v1"], "vlm_url"),
    ([*XT, "--vlm-url", "http://user:secret@example.org/v1"], "vlm_url"),
    ([*XT, "--vlm-url", "http://example.org/v1?key=secret"], "vlm_url"),
    ([*XT, "--vlm-url", "http://[::1/v1"], "vlm_url"),
    ([*XT, "--vlm-url", "http://example.org:80x/v1"], "vlm_url"),
])
def test_bad_input_gets_one_sentence_and_exit_status_2(
        argv, said, capsys, picture, tmp_path, monkeypatch):
    for key in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    out = [] if "X" not in argv else ["--out", tmp_path / "out"]
    sentence = bad(capsys, *[picture if a == "X" else a for a in argv], *out)
    assert said in sentence and "secret" not in sentence
    assert not list(tmp_path.glob("out/*"))


def test_a_picture_of_absurd_size_is_refused(tmp_path, capsys):
    Image.new("1", (9000, 9000)).save(tmp_path / "big.png")
    Image.new("1", (9, 9)).save(tmp_path / "small.png")
    for name in ("big", "small"):
        assert "pixels" in bad(capsys, "--image", tmp_path / f"{name}.png", "--task", "t")


def test_importing_and_help_need_no_heavy_package():
    heavy = ["torch", "diffusers", "transformers", "openai", "imageio"]
    code = (f"import sys, collabvr\ntry: collabvr.main(['--help'])\nexcept SystemExit: pass\n"
            f"print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                          cwd=ROOT)
    assert done.stdout.endswith("[]\n")
    status, out, _ = cli("--help")
    assert status == 0 and "--on-exhausted" in out and "App. A.1" in out


class Endpoint:
    """A real OpenAI-compatible server on a free port that plays a list of behaviours, one per chat
    request."""

    def __init__(self, *behaviours):
        self.behaviours, self.requests, outer = list(behaviours), [], self
        model = {"id": "models/test", "object": "model", "created": 0, "owned_by": "x"}
        self.models = 200, {"object": "list", "data": [model]}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send(*outer.models)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.headers["Authorization"], body))
                do = outer.behaviours.pop(0)
                if callable(do):
                    return do(self)
                if isinstance(do, tuple):
                    return self.send(*do)
                self.send(*chat(do if do is None or isinstance(do, str) else json.dumps(do)))

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
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


def chat(content, **others):
    """A chat completion's body with that content, and what differs from the usual."""
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "test-0926",
            "choices": [{"index": 0, "finish_reason": "stop",
                         "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": 9999, "completion_tokens": 5, "total_tokens": 1}}
    return 200, body | others


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


def written(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def trace(tmp_path):
    return json.loads((tmp_path / "out" / "trace.json").read_bytes())


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
    seen = "".join(capsys.readouterr()).encode() + written(tmp_path / "out")
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
    assert re.search("^status +complete$", out, re.MULTILINE) and len(naps) >= 5 and 2.0 in naps
    assert endpoint.requests[0][0] == "Bearer sk-secret-123"
    body = endpoint.requests[-1][1]
    assert body["temperature"] == 0.2
    assert body["response_format"]["json_schema"]["name"] == "Verification"
    done = trace(tmp_path)
    assert done["status"] == "complete" and done["cost"]["vgm_seconds"] == 3
    assert done["cost"]["calls"] == {"planner": 2, "vgm": 2, "verifier": 4}
    assert [x["reply"]["verdict"] for x in done["calls"] if x["role"] == "verifier" and (
        "reply" in x)] == ["accept", "accept"]
    assert b"sk-secret" not in written(tmp_path / "out") and "sk-secret" not in out + err
    # the same command again needs neither endpoint nor key nor generator
    monkeypatch.delenv("OPENAI_API_KEY")
    before = (tmp_path / "count").read_text()
    assert c.main([*job, "--vlm-url", endpoint.url, "--timeout", "0.5"]) == 0
    assert (tmp_path / "count").read_text() == before
    assert trace(tmp_path) == done


def test_the_trace_says_which_host_and_model_answered_and_keeps_the_settings_but_no_secret(
        job, tmp_path):
    (tmp_path / "gen.py").write_text(GENERATOR + """
class Own:
    def __init__(self, style, api_key): assert (style, api_key) == ("flat=1", "k-secret")
    def __call__(self, *request): return painter(*request)
""")
    job[job.index("--vgm") + 1] = f"{tmp_path / 'gen.py'}:Own"
    with Endpoint(plan(), "?", accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--M", "2", "--vgm-arg", "style=flat=1",
                       "--vgm-arg", "api_key=k-secret"]) == 0
    done = trace(tmp_path)
    assert [(x["host"], x["model"]) for x in done["calls"] if x["role"] != "vgm"] == [
        (endpoint.host, "test-0926")] * 3
    assert done["settings"]["vgm_arg"] == {"style": "flat=1", "api_key": "***"}
    assert done["settings"]["M"] == 2 and done["settings"]["vlm_url"] == endpoint.url
    assert done["task"] == "t" and done["image"] == job[1]
    assert b"k-secret" not in written(tmp_path / "out")


def test_an_endpoint_that_refuses_ends_the_run_in_one_sentence_and_the_next_start_goes_on(
        job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    refusal = (400, [{"error": {"message": "bad key sk-secret-123", "status": "INVALID_ARGUMENT"}}])
    with Endpoint(plan(left=2), accept(), refusal) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 1
    err = capsys.readouterr().err
    assert "INVALID_ARGUMENT" in err and "Traceback" not in err and "sk-secret" not in err
    assert f"{endpoint.url} gave no usable answer (400" in err
    assert "the same command goes on" in err
    assert not (tmp_path / "out" / "video.mp4").exists()
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert len((tmp_path / "count").read_text()) == 2


def test_that_the_same_command_goes_on_is_said_only_when_something_was_kept(job, capsys):
    with Endpoint((400, {"error": "no"})) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 1
    assert "goes on" not in capsys.readouterr().err


@pytest.mark.parametrize("page", ["no such page", "<html>" + "no such page " * 100])
def test_an_error_names_the_whole_url_and_a_404_says_how_a_base_url_usually_ends(
        page, job, capsys):
    with Endpoint((404, page)) as endpoint:
        endpoint.models = 404, page
        url = endpoint.url.removesuffix("/v1") + "/some/path"
        said = bad(capsys, *job, "--vlm-url", url)
    assert url in said and "404" in said and "usually ends in /v1" in said


def test_a_missing_endpoint_is_noticed_within_ten_seconds(job, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    began = time.monotonic()
    assert f"http://127.0.0.1:{port}/v1" in bad(capsys, *job, "--vlm-url",
                                               f"http://127.0.0.1:{port}/v1")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("listed", [
    (200, {"object": "list", "data": []}), (404, {"detail": "Not Found"}), (500, "oops"),
    (200, {"object": "list", "data": [{"id": "other", "object": "model", "created": 0,
                                       "owned_by": "x"}]})])
def test_an_endpoint_that_does_not_list_the_model_is_asked_for_a_word_and_not_refused(
        listed, job):
    with Endpoint("ok", plan(), accept()) as endpoint:
        endpoint.models = listed
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    word, *others = [body for _, body in endpoint.requests]
    assert word["model"] == "test" and len(json.dumps(word)) < 300 and len(others) == 2


def test_an_endpoint_that_hangs_up_after_a_failed_list_of_models_is_asked_once_more(job):
    with Endpoint(cut, "ok", plan(), accept()) as endpoint:
        endpoint.models = 500, "oops"
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert len(endpoint.requests) == 4


def test_an_unknown_model_is_noticed_before_anything_is_paid_for(job, capsys, tmp_path):
    with Endpoint((404, {"error": {"message": "no model 'other'"}})) as endpoint:
        said = bad(capsys, *job, "--vlm-url", endpoint.url, "--vlm", "other")
        assert "no model 'other'" in said and endpoint.url in said
    assert not (tmp_path / "out").exists()


YES = json.dumps(accept())
NO_MESSAGE = [{"index": 0, "finish_reason": "stop", "message": None}]
SAID = {"role": "assistant", "content": YES}
CUT_OFF = [{"index": 0, "finish_reason": "length", "message": SAID}]
FILTERED = [{"index": 0, "finish_reason": "content_filter", "message": SAID}]
REFUSED = [{"index": 0, "finish_reason": "stop", "message": SAID | {"refusal": "I cannot"}}]


@pytest.mark.parametrize("odd", [
    chat(YES, choices=[]), chat(YES, choices=None), chat(YES, choices=NO_MESSAGE),
    chat(YES, choices=CUT_OFF), chat(YES, choices=FILTERED), chat(YES, choices=REFUSED),
    chat(None), chat([YES]), chat(""),
    chat("Accept."), chat(YES[:-20]), chat(YES + YES), chat(f"No: {YES} or rather {{}}"),
    chat(YES.replace("accept", "maybe")), chat(YES.replace("accept", "Accept.")),
    chat(YES.replace("1.0", "1.7")), chat(YES.replace("1.0", "NaN")),
    chat(YES.replace("1.0", '"1.0"')), chat(YES.replace("as planned", "\\ud83d")),
    chat(YES.replace('"confidence"', '"verdict": "accept", "confidence"')),
    chat(YES.replace("true", "false")), chat(YES.replace("complete", "none")),
    chat("x" * 10_000_000), chat("[" * 100_000), (200, "<html>busy</html>"),
    lambda h: h.send(200, "{", Content_Type="application/json"),
], ids=lambda x: None)
def test_an_odd_answer_is_asked_for_again_and_never_an_accept(odd, job, tmp_path):
    with Endpoint(plan(left=1), odd, reject(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    judged = [x for x in trace(tmp_path)["calls"] if x["role"] == "verifier"]
    assert ["fault" in x for x in judged] == [True, False, False]
    assert [x["reply"]["verdict"] for x in judged[1:]] == ["reject", "accept"]
    assert len(endpoint.requests) == 4


def test_replies_in_fences_with_markup_or_without_usage_are_taken_as_they_are(job, tmp_path):
    markup = accept() | {"reason": "<b>\x1b[2J\x07\u202e</b> ![x](http://example.org)"}
    fenced = f"```json\n{json.dumps(markup)}\n```"
    with Endpoint(plan(), chat(fenced, usage=None)) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert trace(tmp_path)["calls"][-1]["reply"]["reason"] == markup["reason"]


def test_nothing_that_a_model_says_can_steer_the_terminal(job):
    sly = accept() | {"reason": "\x1b[2J\x1b]0;owned\x07\u202e"}
    with Endpoint(plan(), sly) as endpoint:
        status, out, err = cli(*job, "--vlm-url", endpoint.url, OPENAI_API_KEY="k")
    assert status == 0 and "[2J" in err and not {"\x1b", "\x07", "\u202e"} & set(out + err)


def test_thoughts_that_an_endpoint_does_not_count_as_completion_are_counted(job, tmp_path):
    usage = {"prompt_tokens": 9000, "completion_tokens": 5, "total_tokens": 9800}
    with Endpoint(plan(), chat(YES, usage=usage)) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert trace(tmp_path)["cost"]["tokens_out"]["verifier"] == 800


def test_a_generator_that_raises_shows_its_traceback_on_stderr(job, tmp_path):
    (tmp_path / "gen.py").write_text("def painter(*request): return undefined_thing")
    with Endpoint(plan()) as endpoint:
        status, _, err = cli(*job, "--vlm-url", endpoint.url)
    assert status == 1 and "Traceback (most recent call last)" in err
    assert f'File "{tmp_path / "gen.py"}", line 1, in painter' in err
    last = [line for line in err.splitlines() if line.startswith("collabvr: ")]
    assert len(last) == 1 and "failed twice in a row (NameError" in last[0]


def test_a_key_that_an_endpoint_or_a_generator_repeats_is_printed_and_written_nowhere(
        job, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "t-secret-456")
    (tmp_path / "gen.py").write_text(
        "import os\ndef painter(*a): raise ValueError('no ' + os.environ['MY_TOKEN'])")
    refusal = (401, {"error": {"message": "x" * 260 + "bad key sk-secret-123 is not valid"}})
    said = ""
    with Endpoint(plan(), refusal) as endpoint:
        for task in ("t", "u"):
            job[job.index("--task") + 1] = task
            job[job.index("--out") + 1] = str(tmp_path / "out" / task)
            status, *streams = cli(*job, "--vlm-url", endpoint.url, OPENAI_API_KEY="sk-secret-123")
            said += "".join(streams)
            assert status == 1
    assert "failed twice" in said and "401" in said and "***" in said
    for secret in ("sk-secret", "t-secret"):
        assert secret not in said and secret.encode() not in written(tmp_path / "out")


def test_an_edited_generator_or_another_one_in_the_same_folder_is_not_taken_for_the_first(
        job, tmp_path):
    with Endpoint(plan(), accept(), accept(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
        (tmp_path / "gen.py").write_text(GENERATOR.replace("40", "40 + 1"))
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
        (tmp_path / "gen.py").write_text(GENERATOR.replace("40", "40 + 2") + "other = painter")
        job[job.index("--vgm") + 1] = f"{tmp_path / 'gen.py'}:other"
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0  # nothing has changed
    assert (tmp_path / "count").read_text() == "xxx"


def test_arguments_of_any_name_tell_generators_apart_beside_the_code_of_their_file(tmp_path):
    (tmp_path / "gen.py").write_text("class G:\n  def __init__(self, code, name): pass\n"
                                     "  def __call__(self, *request): pass\n")

    def identity(**given):
        return json.dumps(c.load_generator(c.Wan(f"{tmp_path / 'gen.py'}:G"), given).identity)

    pairs = ("a", "b"), ("b", "b"), ("a", "a")
    seen = {identity(code=code, name=name) for code, name in pairs}
    with open(tmp_path / "gen.py", "a") as file:
        file.write("# edited")
    assert len(seen | {identity(code="a", name="b")}) == 4


def test_another_command_gets_another_default_folder_and_the_same_one_goes_on_in_its_own(
        job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = job.index("--out")
    job[at : at + 2] = []
    commands = [[], ["--M", "2"], ["--seed", "3"], ["--fps", "8"], ["--temperature", "None"]]
    with Endpoint(*[x for _ in commands for x in (plan(), accept())]) as endpoint:
        for others in commands:
            assert c.main([*job, "--vlm-url", endpoint.url, *others]) == 0
        folders = {p: (p / "video.mp4").stat().st_ino for p in Path("runs").iterdir()}
        assert len(folders) == len(commands) == len((tmp_path / "count").read_text())
        assert c.main([*job, "--vlm-url", endpoint.url, "--M", "2"]) == 0
    assert set(Path("runs").iterdir()) == set(folders) and len(endpoint.requests) == 10


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


def test_a_generator_finds_what_lies_beside_its_file(job, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_gen.py").write_text("shade = 40\n")
    (tmp_path / "gen.py").write_text("import beside_gen\n" + GENERATOR)
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0


def test_a_class_that_says_what_changes_its_answers_keeps_its_clips_when_something_else_changes(
        job, tmp_path):
    (tmp_path / "gen.py").write_text(GENERATOR + """
class Served:
    def __init__(self, url, fps="4"):
        self.identity = {"fps": fps}
    def __call__(self, *request):
        return painter(*request)
""")
    job[job.index("--vgm") + 1] = f"{tmp_path / 'gen.py'}:Served"
    with Endpoint(plan(), accept(), accept()) as endpoint:
        for given in (["url=a"], ["url=b"], ["url=b", "fps=5"]):
            given = [x for name in given for x in ("--vgm-arg", name)]
            assert c.main([*job, "--vlm-url", endpoint.url, *given]) == 0
    assert (tmp_path / "count").read_text() == "xx"


def test_a_page_in_place_of_the_list_of_models_is_noticed(job, capsys):
    page = 200, "<html>hello</html>"
    with Endpoint(page) as endpoint:
        endpoint.models = page
        assert "gave no usable answer" in bad(capsys, *job, "--vlm-url", endpoint.url)


def test_clips_can_be_sent_as_raw_video_and_extra_fields_as_json(job):
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--video-input", "video",
                       "--temperature", "None", "--request-extra", '{"top_k": 5}']) == 0
    body = endpoint.requests[-1][1]
    assert "temperature" not in body and body["top_k"] == 5
    kinds = [piece["type"] for piece in body["messages"][1]["content"]]
    assert kinds.count("video_url") == 1 and kinds.count("image_url") == 1


def test_media_that_an_endpoint_drops_are_noticed(job, caplog):
    few = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35}
    with Endpoint(plan(), chat(YES, usage=few)) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert len(re.findall("30 tokens for .* drop them", caplog.text)) == 1


def test_a_full_disk_ends_the_run_in_one_sentence_and_loses_nothing(job, tmp_path):
    import resource

    (tmp_path / "gen.py").write_text(GENERATOR.replace(
        "seed * 40", "np.random.default_rng(seed).integers(0, 256, frames[1:, :8].shape)"))
    with Endpoint(plan(), accept()) as endpoint:
        done = subprocess.run(
            [sys.executable, str(ROOT / "collabvr.py"), *job, "--vlm-url", endpoint.url],
            check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)))
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "File too large" in done.stderr and "same command goes on" in done.stderr
        assert not list((tmp_path / "out").rglob("*.m[pk][4v]"))
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert len(endpoint.requests) == 2  # the plan was safe
    assert (tmp_path / "count").read_text() == "xx"  # the clip could not be kept


def test_google_keys_go_to_googles_host_only(monkeypatch):
    monkeypatch.setenv("GEMINI_API_KEY", "g"), monkeypatch.setenv("OPENAI_API_KEY", "o")

    def key(**settings):
        with c.OpenAIVLM(**settings).client() as client:
            return client.api_key

    assert key() == "g"
    elsewhere = "http://example.org:80/generativelanguage.googleapis.com"
    assert key(vlm_url=elsewhere) == "o" and c.OpenAIVLM(vlm_url=elsewhere).host == "example.org:80"
    assert key(vlm_url="http://generativelanguage.googleapis.com.evil.org") == "o"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key(vlm_url="http://localhost:8000/v1") not in ("g", "o", "")


def test_blanks_around_a_key_are_no_part_of_it_and_it_is_masked_without_them(job, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret-123\n")
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert {key for key, _ in endpoint.requests} == {"Bearer sk-secret-123"}
    assert c.clean("no such key: sk-secret-123!") == "no such key: ***!"


def test_a_dry_run_checks_everything_and_generates_nothing(job, tmp_path, capsys, caplog):
    with Endpoint() as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url, "--dry-run"]) == 0
    assert "Nothing was generated" in capsys.readouterr().out
    assert f"{endpoint.host} will see the pictures. At worst: 12 clips, 17.0 s" in caplog.text
    assert "18 VLM calls" in caplog.text
    assert not (tmp_path / "out").exists() and not (tmp_path / "count").exists()


def test_another_task_in_the_same_folder_is_refused(job, capsys):
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    capsys.readouterr()
    job[job.index("--task") + 1] = "another"
    said = bad(capsys, *job, "--vlm-url", endpoint.url)
    assert "a run with another image or task" in said


def start(job, endpoint):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "collabvr.py"), *job, "--vlm-url", endpoint.url],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_second_process_on_one_folder_is_refused_and_sigterm_leaves_the_folder_to_the_next(
        job, tmp_path, capsys):
    with Endpoint(plan(), lambda handler: time.sleep(3), accept()) as endpoint:
        with start(job, endpoint) as other:
            while len(endpoint.requests) < 2:
                time.sleep(0.02)
            refused = bad(capsys, *job, "--vlm-url", endpoint.url)
            assert "is in use, here or by another process" in refused
            other.send_signal(signal.SIGTERM)
            err = other.stderr.read()
            assert "Interrupted" in err and "Traceback" not in err and "goes on" in err
        assert other.returncode == 130
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert (tmp_path / "count").read_text() == "x" and len(endpoint.requests) == 3


def test_kill_9_loses_at_most_the_call_under_way(job, tmp_path):
    with Endpoint(plan(), lambda handler: time.sleep(3), accept()) as endpoint:
        with start(job, endpoint) as other:
            while len(endpoint.requests) < 2:
                time.sleep(0.02)
            other.kill()
        assert c.main([*job, "--vlm-url", endpoint.url]) == 0
    assert (tmp_path / "count").read_text() == "x" and len(endpoint.requests) == 3


# ------------------------------------------------------------------------------------- anything


quick = hypothesis.settings(
    max_examples=200 if "COLLABVR_SLOW" in os.environ else 25, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck))
words = st.text(st.characters(exclude_characters="\0"))


@pytest.fixture(scope="module")
def listener():
    with Endpoint() as endpoint:
        yield endpoint.url


@quick
@hypothesis.given(task=words, name=st.sampled_from([
    "--N-max", "--M", "--seconds-first", "--seconds-next", "--seed", "--temperature",
    "--verify-fps", "--timeout", "--request-extra", "--on-exhausted", "--video-input", "--fps",
    "--sampling-steps", "--guidance-scale", "--offload", "--vlm-url", "--vgm-arg"]),
    value=words | st.floats().map(str) | st.integers().map(str))
@hypothesis.example(task="t", name="--M", value="x" * 500)
@hypothesis.example(task="t", name="--M", value="│ ──")
@hypothesis.example(task="-t", name="--vgm-arg", value="")
def test_whatever_is_typed_is_taken_or_refused_in_one_sentence(
        task, name, value, job, listener, capsys, tmp_path):
    hypothesis.assume(name != "--vlm-url" or not value.startswith("http"))  # it would be called
    hypothesis.assume(value not in ("-h", "--help") and task not in ("-h", "--help"))
    job[job.index("--task") + 1] = task
    status = c.main([*job, "--vlm-url", listener, "--dry-run", name, value])
    out, err = capsys.readouterr()
    assert (status, out[-1:]) in ((0, "\n"), (2, ""))
    assert status == 0 or err.startswith("collabvr: ") and err.rstrip("\n").isprintable()
    assert status == 0 or len(err) > 40
    assert not (tmp_path / "out").exists()


@quick
@hypothesis.given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_picture_is_read_or_refused(data, kind, tmp_path):
    raw = io.BytesIO()
    Image.fromarray(noise(24, 24, 1, 3).frames[:, :, 0]).save(raw, kind)
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


def fits(reply):
    """Whether a reply is a verification, said once more in other words."""
    if not isinstance(reply, dict) or set(reply) != set(accept()):
        return False
    good, executed = reply["good_fraction"], reply["action_executed"]
    return (type(reply["reason"]) is type(reply["suggestion"]) is str and type(executed) is bool
            and type(good) in (int, float) and 0 <= good <= 1
            and reply["progress"] in ("none", "partial", "complete")
            and reply["confidence"] in ("low", "medium", "high")
            and (reply["verdict"] == "reject" or reply["verdict"] == "accept" and executed
                 and reply["progress"] != "none"))


@quick
@hypothesis.given(reply=anything | almost)
@hypothesis.example(reply=accept())
@hypothesis.example(reply=reject(1))
def test_a_reply_is_a_verdict_only_if_every_field_of_it_is_what_it_should_be(reply):
    models = c.Models(None, lambda *request: {"text": json.dumps(reply)})
    if fits(reply):
        d = models.ask("verifier", "", [], c.CollabVR.Verification)
        assert d.model_dump() == reply
    else:
        with pytest.raises(c.Problem, match="no usable reply"):
            models.ask("verifier", "", [], c.CollabVR.Verification)


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
    replies = [said(plan()), said(accept())]
    monkeypatch.setattr(c.OpenAIVLM, "__call__", lambda *_: replies.pop(0))
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
    return c.Wan(vgm=str(TINY_WAN), fps=8, sampling_steps=12, guidance_scale=1.0)


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
    for name in (c.Wan().vgm, "./no-folder"):
        with pytest.raises(c.Problem, match="needs a CUDA GPU.*examples/maze/run.py"):
            _ = c.Wan(vgm=name).pipe


# ---------------------------------------------------------------------------- a real VLM server


def random_qwen2_vl(folder):
    """Saves a Qwen2-VL of 0.2 M random weights that knows bytes and pictures. Its processor is one
    of another model of that architecture: Qwen2-VL's own needs torchvision, for videos."""
    import tokenizers
    import transformers as hf
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pictures

    special = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad",
               "video_pad"]
    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
             *(f"<|{x}|>" for x in special)]
    ids = {x: 256 + i for i, x in enumerate(special)}
    letters = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(words)}, []))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=words[257:], image_token="<|image_pad|>")
    hf.PaddleOCRVLProcessor(
        pictures.Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56), tokenizer,
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{% for x in m.content %}"
        "{{ x.text if x.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}"
        "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n").save_pretrained(folder)
    hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6,
                                "mrope_section": [2, 3, 3]},
            "bos_token_id": 256, "eos_token_id": ids["im_end"], "pad_token_id": 256},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
                       "mlp_ratio": 2},
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
    )).save_pretrained(folder)


@pytest.mark.skipif("COLLABVR_SLOW" not in os.environ, reason="starts a server: COLLABVR_SLOW=1")
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ["fastapi", "uvicorn"])),
                    reason="needs fastapi and uvicorn: pip install 'transformers[serving]'")
def test_a_random_model_behind_transformers_serve_ends_the_run_loudly_and_never_in_an_accept(
        job, tmp_path, capsys):
    random_qwen2_vl(tmp_path / "vlm")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu",
               "--host", "127.0.0.1", "--port", str(port), "--default-seed", "0"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(
            command, stdout=log, stderr=log, env=env) as server:
        try:
            while "Uvicorn running" not in (tmp_path / "log").read_text():
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            job[job.index("--vlm") + 1] = str(tmp_path / "vlm")
            status = c.main([*job, "--vlm-url", f"http://127.0.0.1:{port}/v1",
                             "--request-extra", '{"max_tokens": 60}'])
        finally:
            server.terminate()
    assert status == 1, (tmp_path / "log").read_text()
    assert "The planner gave no usable reply (" in capsys.readouterr().err
    calls = kept(tmp_path / "out")
    assert [x["role"] for x in calls] == ["planner"] * 3 and not any("reply" in x for x in calls)
    assert all(x["tokens_out"] > 0 and x["tokens_in"] > len(c.CollabVR.PLANNER) for x in calls)
    assert not (tmp_path / "out" / "video.mp4").exists()
    assert "POST /v1/chat/completions" in (tmp_path / "log").read_text()


# ------------------------------------------------------------------- the file keeps its promises


def test_the_line_tags_of_algorithm_1_ascend_and_are_all_there():
    source = (ROOT / "collabvr.py").read_text()
    tags = [int(n) for n in re.findall(r"# line (\d+)$", source, re.MULTILINE)]
    assert tags == sorted(tags) and set(tags) >= {*range(1, 12), 13, 14, 15, 19}


def test_every_departure_is_tagged_where_it_happens_and_stands_in_the_readmes_table():
    source, readme = (ROOT / "collabvr.py").read_text(), (ROOT / "README.md").read_text()
    tagged = {int(n) for n in re.findall(r"\[D(\d+)\]", source)}
    table = [int(n) for n in re.findall(r"^\| D(\d+) \|", readme, re.MULTILINE)]
    assert table == [*range(1, len(table) + 1)] and tagged == set(table)


def test_the_examples_main_job_runs_offline_and_ends_in_a_verified_video(tmp_path):
    example = ROOT / "examples" / "maze" / "run.py"
    command = [sys.executable, str(example), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert trace["cost"]["clips"] >= 3 and trace["cost"]["calls"]["verifier"] >= 3
    assert {x["model"] for x in trace["calls"] if x["role"] != "vgm"} == {"maze-reader"}
    assert "by rule" in done.stdout and (tmp_path / "run" / "video.mp4").stat().st_size > 1000
