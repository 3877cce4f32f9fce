"""What collabvr.py does. No network, no GPU, no mock library.

The first part is the method's specification. A test is a script of what the VLM replies:

    run = go(plan(left=2), reject(), accept("partial"), plan(), accept())
    assert run.roles() == "pvvpv" and run.shown() == [2, 3] and run.status == "complete"

plan, accept, reject and route are replies of the planner, the verifier and the failure router.
The generator paints the number of the generation into the frames, so that `shown` can tell which
generations the video consists of. What follows are the models, the VLM's replies, the run folder,
the endpoint, the command line, and tests with a real pipeline and a real server.
"""

import base64
import code
import contextlib
import functools
import gc
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import linecache
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.parse
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import hypothesis
import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

import collabvr as c

ROOT = Path(c.__file__).parent
TINY_WAN = ROOT / "examples" / "maze" / "tiny-wan"
SLOW = "COLLABVR_SLOW" in os.environ
slow = pytest.mark.skipif(not SLOW, reason="takes longer: COLLABVR_SLOW=1")

I0 = np.full((32, 48, 3), 250, np.uint8)
ROLE = {
    "FirstPlan": "planner",
    "Plan": "planner",
    "Verification": "verifier",
    "Routing": "router",
    "LastRouting": "router",
}


# ------------------------------------------------------------------------------
# The little language


def plan(instruction="move it", left=1, done=False, target="there"):
    return {
        "observation": "a maze", "remaining_goal": "the rest", "task_complete": done,
        "instruction": instruction, "target_state": target, "estimated_steps_remaining": left,
    }


def accept(progress="complete", executed=True):
    return {
        "reason": "as planned", "action_executed": executed, "progress": progress,
        "good_fraction": 1.0, "suggestion": "", "confidence": "high", "verdict": "accept",
    }


def reject(good=0.5, suggestion="go left", reason="it went right"):
    return {
        "reason": reason, "action_executed": False, "progress": "none", "good_fraction": good,
        "suggestion": suggestion, "confidence": "low", "verdict": "reject",
    }


def route(action, suggestion="slower", steps=0, reason="so it is"):
    return {
        "reason": reason, "action": action, "suggestion": suggestion, "estimated_steps": steps,
    }


def without(reply, *names):
    return {name: value for name, value in reply.items() if name not in names}


class Painter:
    """A generator. Frame 0 is the conditioning frame; the number of the call fills the others."""

    identity = "a painter"

    def __init__(self, fps=4, fail=()):
        self.fps = fps
        self.fail = fail  # numbers of the calls that fail
        self.calls = []

    def __call__(self, frame, prompt, seconds, seed):
        call = {"frame": frame.copy(), "prompt": prompt, "seconds": seconds, "seed": seed}
        self.calls.append(call)
        if len(self.calls) in self.fail:
            raise RuntimeError("no more memory")
        return painted(frame, seconds, len(self.calls), self.fps)


def painted(frame, seconds, number, fps=4):
    frames = np.repeat(frame[None], int(seconds * fps) + 1, 0)
    frames[1:] = number
    return c.Clip(frames, fps)


class Script:
    """A VLM that replies what it is told to, and remembers what it was shown."""

    identity = "a script"

    def __init__(self, *replies):
        self.replies = list(replies)
        self.calls = []

    def __call__(self, instructions, parts, schema):
        self.calls.append({
            "role": ROLE[schema.__name__], "schema": schema.__name__, "parts": parts,
            "instructions": instructions, "text": text_of(parts),
        })
        if not self.replies:
            pytest.fail(f"a {schema.__name__} was asked for, and the script is over")
        return said(self.replies.pop(0))


def said(reply, **others):
    text = reply if isinstance(reply, str) else json.dumps(reply)
    return {"text": text, "tokens_in": 100, "tokens_out": 10, "model": "script-1", **others}


def text_of(parts):
    return "\n".join(part for part in parts if isinstance(part, str))


def clips_of(parts):
    return [part for part in parts if isinstance(part, c.Clip)]


def pictures_of(parts):
    return [part for part in parts if isinstance(part, np.ndarray)]


def numbers(clip):
    """The generations that a clip consists of, frame 0 apart."""
    return [number for number, _ in itertools.groupby(clip.frames[1:, 0, 0, 0].tolist())]


@dataclass
class Run:
    """A run that is over."""

    result: c.Result
    models: c.Models

    @property
    def status(self):
        return self.result.status

    @property
    def unverified(self):
        return self.result.unverified_steps

    @property
    def video(self):
        return self.result.video

    @property
    def cost(self):
        return self.models.cost()

    def shown(self):
        """The generations that the video consists of."""
        return numbers(self.video)

    def roles(self):
        """The VLM's calls: p for planner, v for verifier, r for router."""
        return "".join(call.role[0] for call in self.models.calls if call.role != "vgm")

    def given(self, name):
        """What the generator was given, call by call: frame, prompt, seconds or seed."""
        return [call[name] for call in self.models.vgm.calls]

    def asked(self, role):
        """What the VLM was told in this role, call by call."""
        return [call["text"] for call in self.models.vlm.calls if call["role"] == role]

    def seen(self, role):
        """The parts that the VLM was shown in this role, call by call."""
        return [call["parts"] for call in self.models.vlm.calls if call["role"] == role]


def go(*replies, vgm=None, vlm=None, folder=None, q="solve the maze", seed=0, **config):
    """A run, with two seconds for step 1 and one for the later ones, to the script's end."""
    vgm = vgm or Painter()
    vlm = vlm or Script(*replies)
    if folder is None:
        models = c.Models(vgm, vlm, seed)
    else:
        models = c.RecordedModels(vgm, vlm, folder, seed)
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1, **config})
    result = c.CollabVR(models, config).run(I0, q)
    assert not getattr(vlm, "replies", None), "the run ended before the script did"
    return Run(result, models)


def by_role(planner, verifier, router=None):
    """A VLM that asks one of these functions, with the parts and the schema, for its reply."""
    roles = {"planner": planner, "verifier": verifier, "router": router}

    def vlm(instructions, parts, schema):
        return said(roles[ROLE[schema.__name__]](parts, schema))

    return vlm


# ------------------------------------------------------------------------------
# Algorithm 1


def test_figure_10():
    """The paper's trace: reject, evolve, accept, plan again, accept."""
    run = go(
        plan("go right", left=2), reject(suggestion="to the right, not up"), accept("partial"),
        plan("go down", left=1), accept(),
    )
    assert run.roles() == "pvvpv"
    assert run.given("prompt") == [
        "go right", "go right Correction: to the right, not up", "go down"]
    assert run.shown() == [2, 3], "the rejected first clip is not in the video"
    assert (run.status, run.unverified) == ("complete", [])
    assert run.video.seconds == 3 and len(run.video.frames) == 3 * 4 + 1


def test_figure_10_obeys_the_evolved_prompt():
    """A clip that follows the correction and contradicts the first plan is accepted. [D11]"""
    places = {"right of the last green book": 1, "first empty gap": 2}

    def place(text):
        return places[max(places, key=text.rfind)]

    def vgm(frame, prompt, seconds, seed):
        number = place(prompt)
        return painted(frame, seconds, 9 if number == 1 else number)  # it cannot do the first

    def planner(parts, schema):
        return plan("put the book right of the last green book")

    def verifier(parts, schema):
        (action,) = (p for p in parts if isinstance(p, str) and p.startswith("Planned action:"))
        if numbers(clips_of(parts)[-1]) == [place(action)]:
            return accept()
        return reject(suggestion="put it into the first empty gap")

    run = go(vgm=vgm, vlm=by_role(planner, verifier), on_exhausted="replan")
    assert run.roles() == "pvv" and run.shown() == [2] and run.status == "complete"


def test_attempts_of_a_step_share_its_frame():
    """Every attempt starts from f; f becomes the accepted clip's last frame (line 9)."""
    run = go(plan(left=2), reject(), accept(), plan(), accept())
    first, second, third = run.given("frame")
    assert (first == I0).all() and (second == I0).all() and (third == 2).all()


def test_attempts_of_a_step_share_its_length():
    """A clip's length belongs to its step. [D8]"""
    run = go(plan(left=2), reject(), accept(), plan(), reject(), accept())
    assert run.given("seconds") == [2, 2, 1, 1]


def test_complete_takes_planner_and_verifier():
    """Line 10: the plan calls this step its last, and the verifier sees it complete. [D2]"""
    assert go(plan(left=1), accept("complete")).roles() == "pv"
    run = go(plan(left=2), accept("complete"), plan(left=1), accept("partial"), plan(), accept())
    assert run.roles() == "pvpvpv" and run.status == "complete"


def test_a_planner_may_end_the_run():
    """A later plan may find that nothing is left to do. [D1]"""
    run = go(plan(left=2), accept("partial"), plan("", done=True, target=""))
    assert run.roles() == "pvp" and run.shown() == [1] and run.status == "complete"


def test_no_planner_ends_a_run_without_a_clip():
    """While H is empty, task_complete must be false; the planner is told so. [D1]"""
    run = go(plan("then move", done=True), plan("move"), accept())
    assert run.roles() == "ppv" and run.given("prompt") == ["move"]
    assert "task_complete must be false" in run.asked("planner")[1]
    run = go(plan(), reject(), plan(done=True), plan("on"), accept(), M=1, on_exhausted="replan")
    assert run.roles() == "pvppv", "a rejected clip is not in H"


def test_a_run_ends_at_the_step_cap():
    """Line 19, after N_max steps."""
    run = go(*[plan(left=1), accept("partial")] * 3)
    assert run.roles() == "pvpvpv" and run.shown() == [1, 2, 3] and run.status == "step_cap"


def test_a_last_plan_that_sees_more_is_a_step_cap():
    """At t = N_max, too, the plan counts as it speaks. [D2]"""
    run = go(*[plan(left=2), accept()] * 3)
    assert (run.status, run.unverified) == ("step_cap", [])
    assert go(plan(left=5), accept(), N_max=1).status == "step_cap"


@pytest.mark.parametrize("empty", [plan(instruction=" "), plan(target="")])
def test_a_plan_needs_an_action_and_its_target(empty):
    """A plan without one of the two is not usable."""
    run = go(empty, plan(), accept())
    assert run.roles() == "ppv" and run.given("prompt") == ["move it"]


def test_every_clip_has_a_seed_of_its_own():
    """The run's seed plus the number of generations so far. [D6]"""
    run = go(plan(left=2), reject(), accept(), plan(), accept(), seed=40)
    assert run.given("seed") == [40, 41, 42]


def test_the_papers_bounds(unsynced):
    """Table 10, with the router off: 1 to 9 clips, 2 to 12 VLM calls, 1 to 3 steps."""
    clips, calls, steps = set(), set(), set()
    for seed in range(60):
        chance = random.Random(seed)

        def planner(parts, schema, chance=chance):
            done = schema is c.Plan and chance.random() < 0.2
            return plan(left=chance.choice([1, 2]), done=done)

        def verifier(parts, schema, chance=chance, never=seed == 0):
            replies = [accept("complete"), accept("partial"), reject(), reject(), reject()]
            return reject() if never else chance.choice(replies)

        policy = chance.choice(["replan", "best"])
        cost = go(vlm=by_role(planner, verifier), on_exhausted=policy).cost
        assert cost["clips"] == cost["steps"] + cost["regenerations"]
        clips.add(cost["clips"])
        calls.add(cost["calls"]["planner"] + cost["calls"]["verifier"])
        steps.add(cost["steps"])
        assert set(cost["calls"]) == {"planner", "verifier", "vgm"}
    assert (min(clips), max(clips)) == (1, 9)
    assert (min(calls), max(calls)) == (2, 12)
    assert steps == {1, 2, 3}


# ------------------------------------------------------------------------------
# Sec. 3.3: evolution


def test_corrections_of_a_step_add_up():
    """Line 15: each suggestion is folded into the prompt as it stands."""
    run = go(plan("go"), reject(suggestion="up"), reject(suggestion="slower"), accept())
    assert run.given("prompt")[2] == "go Correction: up Correction: slower"


def test_without_a_suggestion_the_reason_counts():
    """The same prompt once more would repeat its mistake. [D5]"""
    run = go(plan("go"), reject(suggestion=" ", reason="it fell"), accept())
    assert run.given("prompt")[1] == "go Correction: it fell"


# ------------------------------------------------------------------------------
# App. A.2: what planner and verifier are told


def test_the_planner_is_told_what_came_of_each_step():
    """Task, step, cap and every outcome in words; at the cap, that the step is the last. [D7]"""
    run = go(
        plan("one", left=3), accept("partial"),
        plan("two", left=2), reject(reason="it fell"), reject(), reject(reason="no door"),
        plan("three"), accept(), on_exhausted="replan",
    )
    first, _, last = run.asked("planner")
    assert "Task prompt: solve the maze" in first and "Steps so far:\nnone" in first
    assert "Current frame: the input image" in first and "Step: 1 of at most 3\n" in first
    assert "one Outcome: accepted, progress partial" in last
    assert re.search("two.* Outcome: rejected, nothing was kept: no door", last)
    assert "Step: 3 of at most 3 (the last allowed step)" in last


def test_the_planner_sees_input_and_last_frames():
    """The input image and the last frame of every clip in H, and no other. [D7]"""
    run = go(plan(left=3), accept("partial"), plan(left=2), reject(), accept(), plan(), accept())
    pictures = [pictures_of(parts) for parts in run.seen("planner")]
    assert [[p[0, 0, 0] for p in shown] for shown in pictures] == [[250], [250, 1], [250, 1, 3]]


def test_no_role_sees_more_than_eight_clips():
    """Requests have limits: the newest eight. [D7]"""
    steps = [[plan(str(i), left=2), accept("partial")] for i in range(12)]
    run = go(*itertools.chain(*steps), N_max=12)
    for role in ("planner", "verifier"):
        told = run.asked(role)[-1]
        assert told.count("Last frame of step") == 8 and "Last frame of step 11" in told


def test_the_planner_is_told_the_clips_length():
    """How many seconds of video its action has."""
    run = go(plan(left=2), accept("partial"), plan(), accept(), seconds_next=0.5)
    first, second = run.asked("planner")
    assert "Clip length: 2 s" in first and "Clip length: 0.5 s" in second


def test_the_verifier_judges_the_evolved_action():
    """The action as it stands, with the plan's target state, and the clip. [D11]"""
    run = go(plan("go right", target="at the door"), reject(suggestion="hop"), accept())
    first, second = run.asked("verifier")
    assert "Planned action: go right\nTarget state: at the door" in first
    assert "Planned action: go right Correction: hop\nTarget state: at the door" in second
    assert [numbers(clip) for clip in clips_of(run.seen("verifier")[1])] == [[2]]
    assert (pictures_of(run.seen("verifier")[1])[0] == I0).all()


def test_each_role_has_its_own_instructions():
    """A prompt names every field of its schema, reasons before verdicts. [D12]"""
    run = go(plan(), reject(), route("regen"), accept(), M=1)
    told = {call["role"]: call["instructions"] for call in run.models.vlm.calls}
    assert told == {"planner": c.PLANNER, "verifier": c.VERIFIER, "router": c.ROUTER}
    for prompt, schema in ((c.PLANNER, c.Plan), (c.VERIFIER, c.Verification),
                           (c.ROUTER, c.Routing)):
        assert not [name for name in schema.model_fields if name not in prompt]
    order = [*c.Verification.model_fields]
    assert order[0] == "reason" and order[-1] == "verdict"
    order = [*c.Routing.model_fields]
    assert order.index("reason") < order.index("action")


# ------------------------------------------------------------------------------
# After M rejections: Algorithm 1 (replan), C.2 (best) or the router (A.5) [D3]


def test_replan_is_algorithm_1_to_the_letter():
    """Nothing joins, the frame stays, the next plan is told why."""
    run = go(plan(left=2), reject(), reject(reason="a wall"), plan(), accept(),
             M=2, on_exhausted="replan")
    assert run.roles() == "pvvpv" and run.shown() == [3]
    assert (run.given("frame")[2] == I0).all()
    assert "Outcome: rejected, nothing was kept: a wall" in run.asked("planner")[1]


def test_best_keeps_the_most_good_seconds():
    """The latest of equals joins H, unverified, and the run goes on from its last frame."""
    run = go(plan(left=2), reject(0.7), reject(0.7), reject(0.1), plan(), accept(),
             on_exhausted="best")
    assert run.shown() == [2, 4] and run.unverified == [1] and run.status == "complete"
    assert (run.given("frame")[3] == 2).all()


def test_the_next_plan_is_told_why_the_best_failed():
    """And not why another attempt did."""
    run = go(plan(left=2), reject(0.6, reason="too late"), reject(0.1, reason="astray"),
             plan(), accept(), M=2, on_exhausted="best")
    told = run.asked("planner")[1]
    assert re.search("Outcome: rejected, kept.*: too late", told) and "astray" not in told


def test_with_nothing_in_H_the_best_attempt_is_shown():
    """A run that ends with an empty H returns what was paid for, marked so. [D4]"""
    run = go(plan(), reject(0.2), plan(), reject(0.6), plan(), reject(0.3),
             M=1, on_exhausted="replan")
    assert run.status == "best_attempt" and run.shown() == [2] and run.unverified == [2]


def test_the_best_attempt_has_the_most_good_seconds():
    """0.5 of two seconds are more than 0.9 of one."""
    run = go(plan(), reject(0.5), plan(), reject(0.9), M=1, N_max=2, on_exhausted="replan")
    assert run.shown() == [1] and run.video.seconds == 2


def test_only_the_best_rejected_clip_is_kept():
    """Clips that can no longer be chosen are given up."""
    held = []

    class Watched(c.CollabVR):
        def plan(self, I0, q, H, t):
            held.append([attempt.d.good_fraction for attempt in H.rejected])
            return super().plan(I0, q, H, t)

    replies = []
    for good in (0.1, 0.3, 0.2):
        replies += [plan(), reject(good), reject(good), reject(good)]
    models = c.Models(Painter(), Script(*replies))
    result = Watched(models, c.Config(on_exhausted="replan")).run(I0, "q")
    assert held == [[], [0.1], [0.3]]
    assert numbers(result.video) == [6], "the latest of step 2"


def test_regen_keeps_the_good_part_of_the_best():
    """D.5: from the first failing frame, with the step's length; the joined clip is verified."""
    run = go(plan(), reject(0.2), reject(0.5), reject(0.3), route("regen", "slower"), accept())
    assert run.roles() == "pvvvrv" and run.status == "complete" and run.unverified == []
    assert (run.given("frame")[3] == 2).all() and run.given("seconds")[3] == 2
    (judged,) = clips_of(run.seen("verifier")[-1])
    assert numbers(judged) == run.shown() == [2, 4]
    assert len(judged.frames) == len(run.video.frames) == 4 + 1 + 8  # half of 8, and 8 new ones


def test_regen_evolves_the_best_attempts_prompt():
    """And the verifier judges that prompt."""
    run = go(plan("go"), reject(0.2, "up"), reject(0.8, "down"), reject(0.3, "left"),
             route("regen", "slower"), accept())
    assert run.given("prompt")[3] == "go Correction: up Correction: slower"
    assert "Planned action: go Correction: up Correction: slower\n" in run.asked("verifier")[-1]


@pytest.mark.parametrize("good, T, k", [(0.29, 101, 29), (0.57, 101, 57), (1.0, 9, 8), (0, 9, 0)])
def test_regen_starts_after_the_last_good_frame(good, T, k):
    """k = floor(good_fraction (T - 1)): 0.29 of 100 frames are 29 frames, not 28."""
    def vgm(frame, prompt, seconds, seed):
        frames = np.repeat(frame[None], T, 0)
        frames[1:] = np.arange(1, T)[:, None, None, None]
        return c.Clip(frames, (T - 1) / seconds)

    run = go(plan(), reject(good), route("regen"), accept(), M=1, vgm=vgm)
    assert len(run.video.frames) == k + T
    assert run.video.frames[: k + 1, 0, 0, 0].tolist() == [250, *range(1, k + 1)]


@pytest.mark.parametrize("first, repaired, shown", [
    (0.2, 0.9, [1, 2]), (0.5, 0.1, [1]), (0.6, 0.5, [1, 2])])
def test_a_rejected_regen_keeps_the_best(first, repaired, shown):
    """The most good seconds of the attempts and the repaired clip."""
    run = go(plan(left=2), reject(first), route("regen"), reject(repaired), plan(), accept(), M=1)
    assert run.unverified == [1] and run.shown() == [*shown, 3]


def test_a_regen_can_go_on_or_complete_the_run():
    """An accepted repair is a step like any other."""
    run = go(plan(left=2), reject(), route("regen"), accept("partial"), plan(), accept(), M=1)
    assert run.roles() == "pvrvpv" and run.unverified == [] and run.status == "complete"


def test_split_hands_the_task_back_to_the_planner():
    """A.5: the next plan gets diagnosis, advice and estimate; H and f do not change."""
    run = go(plan("all of it"), reject(reason="too much"), route("split", "in two moves", 2),
             plan("half"), accept(), M=1)
    told = run.asked("planner")[1]
    assert re.search("rejected, nothing was kept: too much.* Advice: in two moves .*2", told)
    assert (run.given("frame")[1] == I0).all() and run.shown() == [2]


def test_split_uses_the_verifiers_suggestion():
    """When the router makes none."""
    run = go(plan(), reject(suggestion="in halves"), route("split", " ", 2), plan(), accept(), M=1)
    assert "Advice: in halves" in run.asked("planner")[1]


def test_split_hands_on_the_reason():
    """When neither router nor verifier suggests anything. [D5]"""
    run = go(plan(), reject(suggestion="", reason="it jumps"), route("split", "", 2),
             plan(), accept(), M=1)
    assert "Advice: it jumps" in run.asked("planner")[1]


def test_split_is_not_offered_at_the_last_step():
    """No step is left to take it up; the router that says so nevertheless is asked again."""
    run = go(plan(), reject(), route("split"), route("fallback"), M=1, N_max=1)
    assert run.roles() == "pvrr" and run.status == "fallback"
    first, second = run.asked("router")
    assert "Allowed actions: regen, fallback" in first
    assert "action: Input should be 'regen' or 'fallback'" in second


def test_fallback_is_one_clip_for_the_whole_task():
    """A.5: from I0, q and the suggestion, as long as step 1. It is the video, not verified."""
    run = go(plan(left=2), accept(), plan(), reject(), route("fallback", "in one go"),
             M=1, q="the task")
    assert run.given("prompt")[-1] == "the task Correction: in one go"
    assert (run.given("frame")[-1] == I0).all() and run.given("seconds")[-1] == 2
    assert run.status == "fallback" and run.shown() == [3] and run.unverified == [2]


@pytest.mark.parametrize("action, then", [("regen", [accept()]), ("fallback", [])])
def test_a_silent_router_leaves_the_verifiers_word(action, then):
    """Its suggestion is then the verifier's."""
    run = go(plan(), reject(suggestion="go left"), route(action, " "), *then, M=1)
    assert run.given("prompt")[1].endswith(" Correction: go left")


def test_the_router_sees_the_best_failed_clip():
    """With its action, its diagnosis, and the allowed routes. [D13]"""
    run = go(plan(left=2), accept(), plan("go down"), reject(0.1, "hop"),
             reject(0.6, "run", reason="late"), reject(0.3), route("fallback"))
    (told,), (parts,) = run.asked("router"), run.seen("router")
    assert "Last frame of step 1:" in told and "Planned action: go down Correction: hop\n" in told
    assert "Reason: late\nSuggestion: run\nGood fraction: 0.60" in told
    assert "Allowed actions: regen, split, fallback" in told
    assert [numbers(clip) for clip in clips_of(parts)] == [[3]]


@pytest.mark.parametrize("policy, replies", [
    ("best", [plan(left=3), reject(), plan(left=2), reject(), plan(), reject()]),
    ("route", [plan(left=3), reject(), route("regen"), reject(),
               plan(left=2), reject(), route("regen"), reject(),
               plan(), reject(), route("fallback")])])
def test_no_clip_is_called_accepted_that_was_not(policy, replies):
    """Neither in a prompt nor in an outcome."""
    run = go(*replies, M=1, on_exhausted=policy)
    told = [call["text"] for call in run.models.vlm.calls]
    later = [text for text in told if "Last frame of step 1" in text]
    assert later and all("Outcome: rejected, kept as the best one" in text for text in later)
    assert not [text for text in told if "accepted" in text]


# ------------------------------------------------------------------------------
# Sec. 4: cost


def test_seconds_of_all_clips_count():
    """Rejected and routed ones, too, whether or not they are in the video."""
    run = go(plan(left=2), reject(), reject(), reject(), route("regen"), reject(),
             plan(), accept())
    assert run.cost["clips"] == 5 and run.cost["vgm_seconds"] == 2 * 4 + 1
    run = go(plan(left=2), accept(), plan(), reject(), route("fallback"), M=1)
    assert run.cost["clips"] == 3 and run.cost["vgm_seconds"] == 2 + 1 + 2


@pytest.mark.parametrize("count, replies", [
    (0, [plan(), accept()]),
    (0, [plan(left=2), accept(), plan(), accept()]),
    (2, [plan(left=2), reject(), accept(), plan(), reject(), accept()]),
    (3, [plan(), reject(), reject(), reject(), route("regen"), accept()]),
    (2, [plan(), reject(), reject(), reject(), route("fallback")]),
    (2, [plan(), reject(), reject(), reject(), route("split"), plan(), accept()]),
])
def test_regenerations_are_attempts_after_the_first(count, replies):
    """As in Tables 10 and 12: within a step, and regen's clip. A fallback is none."""
    assert go(*replies).cost["regenerations"] == count


def test_calls_and_tokens_count_by_role():
    """Replies that could not be used were paid for, too."""
    cost = go(plan(), reject(), route("regen"), "?", accept(), M=1).cost
    assert cost["calls"] == {"planner": 1, "vgm": 2, "verifier": 3, "router": 1}
    assert cost["tokens_in"]["verifier"] == 300 and cost["tokens_out"]["router"] == 10
    assert set(cost["wall_seconds"]) == set(cost["calls"])
    assert min(cost["wall_seconds"].values()) >= 0 and cost["steps"] == 1


@pytest.mark.parametrize("config", [
    {}, {"on_exhausted": "best"}, {"on_exhausted": "replan", "seconds_next": 3},
    {"N_max": 1, "M": 1}, {"N_max": 4, "M": 2, "seconds_first": 1, "seconds_next": 2}])
def test_the_worst_case_is_a_run_of_rejections(config):
    """Clips, seconds and VLM calls, with the dearest routes."""
    costs = []
    for last in ("regen", "fallback"):
        def router(parts, schema, last=last):
            return route(last if schema is c.LastRouting else "regen")

        vlm = by_role(lambda *_: plan(), lambda *_: reject(), router)
        cost = go(vlm=vlm, **config).cost
        calls = sum(cost["calls"].values()) - cost["calls"]["vgm"]
        costs.append((cost["clips"], cost["vgm_seconds"], calls))
    worst = c.Config(**{"seconds_first": 2, "seconds_next": 1, **config}).worst_case()
    assert worst == tuple(map(max, *costs))


@pytest.mark.parametrize("kind, wrong", [
    (c.Config, {"n_max": 5}), (c.Config, {"attempts": 2}), (c.Config, {"N_max": 0}),
    (c.Config, {"M": 0}), (c.Config, {"M": 1.5}), (c.Config, {"seconds_first": -1}),
    (c.Config, {"seconds_next": math.nan}), (c.Config, {"seconds_first": math.inf}),
    (c.Config, {"on_exhausted": "stop"}),
    (c.OpenAIVLM, {"model": "m"}), (c.OpenAIVLM, {"verify_fps": 0}),
    (c.OpenAIVLM, {"temperature": -1}), (c.OpenAIVLM, {"video_input": "video"}),
    (c.Wan, {"fps": -1}), (c.Wan, {"steps": 3}), (c.Wan, {"offload": "auto"})])
def test_wrong_settings_are_refused_in_python(kind, wrong):
    """Misspelt or out of range, by name."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)


# ------------------------------------------------------------------------------
# Models: the one seam to both models


@pytest.fixture
def unsynced(monkeypatch):
    """Many calls that do not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def test_models_in_memory_write_no_file(tmp_path, monkeypatch):
    """The paper's part needs no folder."""
    monkeypatch.chdir(tmp_path)
    go(plan(), accept())
    assert not list(tmp_path.iterdir())


def test_each_call_is_in_the_trace_in_order():
    """A Call says what was asked of the generator, or what the VLM replied."""
    run = go(plan("go", left=1), reject(), accept())
    calls = run.models.calls
    assert [call.role for call in calls] == ["planner", "vgm", "verifier", "vgm", "verifier"]
    first, second = calls[1], calls[3]
    assert (first.prompt, first.seed, first.j, first.seconds) == ("go", 0, 1, 2)
    assert (second.seed, second.j, second.size) == (1, 2, (32, 48, 4))
    assert calls[0].reply["instruction"] == "go" and calls[0].model == "script-1"
    assert calls[2].tokens_in == 100 and calls[2].fault is None and calls[2].error is None


def test_a_failed_generation_costs_no_attempt():
    """It is tried once more with the next seed, and counted."""
    run = go(plan(), reject(), accept(), vgm=Painter(fail=[1, 3]), M=2)
    assert run.given("seed") == [0, 1, 2, 3]
    assert (run.cost["generator_errors"], run.cost["clips"], run.cost["vgm_seconds"]) == (2, 2, 4)
    made = [call for call in run.models.calls if call.role == "vgm"]
    assert ["no more memory" in (call.error or "") for call in made] == [True, False] * 2
    assert [call.j for call in made] == [1, 1, 2, 2] and run.cost["regenerations"] == 1
    assert all(call.wall_seconds >= 0 for call in made)


def test_a_second_failure_in_a_row_ends_the_run(caplog):
    """With its reason; the traceback is in the log."""
    with pytest.raises(c.Problem, match="failed twice in a row .*no more memory"):
        go(plan(), vgm=Painter(fail=[1, 2]))
    assert caplog.text.count("Traceback") == 2


def test_a_problem_of_a_generator_ends_the_run():
    """It says that no further try can help."""
    def vgm(*request):
        raise c.Problem("The generator is not there.")

    with pytest.raises(c.Problem, match="is not there"):
        go(plan(), vgm=vgm)


def test_a_failed_seed_is_replaced_by_a_fresh_one():
    """Baselines give seeds; no other candidate has the one that stands in."""
    vgm = Painter(fail=[2])
    models = c.Models(vgm, None)
    for seed in (1, 2, 3, 4):
        models.generate(I0, "q", 2, seed=seed)
    first, failed, instead, *others = [call["seed"] for call in vgm.calls]
    assert [first, failed, *others] == [1, 2, 3, 4] and not 0 <= instead <= 100
    assert models.cost()["clips"] == 4 and models.cost()["generator_errors"] == 1


@pytest.mark.parametrize("frames", [
    np.zeros((1, 8, 8, 3), np.uint8), np.zeros((5, 8, 8), np.uint8), np.zeros((5, 8, 8, 3)), None,
    np.full((5, 8, 8, 3), math.nan), np.zeros((5, 8, 8, 4), np.uint8),
    np.zeros((5, 0, 8, 3), np.uint8)])
def test_a_clip_that_is_none_is_a_failure(frames):
    """Frames are uint8 RGB (T, H, W, 3), and more than one."""
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=lambda *_: c.Clip(frames, 8))


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf, 1e6, "fast"])
def test_a_clip_of_no_sensible_rate_is_a_failure(fps):
    """What cannot be saved is known when the clip is made, not at the end."""
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=lambda frame, *_: c.Clip(np.repeat(frame[None], 33, 0), fps))


def test_a_clip_that_is_too_short_is_a_failure():
    """Fewer than half the seconds asked for."""
    with pytest.raises(c.Problem, match="2 s of new video were asked for, not 0.75 s"):
        go(plan(), vgm=lambda frame, *_: painted(frame, 0.75, 1))
    assert go(plan(), accept(), vgm=lambda frame, *_: painted(frame, 1, 1)).video.seconds == 1


@pytest.mark.parametrize("made", [np.zeros((9, 32, 48, 3), np.uint8), None, [1, 2]])
def test_what_is_no_clip_is_told_so(made):
    """An array, or nothing, in place of a Clip."""
    with pytest.raises(c.Problem, match="a generator returns a Clip"):
        go(plan(), vgm=lambda *_: made)


@pytest.mark.parametrize("size, fps", [((40, 48), 4), ((32, 48), 8)])
def test_a_clip_that_cannot_join_is_a_failure(size, fps):
    """Another size or rate than the first clip's."""
    made = iter([((32, 48), 4), (size, fps), (size, fps)])

    def vgm(frame, prompt, seconds, seed):
        (height, width), rate = next(made)
        return c.Clip(np.zeros((9, height, width, 3), np.uint8), rate)

    with pytest.raises(c.Problem, match="failed twice in a row .*differs from"):
        go(plan(left=2), accept(), plan(), vgm=vgm)


@pytest.mark.parametrize("fps", [np.float32(29.97), Fraction(8), np.int64(8)])
def test_any_number_is_a_rate(fps):
    """Frames a second as numpy or Python has them."""
    models = c.Models(lambda frame, *_: c.Clip(np.repeat(frame[None], 9, 0), fps), None)
    clip = models.generate(I0, "p", 0.25)
    assert clip.fps == float(fps) and json.dumps(models.calls[0].model_dump())


def test_a_generator_may_use_one_buffer(tmp_path):
    """Clips are copied."""
    buffer = np.zeros((5, *I0.shape), np.uint8)

    def vgm(frame, prompt, seconds, seed):
        buffer[:] = frame
        buffer[1:] = 100 + seed
        return c.Clip(buffer, 4)

    script = [plan(left=2), accept("partial"), plan(), accept()]
    run = go(*script, vgm=vgm, folder=tmp_path)
    assert run.shown() == [100, 101]
    assert (go(vgm=vgm, folder=tmp_path).video.frames == run.video.frames).all()


def test_a_generator_may_write_into_its_frame():
    """Neither the input nor the video suffers."""
    def vgm(frame, prompt, seconds, seed):
        frames = np.repeat(frame[None], 5, 0)
        frames[1:] = 100 + seed
        frame[:] = 0
        return c.Clip(frames, 4)

    picture = I0.copy()
    models = c.Models(vgm, Script(plan(left=2), accept("partial"), plan(), accept()))
    result = c.CollabVR(models, c.Config(seconds_first=1, seconds_next=1)).run(picture, "q")
    assert (picture == I0).all()
    assert result.video.frames[:, 0, 0, 0].tolist() == [250] + [100] * 4 + [101] * 4


@pytest.mark.parametrize("picture", [Image.fromarray(I0).convert("L"), I0 / 255, I0[..., 0],
                                     "x.png", None, np.zeros((0, 4, 3), np.uint8)])
def test_a_picture_is_a_uint8_rgb_array(picture):
    """Anything else gets a sentence before it costs something."""
    vlm = Script(plan(), accept())
    with pytest.raises(c.Problem, match="a uint8 RGB array"):
        c.CollabVR(c.Models(Painter(), vlm)).run(picture, "q")
    assert not vlm.calls


def test_models_serve_one_run(tmp_path):
    """A second one is refused in a sentence, in memory and with a folder."""
    for folder in (None, tmp_path):
        models = go(plan(), accept(), folder=folder).models
        with pytest.raises(c.Problem, match="make new ones for the next"):
            c.CollabVR(models).run(I0, "another task")
        assert len(models.calls) == 3


def test_memory_grows_by_the_joined_frames(tmp_path, unsynced):
    """And a step costs as much at the end as at the beginning."""
    steps, marks = 60, []

    def planner(parts, schema):
        marks.append((time.process_time(), tracemalloc.get_traced_memory()[0]))
        return plan(left=2)

    frame = np.zeros((64, 64, 3), np.uint8)
    vlm = by_role(planner, lambda *_: accept("partial"))
    vgm = functools.partial(painted_by_number, counter=itertools.count(1))
    vgm.identity = vlm.identity = "as always"
    models = c.RecordedModels(vgm, vlm, tmp_path)
    tracemalloc.start()
    gc.disable()  # its work grows with all that other tests have left behind
    try:
        c.CollabVR(models, c.Config(N_max=steps, seconds_first=4, seconds_next=4)).run(frame, "q")
    finally:
        gc.enable()
        tracemalloc.stop()
    assert models.cost()["clips"] == steps and len(marks) == steps
    clip = 17 * 64 * 64 * 3
    assert marks[-1][1] - marks[20][1] < 1.2 * clip * (steps - 21)
    early, late = (marks[end][0] - marks[begin][0] for begin, end in ((10, 30), (39, 59)))
    assert late < 1.5 * early + 0.2


def painted_by_number(frame, prompt, seconds, seed, counter):
    return painted(frame, seconds, next(counter))


def test_the_log_tells_waits_and_replies(caplog):
    """Each model is announced before it is waited for, and what it said is told after."""
    caplog.set_level("INFO", "collabvr")
    before = []

    class Watched(Script):
        def __call__(self, *request):
            before.append(caplog.messages[-1])
            return super().__call__(*request)

    go(vlm=Watched(plan(left=2), reject(reason="too far"), "?", accept(), plan(), accept()))
    waits = [re.fullmatch(r"step (\d): (\w+): waiting", line).groups() for line in before]
    assert waits == [("1", "planner"), *[("1", "verifier")] * 3, ("2", "planner"),
                     ("2", "verifier")]
    assert "reason: too far" in caplog.text and "fault: " in caplog.text
    assert caplog.messages.count("step 1: vgm: attempt 2, seed 1: waiting") == 1


# ------------------------------------------------------------------------------
# Replies: lenient where no reject can become an accept, strict in all else [D9]


ACCEPT = json.dumps(accept())
REJECT = json.dumps(reject())

UNUSABLE = {
    "nothing": "", "prose": "Accept.", "null": "null", "markup": "<html>busy</html>",
    "cut off": ACCEPT[:-20], "half a character": '{"reason": "\\ud83d"}',
    "another verdict": {**accept(), "verdict": "Accept."},
    "an undecided verdict": {**accept(), "verdict": "maybe"},
    "no verdict": without(accept(), "verdict"), "null verdict": {**accept(), "verdict": None},
    "no action_executed": without(accept(), "action_executed"),
    "no progress": without(accept(), "progress"), "no reason": without(accept(), "reason"),
    "a reject without good_fraction": without(reject(), "good_fraction"),
    "a field too many": {**accept(), "note": 1},
    "a wrong type": {**accept(), "action_executed": "perhaps"},
    "a fraction out of range": {**accept(), "good_fraction": 1.7},
    "no number": {**accept(), "good_fraction": math.nan},
    "accepted though not executed": accept(executed=False),
    "accepted without progress": accept("none"),
    "a verdict twice": ACCEPT[:-1] + ', "verdict": "accept"}',
    "two verdicts": ACCEPT[:-1] + ', "verdict": "reject"}',
    "two objects": ACCEPT + REJECT, "two objects in words": f"{ACCEPT} or {REJECT}",
    "far apart": ACCEPT + " " * 100_000 + REJECT,
    "far apart in a fence": f"```json\n{ACCEPT}{' ' * 100_000}{REJECT}\n```",
    "an empty list": "[]", "a list of one": f"[{ACCEPT}]", "a list": f'["so", {ACCEPT}]',
    "a list in words": f"Here: [{ACCEPT}]", "a fenced list": f"\n```json\n[1, {ACCEPT}]```",
    "only a thought": f"<think>{ACCEPT}</think>",
    "an unfinished thought": f"<think>maybe {ACCEPT} but no, it fell",
    "an unfinished thought of any name": f"<reasoning>maybe {ACCEPT} but no, it fell",
    "a thought that ends later": f"{ACCEPT}</think>no",
    "deep lists": "[" * 50_000, "deep objects": '{"reason":' * 20_000 + "1" + "}" * 20_000,
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_reply_is_never_an_accept(name):
    """The VLM is asked again, with its own reply and what is wrong with it."""
    bad = UNUSABLE[name] if isinstance(UNUSABLE[name], str) else json.dumps(UNUSABLE[name])
    run = go(plan(), bad, reject(), accept())
    assert run.roles() == "pvvv" and len(run.given("seed")) == 2
    again = run.asked("verifier")[1]
    if bad:
        assert f"Your last reply was: {bad[:4000]}" in again and "could not be used: " in again


def test_three_unusable_replies_end_the_run():
    """With the reply in the sentence, so that one can see it."""
    with pytest.raises(c.Problem, match="verifier gave no usable reply .*'Accept.'"):
        go(plan(), "Accept.", "Accept.", "Accept.")


def test_all_faults_are_told_at_once():
    """With the reply that had them."""
    bad = {**without(reject(), "verdict"), "progress": "much", "good_fraction": 2, "note": 1}
    again = go(plan(), bad, accept()).asked("verifier")[1]
    assert f"Your last reply was: {json.dumps(bad)}" in again
    for name in ("verdict", "progress", "good_fraction", "note"):
        assert re.search(f"could not be used: .*{name}: ", again), name
    assert "errors.pydantic.dev" not in again and "Value error" not in again


def test_a_reject_needs_a_reason_or_a_suggestion():
    """Without both, nothing could join the prompt."""
    run = go(plan(), reject(reason=" ", suggestion=""), accept())
    assert run.roles() == "pvv" and "a reject needs a reason" in run.asked("verifier")[1]


def test_an_accept_that_contradicts_itself_is_told_so():
    """What it needs is said."""
    for wrong in (accept(executed=False), accept("none")):
        again = go(plan(), wrong, accept()).asked("verifier")[1]
        assert "an accept needs action_executed true and progress not none" in again


def test_only_the_last_reply_is_shown_again():
    """A second unusable reply takes the first one's place."""
    again = go(plan(), "one", "two", accept()).asked("verifier")[2]
    assert "Your last reply was: two" in again and "Your last reply was: one" not in again


LENIENT = {
    "case and blanks": {**accept(), "verdict": " ACCEPT\n", "progress": "Complete "},
    "no suggestion": without(accept(), "suggestion"),
    "null suggestion": {**accept(), "suggestion": None},
    "no confidence": without(accept(), "confidence"),
    "confidence as a number": {**accept(), "confidence": 0.9},
    "confidence as a list": {**accept(), "confidence": ["high"]},
    "numbers as text": {**accept(), "good_fraction": "1.0"},
    "booleans as text": {**accept(), "action_executed": "true"},
    "an accept without good_fraction": without(accept(), "good_fraction"),
    "an accept with a null good_fraction": {**accept(), "good_fraction": None},
    "a long reason": {**accept(), "reason": "x" * 200_000},
}


@pytest.mark.parametrize("name", LENIENT)
def test_what_cannot_turn_a_reject_is_forgiven(name):
    """One reply is enough."""
    run = go(plan(), LENIENT[name])
    assert run.roles() == "pv" and run.status == "complete"


def test_good_fraction_is_1_beside_an_accept():
    """A.2 asks for it on a reject only."""
    assert c.Verification(**without(accept(), "good_fraction")).good_fraction == 1.0
    d = c.Verification(**without(accept(), "good_fraction", "verdict"), verdict=" Accept")
    assert d.good_fraction == 1.0 and d.verdict == "accept"


def test_plans_and_routes_are_read_as_leniently():
    """Numbers and booleans as text, the route's case, a missing suggestion."""
    steps = {**plan(left=2), "estimated_steps_remaining": "2", "task_complete": "False"}
    silent = {**without(route("split"), "suggestion"), "action": " SPLIT", "estimated_steps": "2"}
    run = go(steps, reject(suggestion=None), silent, plan(), accept(), M=1)
    assert run.roles() == "pvrpv" and "Advice: it went right" in run.asked("planner")[1]


@pytest.mark.parametrize("wrapped", [
    "```json\nREPLY\n```", "```\nREPLY```", "Sure, here it is: REPLY Good luck!", " \n REPLY \n",
    "<think>It is {so}, or is it?</think>\nREPLY", "<think>a</think>{}</think>```REPLY```",
    "half a thought, then</think>Here: REPLY\n", "<thought>[1] so</thought>REPLY"])
def test_fences_thoughts_and_sentences_do_no_harm(wrapped):
    """The object is found among them."""
    replies = [wrapped.replace("REPLY", json.dumps(reply)) for reply in (plan(), accept())]
    run = go(*replies)
    assert run.roles() == "pv" and run.status == "complete"


@pytest.mark.parametrize("reason", ["</think>", "<think>", "a } b { c", "[1]", "```"])
def test_a_reply_that_parses_is_taken_as_it_stands(reason):
    """Whatever stands in its texts: a </think> there ends no thought."""
    run = go(plan(), {**reject(), "reason": reason}, {**accept(), "reason": reason})
    assert run.roles() == "pvv" and run.models.calls[-1].reply["reason"] == reason


@pytest.mark.parametrize("fault", ["finish_reason length", "I cannot help with that"])
def test_a_reply_with_a_fault_is_not_used(fault):
    """Even if it parses: it was cut off, or refused."""
    def vlm(instructions, parts, schema):
        return said(plan()) if schema is c.FirstPlan else said(accept(), fault=fault)

    with pytest.raises(c.Problem, match=fault):
        go(vlm=vlm)


def test_a_vlm_may_return_plain_text():
    """Or a dict of which only the text is known."""
    script = [json.dumps(plan()), {"text": ACCEPT}]
    run = go(vlm=lambda *_: script.pop(0))
    assert run.status == "complete" and run.cost["calls"] == {"planner": 1, "vgm": 1, "verifier": 1}
    assert run.cost["tokens_in"] == {"planner": 0, "vgm": 0, "verifier": 0}


@pytest.mark.parametrize("odd", [
    {"text": None}, {}, {"text": 5}, None, 7, ["x"], {"text": ACCEPT, "tokens_in": "many"},
    {"text": "no", "reply": accept(), "role": "x", "t": 9, "seconds": 3, "size": [1, 2, 3]}])
def test_a_vlm_that_returns_no_text_is_asked_again(odd):
    """What it claims beside its text is not believed."""
    script = [said(plan()), odd, said(accept())]
    run = go(vlm=lambda *_: script.pop(0))
    assert run.status == "complete" and run.roles() == "pvv"
    assert [call.t for call in run.models.calls] == [1] * 4
    assert run.cost["clips"] == 1 and run.cost["vgm_seconds"] == 2


def test_a_vlm_that_raises_is_asked_again(caplog):
    """A failed call, like a generator's: counted, its traceback in the log."""
    script = [said(plan()), ConnectionError("gone"), said(accept())]

    def vlm(*request):
        reply = script.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    run = go(vlm=vlm)
    assert run.status == "complete" and run.roles() == "pvv"
    assert run.models.calls[2].fault == "ConnectionError: gone" and "Traceback" in caplog.text
    script[:] = [said(plan()), *[ValueError("no")] * 3]
    with pytest.raises(c.Problem, match="verifier gave no usable reply .*ValueError: no"):
        go(vlm=vlm)


def test_a_problem_of_a_vlm_ends_the_run():
    """Nothing is asked again."""
    asked = []

    def vlm(*request):
        asked.append(request)
        raise c.Problem("The key is wrong.")

    with pytest.raises(c.Problem, match="The key is wrong"):
        go(vlm=vlm)
    assert len(asked) == 1


SCHEMAS = [c.Plan, c.FirstPlan, c.Verification, c.Routing, c.LastRouting]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas_are_plain_enough_for_every_engine(schema):
    """No const, length or pattern: some engines refuse them, others get them wrong."""
    text = json.dumps(schema.model_json_schema())
    for word in ("const", "minLength", "maxLength", "pattern", "default", "anyOf"):
        assert f'"{word}"' not in text
    found = schema.model_json_schema()
    assert found["additionalProperties"] is False
    assert found["required"] == list(found["properties"]) == list(schema.model_fields)


def test_schemas_offer_what_is_allowed():
    """Three routes, two at the last step; three words for progress, two for a verdict."""
    def words(schema, name):
        return schema.model_json_schema()["properties"][name]["enum"]

    assert words(c.Routing, "action") == ["regen", "split", "fallback"]
    assert words(c.LastRouting, "action") == ["regen", "fallback"]
    assert words(c.Verification, "progress") == ["none", "partial", "complete"]
    assert words(c.Verification, "confidence") == ["low", "medium", "high"]
    assert words(c.Verification, "verdict") == ["accept", "reject"]
    assert c.FirstPlan.model_json_schema()["properties"]["task_complete"]["type"] == "boolean"


def test_each_step_is_asked_with_its_schema():
    """FirstPlan while H is empty, LastRouting at the last step."""
    run = go(plan(left=2), reject(), route("split"), plan(left=2), accept(),
             plan(), reject(), route("fallback"), M=1)
    assert [call["schema"] for call in run.models.vlm.calls if call["role"] != "verifier"] == [
        "FirstPlan", "Routing", "FirstPlan", "Plan", "LastRouting"]


# ------------------------------------------------------------------------------
# Clips, pictures, videos


@pytest.mark.parametrize("T, fps, rate, chosen", [
    (97, 16, 1, [0, 16, 32, 48, 64, 80, 96]), (49, 16, 1, [0, 16, 32, 48]),
    (17, 8, 8, list(range(17))), (17, 8, 1, [0, 8, 16]), (2, 16, 1, [0, 1]),
    (50, 16, 1, [0, 16, 33, 49]), (17, 8, 1000, list(range(17)))])
def test_sampled_frames_are_evenly_spread(T, fps, rate, chosen):
    """A.1: one a second, the first and the last among them: 7 of 6 s, 4 of 3 s."""
    assert c.sample(c.Clip(np.zeros((T, 1, 1, 3), np.uint8), fps), rate) == chosen


def test_joining_drops_the_repeated_frame():
    """And the seconds add up. [D8]"""
    a, b = (c.Clip(np.full((T, 2, 2, 3), T, np.uint8), 16) for T in (97, 49))
    assert len(c.concat([a, b]).frames) == 145
    assert c.concat([a, b]).seconds == a.seconds + b.seconds == 9


@pytest.mark.parametrize("size, multiple, fitted", [
    ((832, 480), 16, (832, 480)), ((1920, 1080), 16, (832, 464)), ((96, 96), 16, (96, 96)),
    ((100, 90), 16, (96, 80)), ((480, 832), 32, (480, 832)), ((20, 20), 32, (32, 32)),
    ((5000, 100), 16, (4464, 80))])
def test_pictures_shrink_to_the_area(size, multiple, fitted):
    """A.1: at most 832x480 pixels in all, the shape kept, never enlarged."""
    width, height = c.fit(*size, multiple)
    assert (width, height) == fitted


def noise(*shape):
    return c.Clip(np.random.default_rng(0).integers(0, 256, shape, np.uint8), 8)


def decoded(path, data):
    """A video's frames, and what is known of it."""
    path.write_bytes(data)
    return iio.imread(path, plugin="pyav"), iio.immeta(path, plugin="pyav")


def test_a_video_is_the_same_bit_for_bit():
    """Same frames, same bytes."""
    clip = noise(12, 12, 12, 3)
    clip = c.Clip(clip.frames.repeat(8, 1).repeat(8, 2), 8)
    assert len({c.mp4(clip) for _ in range(20)}) == 1


@pytest.mark.parametrize("shape", [(9, 33, 47, 3), (49, 233, 247, 3), (2, 16, 300, 3)])
def test_stored_clips_are_exact(tmp_path, shape):
    """FFV1 gives the same frames, and odd sides do no harm."""
    clip = noise(*shape)
    frames, meta = decoded(tmp_path / "a.mkv", c.lossless(clip))
    assert meta["codec"] == "ffv1" and (frames == clip.frames).all()
    assert (c.read_lossless(c.lossless(clip)) == clip.frames).all()


@pytest.mark.parametrize("size, written", [
    ((33, 47), (34, 48)), ((64, 64), (64, 64)), ((480, 832), (480, 832)), ((1, 1), (2, 2))])
def test_a_video_plays_anywhere(size, written, tmp_path):
    """H.264 of even sides in yuv420p, at the clip's rate."""
    frames, meta = decoded(tmp_path / "a.mp4", c.mp4(noise(5, *size, 3)))
    assert meta["video_format"] == "yuv420p" and meta["codec"] == "h264" and meta["fps"] == 8
    assert frames.shape == (5, *written, 3)


@pytest.mark.parametrize("shape, fps", [
    ((100, 5000), 8), ((5001, 101), 8), ((2, 16384), 8), ((16384, 2), 8), ((16, 16), 1000),
    ((16, 16), 1), ((16, 16), 23.976), ((16, 16), 0.5)])
def test_what_a_generator_may_make_can_be_saved(shape, fps, tmp_path):
    """No run that was paid for fails at its end."""
    def vgm(frame, prompt, seconds, seed):
        frames = np.repeat(np.full((1, *shape, 3), 90, np.uint8), int(seconds * fps) + 2, 0)
        return c.Clip(frames, fps)

    run = go(plan(), accept(), vgm=vgm, folder=tmp_path, seconds_first=0.1)
    assert run.models.save(run.result).stat().st_size > 100
    again = go(vgm=vgm, folder=tmp_path, seconds_first=0.1)
    assert (again.video.frames == run.video.frames).all()


def saved(tmp_path, picture, name="x.png", **options):
    picture.save(tmp_path / name, **options)
    return c.load_image(str(tmp_path / name))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, tmp_path):
    """By EXIF's orientation, as Pillow would turn them."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x112] = orientation
    picture = Image.fromarray(np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3))
    loaded = saved(tmp_path, picture, "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as kept:
        assert (loaded == np.array(ImageOps.exif_transpose(kept).convert("RGB"))).all()


ODD_EXIF = {  # entries of a rotated camera's picture that Pillow reads and cannot write again
    "a comment as a number": (0x9286, 3, 1, b"\x05\x00\x00\x00"),
    "text that is none": (0x10F, 2, 4, b"\xff\xfe\xfd\x00"),
    "a ratio of nothing": (0x11A, 5, 1, b"\xff\xff\x00\x00"),
    "a type that is none": (0x10E, 99, 1, b"\x00\x00\x00\x00"),
    "more values than there are": (0x111, 4, 9999, b"\x08\x00\x00\x00"),
    "a part that is not there": (0x8769, 4, 1, b"\xff\xff\xff\x00"),
    "negative": (0x100, 9, 1, b"\xff\xff\xff\xff"),
}


@pytest.mark.parametrize("name", ODD_EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_odd_exif_does_not_stop_a_picture(name, tmp_path):
    """The orientation is read; nothing of it is written back."""
    def entry(tag, kind, count, value):
        return b"".join([tag.to_bytes(2, "little"), kind.to_bytes(2, "little"),
                         count.to_bytes(4, "little"), value])

    entries = sorted([(0x112, 3, 1, b"\x06\x00\x00\x00"), ODD_EXIF[name]])
    exif = b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little")
    exif += b"".join(itertools.starmap(entry, entries)) + bytes(4)
    assert saved(tmp_path, Image.new("RGB", (40, 20)), "x.jpg", exif=exif).shape == (40, 20, 3)


def test_colours_of_all_kinds_become_rgb(tmp_path):
    """Transparency on white; palettes, CMYK and grey."""
    assert (saved(tmp_path, Image.new("RGBA", (20, 20), (9, 9, 9, 0))) == 255).all()
    palette = Image.new("P", (20, 20))
    palette.putpalette([10, 20, 30] + [0] * 765)
    assert (saved(tmp_path, palette) == (10, 20, 30)).all()
    assert (saved(tmp_path, palette, transparency=0) == 255).all()
    assert saved(tmp_path, Image.new("CMYK", (20, 20)), "x.jpg").shape == (20, 20, 3)
    assert (saved(tmp_path, Image.new("LA", (20, 20), (7, 255))) == 7).all()


@pytest.mark.parametrize("values, name", [
    (np.linspace(0, 65535, 400).astype(np.uint16), "x.png"),
    (np.linspace(0, 1, 400).astype(np.float32), "x.tiff")])
def test_more_than_8_bits_are_refused(values, name, tmp_path):
    """And not taken for a white picture."""
    Image.fromarray(values.reshape(20, 20)).save(tmp_path / name)
    with pytest.raises(c.Problem, match="8 bits"):
        c.load_image(tmp_path / name)


@pytest.mark.parametrize("name, data, told", [
    ("nowhere.png", None, "there is no file of this name"),
    ("x.txt", b"hello", "convert it to PNG"),
    ("x.svg", b"<svg/>", "convert it to PNG"), ("empty.png", b"", "convert it to PNG"),
    ("cut.png", "half", "convert it to PNG")])
def test_what_is_no_picture_is_told_so(name, data, told, tmp_path):
    """With what to convert it to."""
    if data == "half":
        Image.fromarray(noise(1, 99, 99, 3).frames[0]).save(tmp_path / "whole.png")
        data = (tmp_path / "whole.png").read_bytes()[:2000]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(c.Problem, match=f"{name}.*{told}"):
        c.load_image(tmp_path / name)


@pytest.mark.parametrize("size", [(9000, 9000), (8193, 20), (8192, 8192), (15, 100)])
def test_a_picture_of_absurd_size_is_refused(size, tmp_path):
    """Before it is decoded."""
    Image.new("1", size).save(tmp_path / "x.png")
    with pytest.raises(c.Problem, match="pixels"):
        c.load_image(tmp_path / "x.png")


def test_a_picture_5000_by_100_works_to_the_end(tmp_path, picture):
    """What load_image takes, no later part refuses."""
    Image.new("RGB", (5000, 100), (7, 8, 9)).save(tmp_path / "wide.png")
    wide = c.load_image(tmp_path / "wide.png")
    models = c.RecordedModels(Painter(), Script(plan(), accept()), tmp_path / "out")
    result = c.CollabVR(models, c.Config(seconds_first=1)).run(wide, "q")
    frames, _ = decoded(tmp_path / "a.mp4", models.save(result).read_bytes())
    assert frames.shape == (5, 100, 5000, 3)


# ------------------------------------------------------------------------------
# The run folder: what was paid for is kept

FULL = [plan(left=2), reject(), accept("partial"), plan(), accept()]


def outcome(run):
    """What a run came to, apart from seconds of waiting and the clips' file names."""
    calls = [call.model_dump(exclude={"wall_seconds", "clip", "request", "sha256"})
             for call in run.models.calls]
    cost = without(run.cost, "wall_seconds")
    return run.status, run.unverified, calls, cost, run.video.frames.tobytes()


def lines(folder):
    return [json.loads(line) for line in (folder / "calls.jsonl").read_bytes().splitlines()]


def write_lines(folder, calls):
    text = "".join(json.dumps(call) + "\n" for call in calls)
    (folder / "calls.jsonl").write_text(text)


@pytest.fixture(scope="module")
def undisturbed():
    return outcome(go(*FULL))


@pytest.mark.parametrize("vlm_calls", range(5))
@pytest.mark.parametrize("stop", [KeyboardInterrupt, c.Problem])
def test_an_interrupted_run_resumes(tmp_path, undisturbed, vlm_calls, stop):
    """Nothing is paid for twice."""
    class Stops(Script):
        def __call__(self, *request):
            if len(self.calls) == vlm_calls:
                raise stop
            return super().__call__(*request)

    vgm, first = Painter(), Stops(*FULL)
    with pytest.raises(stop):
        go(vgm=vgm, vlm=first, folder=tmp_path)
    run = go(*FULL[vlm_calls:], vgm=vgm, folder=tmp_path)
    assert len(vgm.calls) == 3 and len(first.calls) + len(run.models.vlm.calls) == 5
    assert outcome(run) == undisturbed


def test_a_finished_run_replays_without_models(tmp_path, caplog):
    """Its clips, replies and cost come from the folder, and the log says so."""
    caplog.set_level("INFO", "collabvr")
    done = go(*FULL, folder=tmp_path)
    before = (tmp_path / "calls.jsonl").read_bytes()
    caplog.clear()
    again = go(folder=tmp_path)
    assert outcome(again) == outcome(done) and again.cost == done.cost
    assert not again.models.vgm.calls and (tmp_path / "calls.jsonl").read_bytes() == before
    assert caplog.text.count(": recorded") == 8 and "waiting" not in caplog.text


def test_what_a_changed_setting_leaves_is_replayed(tmp_path):
    """Only the planner is told the cap."""
    go(*FULL, folder=tmp_path)
    run = go(plan(left=2), plan(), folder=tmp_path, N_max=2)
    assert [call["role"] for call in run.models.vlm.calls] == ["planner"] * 2
    assert not run.given("seed") and run.cost["clips"] == 3 and run.cost["calls"]["planner"] == 2


def test_equal_requests_keep_their_order(tmp_path):
    """Two equal questions may have had two replies."""
    def ask_twice(*replies):
        models = c.RecordedModels(None, Script(*replies), tmp_path)
        plans = [models.ask("planner", "", ["the same"], c.Plan) for _ in range(2)]
        return [p.instruction for p in plans], len(models.vlm.calls)

    assert ask_twice(plan("one"), plan("two")) == (["one", "two"], 2)
    assert ask_twice() == (["one", "two"], 0)


def test_a_failure_inside_a_run_is_replayed(tmp_path):
    """With its clip's seed and its cost."""
    done = go(plan(), "?", accept(), vgm=Painter(fail=[1]), folder=tmp_path)
    again = go(folder=tmp_path)
    assert outcome(again) == outcome(done) and again.cost["generator_errors"] == 1
    assert again.cost["calls"] == {"planner": 1, "vgm": 2, "verifier": 2}


def test_a_generator_that_ended_a_run_is_tried_again(tmp_path):
    """By the next start, as if nothing had been."""
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=Painter(fail=[1, 2]), folder=tmp_path)
    run = go(accept(), folder=tmp_path)
    assert run.given("seed") == [0] and run.cost["generator_errors"] == 0
    assert outcome(go(folder=tmp_path)) == outcome(run)


def test_replies_that_ended_a_run_are_asked_for_again(tmp_path):
    """By the next start."""
    with pytest.raises(c.Problem, match="no usable reply"):
        go("?", "?", "?", folder=tmp_path)
    run = go("?", plan(), accept(), folder=tmp_path)
    assert len(run.models.vlm.calls) == 3
    assert outcome(go(folder=tmp_path)) == outcome(run)


def test_a_clip_is_written_before_its_line(tmp_path, monkeypatch):
    """A line never promises a clip that is not there."""
    seen, write = [], c.RecordedModels.write

    def watched(self, call):
        if call.clip:
            seen.append((tmp_path / call.clip).exists())
        return write(self, call)

    monkeypatch.setattr(c.RecordedModels, "write", watched)
    go(*FULL, folder=tmp_path)
    assert seen == [True] * 3


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "lost": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "short": lambda data: data[:-100],
    "one flipped bit": flipped,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_clip_is_made_again(tmp_path, undisturbed, number, damage):
    """A line has its clip's hash; a clip that has not counts as missing. No other is made."""
    go(*FULL, folder=tmp_path)
    path = tmp_path / f"clips/{number:03}.mkv"
    data = DAMAGES[damage](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    vgm = Painter()
    vgm.calls = [{}] * (number - 1)  # its colours are the numbers of its calls
    run = go(vgm=vgm, folder=tmp_path)
    assert outcome(run) == undisturbed and len(vgm.calls) == number
    again = go(vgm=Painter(fail=range(9)), folder=tmp_path)
    assert outcome(again) == undisturbed, "what was made again is kept"


@pytest.mark.parametrize("frames", [np.zeros((9, 2, 2, 3), np.uint8), I0[None]])
def test_a_recorded_clip_is_checked_as_a_clip(tmp_path, undisturbed, frames):
    """A folder of somebody else may hold one of another size, or of a single frame."""
    go(*FULL, folder=tmp_path)
    calls = lines(tmp_path)
    second = [call for call in calls if call["role"] == "vgm"][1]
    data = c.lossless(c.Clip(frames, 4))
    (tmp_path / second["clip"]).write_bytes(data)
    second["sha256"] = hashlib.sha256(data).hexdigest()
    second["seconds"] = (len(frames) - 1) / 4
    second["size"] = [*frames.shape[1:3], 4]
    write_lines(tmp_path, calls)
    vgm = Painter()
    vgm.calls = [{}]  # its colours are the numbers of its calls
    assert outcome(go(vgm=vgm, folder=tmp_path)) == undisturbed


def test_a_file_without_a_call_is_left_alone(tmp_path):
    """What is no torn line is not cut off."""
    (tmp_path / "calls.jsonl").write_text("my own notes")
    with pytest.raises(c.Problem, match="does not end with a call"):
        c.RecordedModels(None, None, tmp_path)
    assert (tmp_path / "calls.jsonl").read_text() == "my own notes"


def test_a_hard_link_in_a_folder_is_refused(tmp_path):
    """It would be written through, as any other link."""
    outside = tmp_path / "outside.txt"
    outside.touch()
    (tmp_path / "run").mkdir()
    os.link(outside, tmp_path / "run" / "calls.jsonl")
    with pytest.raises(c.Problem, match="is a link"):
        c.RecordedModels(None, None, tmp_path / "run")


@pytest.mark.parametrize("name", ["calls.jsonl", "start.json", "lock", "clips/001.mkv"])
def test_a_pipe_in_a_folder_is_refused(tmp_path, name):
    """Whoever opens one waits for ever."""
    (tmp_path / "clips").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(c.Problem, match="no ordinary file: choose another folder"):
        c.RecordedModels(None, None, tmp_path)


def test_a_last_line_without_an_end_is_a_line(tmp_path, undisturbed):
    """As some editors leave it."""
    go(*FULL, folder=tmp_path)
    whole = (tmp_path / "calls.jsonl").read_bytes()
    (tmp_path / "calls.jsonl").write_bytes(whole.rstrip())
    assert outcome(go(folder=tmp_path)) == undisturbed
    assert (tmp_path / "calls.jsonl").read_bytes() == whole


@pytest.mark.parametrize("torn", [2, 10, 100])
def test_a_torn_last_line_is_dropped(tmp_path, undisturbed, torn):
    """A power cut may leave one. Only its call is made again."""
    go(*FULL, folder=tmp_path)
    whole = (tmp_path / "calls.jsonl").read_bytes()
    (tmp_path / "calls.jsonl").write_bytes(whole[:-torn])
    run = go(accept(), folder=tmp_path)
    assert outcome(run) == undisturbed and not run.given("seed")
    requests = [json.loads(line)["request"] for line in whole.splitlines()]
    assert [line["request"] for line in lines(tmp_path)] == requests


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_power_cut_costs_one_call_at_most(cut, tmp_path, undisturbed, monkeypatch):
    """It comes while the disk is waited for, and what was written is not all there."""
    syncs, fsync = itertools.count(1), os.fsync
    vgm, first = Painter(), Script(*FULL)

    def power(file):
        if next(syncs) == cut:
            os.ftruncate(file, max(0, os.fstat(file).st_size - 20))
            raise KeyboardInterrupt
        return fsync(file)

    monkeypatch.setattr(os, "fsync", power)
    with pytest.raises(KeyboardInterrupt):
        go(vgm=vgm, vlm=first, folder=tmp_path)
    monkeypatch.undo()
    path = tmp_path / "calls.jsonl"
    whole = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")[0]
    kept = [json.loads(line) for line in whole.splitlines()]
    assert len(first.calls) + len(vgm.calls) - len(kept) <= 1
    vgm.calls = vgm.calls[: sum("clip" in call for call in kept)]
    run = go(*FULL[sum("reply" in call for call in kept) :], vgm=vgm, folder=tmp_path)
    assert outcome(run) == undisturbed


def test_a_folder_has_picture_task_trace_and_video(tmp_path):
    """From Python, too: the folder is the one that the command line makes."""
    run = go(*FULL, folder=tmp_path, q="the task")
    assert run.models.save(run.result, settings={"M": 3}) == tmp_path / "video.mp4"
    assert (c.load_image(tmp_path / "input.png") == I0).all()
    assert json.loads((tmp_path / "start.json").read_text())["task"] == "the task"
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert (trace["status"], trace["unverified_steps"]) == ("complete", [])
    assert trace["task"] == "the task" and trace["settings"] == {"M": 3}
    assert trace["calls"] == lines(tmp_path) and trace["cost"] == run.cost
    assert [call["clip"] for call in trace["calls"] if call["role"] == "vgm"] == [
        "clips/001.mkv", "clips/002.mkv", "clips/003.mkv"]
    assert (tmp_path / "video.mp4").read_bytes() == c.mp4(run.video)


def test_facts_stand_in_start_and_trace(tmp_path):
    """What a caller says about the run before it starts."""
    models = c.RecordedModels(Painter(), Script(plan(), accept()), tmp_path)
    models.facts = {"id": "sample 7"}
    models.save(c.CollabVR(models).run(I0, "q"))
    for name in ("start.json", "trace.json"):
        facts = json.loads((tmp_path / name).read_text())
        assert facts["id"] == "sample 7" and facts["task"] == "q" and facts["input"]


@pytest.mark.parametrize("picture, q", [(I0, "another"), (I0 - 1, "solve the maze")])
def test_another_picture_or_task_is_refused(tmp_path, picture, q):
    """A folder is of one run."""
    go(plan(), accept(), folder=tmp_path)
    models = c.RecordedModels(Painter(), Script(plan()), tmp_path)
    with pytest.raises(c.Problem, match="another picture or task"):
        c.CollabVR(models).run(picture, q)
    assert (c.load_image(tmp_path / "input.png") == I0).all() and not models.vlm.calls


def test_one_process_may_open_a_folder_twice(tmp_path):
    """As a notebook does whose cell is run again."""
    first = go(plan(), accept(), folder=tmp_path)
    second = go(folder=tmp_path)
    assert first.models.folder == second.models.folder and outcome(first) == outcome(second)


SHADES = """
import collabvr, numpy as np
def vgm(frame, prompt, seconds, seed):
    frames = np.repeat(frame[None], int(seconds * 4) + 1, 0)
    frames[1:] = 10
    return collabvr.Clip(frames, 4)
def vlm(instructions, parts, schema):
    return script(schema)
"""


def loaded(path, source, **names):
    """The names that a file of this source defines."""
    path.write_text(source)
    return runpy.run_path(str(path), names)


def test_an_edited_generator_is_another_one(tmp_path):
    """In the same folder, from Python, without an identity of its own."""
    def shown(source, *replies):
        vgm = loaded(tmp_path / "mine.py", source)["vgm"]
        return go(*replies, vgm=vgm, folder=tmp_path / "out").shown()

    assert shown(SHADES, plan(), accept()) == [10]
    assert shown(SHADES) == [10]
    assert shown(SHADES.replace("= 10", "= 200"), accept()) == [200]


def test_an_edited_vlm_is_another_one(tmp_path):
    """Its earlier replies are not taken for its own."""
    asked = []

    def run(source):
        def script(schema):
            asked.append(schema.__name__)
            return json.dumps(plan() if schema is c.FirstPlan else accept())

        space = loaded(tmp_path / "mine.py", source, script=script)
        go(vgm=space["vgm"], vlm=space["vlm"], folder=tmp_path / "out")
        return len(asked)

    assert run(SHADES) == 2
    assert run(SHADES) == 2
    assert run(SHADES.replace("script(schema)", "script(schema)  # a better one")) == 4


def test_a_notebooks_edited_cell_is_another_one(tmp_path):
    """Its source is no file; linecache knows it."""
    def shown(number, source, *replies):
        name = f"<cell {number}>"
        linecache.cache[name] = len(source), None, source.splitlines(True), name
        space = {}
        code.InteractiveInterpreter(space).runcode(compile(source, name, "exec"))
        return go(*replies, vgm=space["vgm"], folder=tmp_path).shown()

    assert shown(1, SHADES, plan(), accept()) == [10]
    assert shown(2, SHADES) == [10], "the same cell, run again"
    assert shown(3, SHADES.replace("= 10", "= 200"), accept()) == [200]


def test_a_generators_fields_tell_it_apart(tmp_path):
    """Those of a dataclass; and the values of a partial."""
    @dataclass
    class Shaded:
        shade: int

        def __call__(self, frame, prompt, seconds, seed):
            return painted(frame, seconds, self.shade)

    assert go(plan(), accept(), vgm=Shaded(10), folder=tmp_path).shown() == [10]
    assert go(vgm=Shaded(10), folder=tmp_path).shown() == [10]
    assert go(accept(), vgm=Shaded(20), folder=tmp_path).shown() == [20]
    ten = functools.partial(painted_in, shade=30)
    assert go(accept(), vgm=ten, folder=tmp_path).shown() == [30]
    twenty = functools.partial(painted_in, shade=40)
    assert go(accept(), vgm=twenty, folder=tmp_path).shown() == [40]


def test_a_method_counts_with_its_objects_fields(tmp_path):
    """Or with its identity."""
    @dataclass
    class Shaded:
        shade: int

        def make(self, frame, prompt, seconds, seed):
            return painted(frame, seconds, self.shade)

    class Named(Shaded):
        identity = "always the same"

    assert go(plan(), accept(), vgm=Shaded(10).make, folder=tmp_path).shown() == [10]
    assert go(accept(), vgm=Shaded(20).make, folder=tmp_path).shown() == [20]
    assert go(accept(), vgm=Named(30).make, folder=tmp_path).shown() == [30]
    assert go(vgm=Named(40).make, folder=tmp_path).shown() == [30]


def test_an_object_that_nothing_tells_apart_is_refused(tmp_path):
    """In the next process it would be another one, and all clips would be paid for again."""
    vgm = functools.partial(painted_in, shade=object())
    with pytest.raises(c.Problem, match="is never the same again: give the model an `identity`"):
        go(plan(), vgm=vgm, folder=tmp_path)
    assert [line["role"] for line in lines(tmp_path)] == ["planner"]


def painted_in(frame, prompt, seconds, seed, shade):
    return painted(frame, seconds, shade)


def test_an_identity_says_what_changes_the_clips(tmp_path):
    """What it leaves out may change, such as a URL."""
    made = []

    class Served:
        def __init__(self, url, shade):
            self.url = url
            self.shade = shade
            self.identity = {"shade": shade}

        def __call__(self, frame, prompt, seconds, seed):
            made.append(self.url)
            return painted(frame, seconds, self.shade)

    go(plan(), accept(), vgm=Served("a", 4), folder=tmp_path)
    go(vgm=Served("b", 4), folder=tmp_path)
    assert go(accept(), vgm=Served("b", 5), folder=tmp_path).shown() == [5]
    assert made == ["a", "b"]


def test_two_functions_of_a_file_are_two_models(tmp_path):
    """Though their source file is one."""
    other = "def other(*request):\n    return collabvr.Clip(vgm(*request).frames * 2, 4)\n"
    space = loaded(tmp_path / "mine.py", SHADES + other)
    assert go(plan(), accept(), vgm=space["vgm"], folder=tmp_path / "out").shown() == [10]
    assert go(accept(), vgm=space["other"], folder=tmp_path / "out").shown() == [20]


# ------------------------------------------------------------------------------
# Nothing from a folder is trusted


@pytest.mark.parametrize("name", [
    "calls.jsonl", "input.png", "start.json", "trace.json", "video.mp4", "lock", "clips",
    "clips/001.mkv"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_a_folder_is_refused(tmp_path, name, there):
    """It could lead anywhere; nothing is written through it, whether or not it leads somewhere."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    if there and name == "clips":
        outside.mkdir()
    elif there:
        outside.write_text("mine")
    (folder / name).symlink_to(outside)
    with pytest.raises((c.Problem, FileExistsError), match=re.escape(str(folder / name))):
        go(plan(), accept(), folder=folder)
    assert outside.exists() == there
    if there:
        assert list(outside.iterdir()) == [] if name == "clips" else outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["input.png", "start.json", "trace.json", "video.mp4"])
def test_a_link_is_replaced_not_written_through(tmp_path, name):
    """One that appears while the folder is open."""
    models = c.RecordedModels(Painter(), Script(plan(), accept()), tmp_path / "run")
    (tmp_path / "run" / name).symlink_to(tmp_path / "outside")
    models.save(c.CollabVR(models).run(I0, "q"))
    assert not (tmp_path / "outside").exists()
    assert (tmp_path / "run" / name).is_file() and not (tmp_path / "run" / name).is_symlink()


def test_a_clip_is_a_name_inside_clips(tmp_path):
    """A line that names a file elsewhere leads nowhere, though its hash is right."""
    go(*FULL, folder=tmp_path / "run")
    clip = tmp_path / "run" / "clips" / "002.mkv"
    for place in (tmp_path / "elsewhere.mkv", tmp_path / "run" / "elsewhere.mkv"):
        shutil.copy(clip, place)
    clip.unlink()
    for path in ("../../elsewhere.mkv", "../elsewhere.mkv", str(tmp_path / "elsewhere.mkv"),
                 "elsewhere.mkv", "", ".", ".."):
        calls = lines(tmp_path / "run")[:8]
        calls[3]["clip"] = path
        write_lines(tmp_path / "run", calls)
        vgm = Painter()
        vgm.calls = [{}]
        go(vgm=vgm, folder=tmp_path / "run")
        assert len(vgm.calls) == 2, f"{path} was read"


def test_a_stored_clip_is_a_clip(tmp_path):
    """ffmpeg would follow a playlist to other files; its hash may be right."""
    go(*FULL, folder=tmp_path / "run")
    clip = tmp_path / "run" / "clips" / "001.mkv"
    shutil.copy(clip, tmp_path / "secret.mkv")
    lists = [f"ffconcat version 1.0\nfile '{tmp_path}/secret.mkv'\n",
             f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{tmp_path}/secret.mkv\n"]
    for text in lists:
        clip.write_text(text)
        calls = lines(tmp_path / "run")[:8]
        calls[1]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
        write_lines(tmp_path / "run", calls)
        assert len(go(folder=tmp_path / "run").given("seed")) == 1


def test_a_deleted_line_costs_its_clip_only(tmp_path, undisturbed):
    """The sentence says to delete it; the clips after it stay what they are."""
    go(*FULL, folder=tmp_path)
    calls = lines(tmp_path)
    del calls[1]
    write_lines(tmp_path, calls)
    vgm = Painter()
    assert outcome(go(vgm=vgm, folder=tmp_path)) == undisturbed and len(vgm.calls) == 1
    assert outcome(go(vgm=Painter(fail=range(9)), folder=tmp_path)) == undisturbed


def test_a_damaged_file_is_not_touched(tmp_path):
    """calls.jsonl is read before anything of it is dropped."""
    go(*FULL, folder=tmp_path)
    path = tmp_path / "calls.jsonl"
    damaged = path.read_bytes().replace(b'"role"', b'"rule"', 1) + b'{"torn'
    path.write_bytes(damaged)
    with pytest.raises(c.Problem, match=r"calls\.jsonl, line 1 is damaged"):
        go(folder=tmp_path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("line", [
    b"garbage", b"{}", b"[]", b"null", b'{"role": "vgm"}', b'{"role": "vgm", "t": "one"}',
    b'{"role": 5, "t": 1}', b'{"role": "vgm", "t": 1, "size": [1]}', b"\xff\xfe",
    b'{"role": "planner", "t": 1, "reply": []}', b"[" * 50_000, b'{"role": "vgm", "t": 1e400}',
    b'{"role": "vgm", "t": 1, "size": [32, 48, 0]}'])
def test_a_line_that_is_none_gets_a_sentence(tmp_path, line):
    """With the file and the line's number."""
    (tmp_path / "calls.jsonl").write_bytes(b"\n" + line + b"\n")
    with pytest.raises(c.Problem, match=r"calls\.jsonl, line 2 is damaged: delete the line"):
        c.RecordedModels(None, None, tmp_path)


def test_blank_lines_do_no_harm(tmp_path, undisturbed):
    """Between lines, and Windows' line ends."""
    go(*FULL, folder=tmp_path)
    path = tmp_path / "calls.jsonl"
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\r\n\n \n"))
    assert outcome(go(folder=tmp_path)) == undisturbed


@pytest.mark.parametrize("number, change", [
    (0, {"reply": {"verdict": "accept"}}), (0, {"reply": None}), (0, {"reply": {}, "fault": "x"}),
    (2, {"reply": {**reject(), "verdict": "perhaps"}}), (0, {"request": "another"}),
    (1, {"sha256": None}), (1, {"sha256": "0"}), (1, {"size": None}), (1, {"seconds": 99}),
    (1, {"size": [32, 48, 5]}), (1, {"clip": None}), (1, {"clip": "clips"})])
def test_a_hand_edited_line_counts_as_not_there(tmp_path, number, change):
    """When it no longer is what was asked for, its call is made again."""
    go(*FULL, folder=tmp_path)
    calls = lines(tmp_path)
    calls[number].update(change)
    write_lines(tmp_path, calls)
    reply = [] if number == 1 else [FULL[0] if number == 0 else FULL[1]]
    vgm = Painter()
    run = go(*reply, vgm=vgm, folder=tmp_path)
    assert run.status == "complete" and len(vgm.calls) == (number == 1)
    assert outcome(go(folder=tmp_path)) == outcome(run)


@pytest.mark.parametrize("damage", [b"\xff[", b"", b"[]", b"{}", b"7"])
def test_a_damaged_start_gets_a_sentence(tmp_path, damage):
    """Whatever stands in it. The file stays as it is."""
    go(plan(), accept(), folder=tmp_path)
    (tmp_path / "start.json").write_bytes(damage)
    with pytest.raises(c.Problem, match=r"start\.json is damaged: choose another folder"):
        go(folder=tmp_path)
    assert (tmp_path / "start.json").read_bytes() == damage


def test_a_run_that_never_asked_may_become_another(tmp_path):
    """What stands in start.json is the run that is on."""
    def busy(*request):
        raise c.Problem("busy")

    models = c.RecordedModels(Painter(), busy, tmp_path)
    with pytest.raises(c.Problem, match="busy"):
        c.CollabVR(models).run(I0, "task A")
    (tmp_path / "start.json").unlink()
    models.vlm = Script(plan(), accept())
    models.save(c.CollabVR(models).run(I0, "task B"))
    assert json.loads((tmp_path / "trace.json").read_text())["task"] == "task B"


def test_an_error_of_any_text_can_be_recorded(tmp_path):
    """Half characters, too, as in the name of a file."""
    def vgm(*request):
        raise OSError("no such file: \udcff\x1b[2J")

    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=vgm, folder=tmp_path)
    assert [line["role"] for line in lines(tmp_path)] == ["planner", "vgm", "vgm"]


# ------------------------------------------------------------------------------
# The endpoint: real HTTP


class Endpoint:
    """An OpenAI-compatible server on a free port that plays a list of behaviours, one a request."""

    def __init__(self, *behaviours):
        self.behaviours = list(behaviours)
        self.requests = []  # (authorization, body)
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.headers["Authorization"], body))
                behaviour = outer.behaviours.pop(0)
                if callable(behaviour):
                    behaviour(self)
                elif isinstance(behaviour, tuple):
                    self.send(*behaviour)
                else:
                    is_text = behaviour is None or isinstance(behaviour, str)
                    self.send(*chat(behaviour if is_text else json.dumps(behaviour)))

            def send(self, status, body, **headers):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                kind = "text/html" if isinstance(body, str) else "application/json"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
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


def chat(content, message=None, finish="stop", **others):
    """The status and body of a chat completion, with what differs from the usual."""
    message = message or {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    usage = {"prompt_tokens": 9999, "completion_tokens": 5, "total_tokens": 1}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "test-0926",
            "choices": [choice], "usage": usage}
    return 200, {**body, **others}


def cut(handler):
    """Half an answer."""
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


def talk(endpoint, **settings):
    """A run whose VLM is this endpoint."""
    return go(vlm=c.OpenAIVLM(vlm="test", vlm_url=endpoint.url, **settings))


@pytest.fixture
def naps(monkeypatch):
    """How long the client would have waited before it tried again; it does not wait."""
    naps, sleep, main = [], time.sleep, threading.main_thread()

    def nap(seconds):
        if threading.current_thread() is main:
            naps.append(seconds)
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", nap)
    return naps


def test_a_request_has_prompt_pictures_and_schema():
    """App. A.1: temperature 0.2; one frame a second with its time; the schema, strict."""
    with Endpoint(plan(), accept()) as endpoint:
        run = talk(endpoint)
    assert run.status == "complete"
    body = endpoint.requests[1][1]
    assert body["model"] == "test" and body["temperature"] == 0.2
    assert body["messages"][0] == {"role": "system", "content": c.VERIFIER}
    wanted = body["response_format"]["json_schema"]
    assert wanted["name"] == "Verification" and wanted["strict"] is True
    assert wanted["schema"] == c.Verification.model_json_schema()
    content = body["messages"][1]["content"]
    pictures = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert len(pictures) == 1 + 3 and all(x.startswith("data:image/jpeg;base64,") for x in pictures)
    assert content[-2]["text"] == "Frame at 2.00 s:"


@pytest.mark.parametrize("kind", ["video_url", "image_url"])
def test_a_clip_may_go_as_raw_video(kind):
    """An MP4, in a part of the type that is set. [D10]"""
    with Endpoint(plan(), accept()) as endpoint:
        talk(endpoint, video_input=kind)
    content = endpoint.requests[1][1]["messages"][1]["content"]
    media = [part for part in content if part["type"] != "text"]
    assert [part["type"] for part in media] == ["image_url", kind]
    head, data = media[1][kind]["url"].split(",")
    assert head == "data:video/mp4;base64"
    assert len(iio.imread(base64.b64decode(data), plugin="pyav")) == 9


def test_extra_fields_go_into_each_request():
    """And a temperature of None goes into none."""
    with Endpoint(plan(), accept()) as endpoint:
        talk(endpoint, temperature=None, request_extra='{"top_k": 5, "seed": 1}')
    for _, body in endpoint.requests:
        assert "temperature" not in body and body["top_k"] == 5 and body["seed"] == 1


def test_a_key_that_is_no_ascii_is_told_so(monkeypatch):
    """No header can carry it."""
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(c.Problem, match="no key has"):
        c.OpenAIVLM(vlm_url="http://127.0.0.1:1/v1")("", [], c.Plan)


def test_large_pictures_are_sent_smaller():
    """At most 1024 pixels a side."""
    with Image.open(io.BytesIO(c.jpeg(np.zeros((500, 4096, 3), np.uint8)))) as sent:
        assert sent.size == (1024, 125)


def test_busy_and_broken_endpoints_are_tried_again(naps):
    """429 with its Retry-After, 500, 503, a cut connection and a hang."""
    overloaded = [{"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}]
    faults = [lambda h: h.send(429, {"error": {}}, Retry_After="2"), (500, {}),
              (503, overloaded), cut, hang]
    with Endpoint(*faults, plan(), *faults, accept()) as endpoint:
        run = talk(endpoint, timeout=0.5)
    assert run.status == "complete" and len(endpoint.requests) == 12
    assert len(naps) == 10 and naps.count(2.0) == 2
    assert run.cost["calls"] == {"planner": 1, "vgm": 1, "verifier": 1}


def message(**fields):
    return chat(None, {"role": "assistant", "content": ACCEPT, **fields})


ODD = {
    "no choices": chat(ACCEPT, choices=[]), "null choices": chat(ACCEPT, choices=None),
    "choices of another type": chat(ACCEPT, choices={}), "choices of text": chat("", choices="hi"),
    "a choice of another type": chat(ACCEPT, choices=["hi"]),
    "no message": chat(ACCEPT, choices=[{"finish_reason": "stop"}]),
    "a null message": chat(ACCEPT, choices=[{"message": None}]),
    "a message of another type": chat(ACCEPT, choices=[{"message": "hi"}]),
    "usage of another type": chat(ACCEPT, usage=[1]),
    "tokens of another type": chat(ACCEPT, usage={"prompt_tokens": "many"}),
    "tokens in halves": chat(ACCEPT, usage={"prompt_tokens": 1.5}),
    "a model of another type": chat(ACCEPT, model=["m"]),
    "a number": message(content=5), "an object": message(content=accept()),
    "a list of objects": message(content=[accept()]), "a list of texts": message(content=[ACCEPT]),
    "null": chat(None), "nothing": chat(""), "refused": message(refusal="I cannot"),
    "a refusal of another type": message(refusal={"why": "I cannot"}),
    "prose": chat("Accept."), "cut off": chat(ACCEPT[:-20]), "twice": chat(ACCEPT + ACCEPT),
    "not a number": chat(ACCEPT.replace("1.0", "NaN")), "long": chat("x" * 10_000_000),
    "deep": chat("[" * 100_000), "a page": (200, "<html>busy</html>"), "a list": (200, [accept()]),
    "no JSON": lambda h: h.send(200, "{", Content_Type="application/json"), "a text": (200, '"hi"'),
    "the reply alone": (200, accept()), "an error": (200, {"error": {"message": "busy"}}),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_asked_for_again(name, caplog):
    """It is an unusable reply: never an accept, never a traceback."""
    with Endpoint(plan(), ODD[name], reject(), accept()) as endpoint:
        run = talk(endpoint)
    judged = [call for call in run.models.calls if call.role == "verifier"]
    assert [bool(call.fault) for call in judged] == [True, False, False]
    assert [call.reply["verdict"] for call in judged[1:]] == ["reject", "accept"]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("odd", [
    {"model": None}, {"usage": None}, {"id": 5}, {"object": None}, {"created": "today"},
    {"more": {}}])
def test_what_stands_beside_a_reply_may_be_odd(odd, caplog):
    """The reply is whole."""
    with Endpoint(plan(), chat(ACCEPT, **odd)) as endpoint:
        assert talk(endpoint).roles() == "pv" and "Traceback" not in caplog.text


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "content_filter", "Safety"])
def test_a_reply_that_was_cut_off_is_not_used(reason):
    """By its finish_reason, in any case, and even if it parses."""
    told = f"no usable reply .finish_reason {reason.lower()}"
    replies = [plan(), *[chat(ACCEPT, finish=reason)] * 3]
    with Endpoint(*replies) as endpoint, pytest.raises(c.Problem, match=told):
        talk(endpoint)


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos", "tool_calls", "", None])
def test_every_other_finish_reason_is_a_stop(reason):
    """Endpoints have words of their own."""
    with Endpoint(chat(json.dumps(plan()), finish=reason), chat(ACCEPT, finish=reason)) as endpoint:
        assert talk(endpoint).roles() == "pv"


def test_content_may_be_a_list_of_texts():
    """They are joined."""
    parts = [{"type": "text", "text": ACCEPT[:30]}, {"type": "text", "text": ACCEPT[30:]}]
    with Endpoint(plan(), message(content=parts)) as endpoint:
        assert talk(endpoint).roles() == "pv"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("content", ["", None, " \n"])
def test_an_unfinished_thought_says_so(field, content):
    """Empty content beside a filled reasoning field."""
    thought = message(content=content, **{field: f"So: {ACCEPT}"})
    told = "content is empty: the thinking was not finished"
    with Endpoint(plan(), *[thought] * 3) as endpoint, pytest.raises(c.Problem, match=told):
        talk(endpoint)


def test_a_finished_thought_does_no_harm():
    """It is not read."""
    with Endpoint(plan(), message(reasoning=f"Not {REJECT}?")) as endpoint:
        assert talk(endpoint).roles() == "pv"


def test_an_error_with_status_200_is_shown():
    """Gateways send such."""
    error = 200, {"error": {"message": "the quota is used up", "code": 429}}
    with Endpoint(*[error] * 3) as endpoint, pytest.raises(c.Problem, match="quota is used up"):
        talk(endpoint)


@pytest.mark.parametrize("usage, tokens_in, tokens_out", [
    ({"prompt_tokens": 9000, "completion_tokens": 5, "total_tokens": 9800}, 9000, 800),
    ({"prompt_tokens": 9000, "completion_tokens": 5}, 9000, 5), (None, 0, 0), ({}, 0, 0)])
def test_thoughts_count_as_tokens(usage, tokens_in, tokens_out):
    """They are billed, though not every endpoint counts them as completion."""
    with Endpoint(plan(), chat(ACCEPT, usage=usage)) as endpoint:
        cost = talk(endpoint).cost
    assert (cost["tokens_in"]["verifier"], cost["tokens_out"]["verifier"]) == (
        tokens_in, tokens_out)


def test_a_trace_says_which_model_answered():
    """And at which host."""
    with Endpoint(plan(), "?", accept()) as endpoint:
        calls = talk(endpoint).models.calls
    answered = [(call.host, call.model) for call in calls if call.role != "vgm"]
    assert answered == [(endpoint.host, "test-0926")] * 3


def test_a_refusal_is_a_sentence_with_its_body(naps):
    """Google's bodies are lists, which the client's own text hides."""
    body = [{"error": {"message": "the key is bad", "status": "INVALID_ARGUMENT"}}]
    told = "http://127.0.0.1:[0-9]+/v1 gave no usable answer .400.*INVALID"
    with Endpoint((400, body)) as endpoint, pytest.raises(c.Problem, match=told):
        talk(endpoint)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("page", ["no such page", "<html>" + "no such page " * 100])
def test_an_error_names_the_whole_url(page):
    """And says how a base URL usually ends, if this one does not."""
    with Endpoint((404, page)) as endpoint:
        url = endpoint.url.removesuffix("/v1") + "/some/path"
        with pytest.raises(c.Problem, match=f"{url} gave.*404.*usually ends in /v1") as told:
            go(vlm=c.OpenAIVLM(vlm="test", vlm_url=url))
    assert len(str(told.value)) < 800


def test_a_connection_error_has_its_cause(naps):
    """'Connection error' alone says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    began = time.monotonic()
    with pytest.raises(c.Problem, match=f"{url} gave .*Connection error.*refused"):
        go(vlm=c.OpenAIVLM(vlm="test", vlm_url=url))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status, naps):
    """The pictures would go to a host that nobody named."""
    with Endpoint(plan()) as other:
        def redirect(handler):
            handler.send(status, {}, Location=f"{other.url}/chat/completions")

        with Endpoint(redirect) as endpoint, pytest.raises(c.Problem, match=str(status)):
            talk(endpoint)
    assert not other.requests


@pytest.mark.parametrize("url", [
    "localhost:8000/v1", "example.org/v1", "user:secret@example.org/v1", "ftp://example.org/v1",
    "http:///v1", "/v1", "", "http://user:secret@example.org/v1", "http://example.org/v1?key=secret",
    "http://[::1/v1", "http://example.org:80x/v1", "http://example.org:99999/v1"])
def test_a_url_that_is_none_is_told_so(url):
    """What is missing or too much, never a regular expression, never the secret in it."""
    with pytest.raises(ValueError, match="vlm_url") as told:
        c.OpenAIVLM(vlm_url=url)
    told = str(told.value)
    assert "secret" not in told and "match" not in told and "KeyError" not in told
    if "http://" not in url:
        assert "starts with http:// or https://" in told


def test_googles_key_goes_to_googles_host_only(monkeypatch):
    """Any other host gets OPENAI_API_KEY, or none."""
    monkeypatch.setenv("GEMINI_API_KEY", "g")
    monkeypatch.setenv("OPENAI_API_KEY", "o")

    def key(**settings):
        return c.OpenAIVLM(**settings).client.api_key

    elsewhere = "http://example.org:80/generativelanguage.googleapis.com"
    assert key() == "g" and key(vlm_url=elsewhere) == "o"
    assert c.OpenAIVLM(vlm_url=elsewhere).host == "example.org:80"
    assert key(vlm_url="http://generativelanguage.googleapis.com.evil.org") == "o"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key(vlm_url="http://localhost:8000/v1") not in ("g", "o", "")
    monkeypatch.setenv("GEMINI_API_KEY", " ")
    monkeypatch.setenv("GOOGLE_API_KEY", "g2\n")
    assert key() == "g2"


def test_an_endpoints_url_may_change(tmp_path, naps):
    """Host and timeout do not change what a model says: the folder answers all the same."""
    with Endpoint(plan(), accept()) as endpoint:
        vlm = c.OpenAIVLM(vlm="test", vlm_url=endpoint.url)
        go(vlm=vlm, folder=tmp_path)
    moved = c.OpenAIVLM(vlm="test", vlm_url="http://127.0.0.1:9/v1", timeout=5)
    assert go(vlm=moved, folder=tmp_path).status == "complete"
    with pytest.raises(c.Problem, match="no usable answer"):
        go(vlm=c.OpenAIVLM(vlm="other", vlm_url="http://127.0.0.1:9/v1"), folder=tmp_path)


# ------------------------------------------------------------------------------
# The command line

MADE = []  # the seeds of Mine's clips


@dataclass
class Mine:
    """A generator of one's own."""

    shade: int = 40  # grey levels from seed to seed
    api_token: str = "none"  # of its server

    def __call__(self, frame, prompt, seconds, seed):
        MADE.append(seed)
        return painted(frame, seconds, self.shade * seed % 256)


MINE = """\
import os, resource, signal, sys
from dataclasses import dataclass
import numpy as np
import collabvr

@dataclass
class Mine:
    shade: int = 40  # grey levels from seed to seed

    def __call__(self, frame, prompt, seconds, seed):
        with open(os.environ["COUNT"], "a") as file:
            file.write("x")
        frames = np.repeat(frame[None], int(seconds * 4) + 1, 0)
        frames[1:] = np.random.default_rng(seed).integers(0, 256, frames[1:].shape)
        return collabvr.Clip(frames, 4)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has none
    if "DISK" in os.environ:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["DISK"]),) * 2)
    sys.exit(collabvr.main(Mine))
"""


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(I0).save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def spellings(secret):
    """A secret as bytes: as it is, in a URL, and in base64 at the three places in a group."""
    secret = secret.encode()
    yield secret
    yield urllib.parse.quote(secret, safe="").encode()
    for before in range(3):
        text = base64.b64encode(bytes(before) + secret + b"x")
        yield text[(8 * before + 5) // 6 : 8 * (before + len(secret)) // 6]


def written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def trace(tmp_path):
    return json.loads((tmp_path / "out" / "trace.json").read_bytes())


@pytest.fixture
def job(tmp_path, picture, monkeypatch, capsys, caplog):
    """The arguments of a run. Whatever a test does with it, its key is found neither in what was
    written nor in what was printed."""
    caplog.set_level("INFO", "collabvr")
    (tmp_path / "mine.py").write_text(MINE)
    MADE.clear()
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    before = signal.getsignal(signal.SIGTERM)
    yield ["--image", picture, "--task", "t", "--out", str(tmp_path / "out"), "--vlm", "test",
           "--seconds-first", "2", "--seconds-next", "1"]
    signal.signal(signal.SIGTERM, before)
    seen = "".join(capsys.readouterr()).encode() + written(tmp_path / "out")
    assert not [text for text in spellings("sk-secret-123") if text in seen]


def test_a_timeout_is_no_reason_for_another_folder(picture):
    """Another timeout, or another place for the weights, goes on in the same folder."""
    def folder(**settings):
        vlm = c.OpenAIVLM(vlm_url="http://127.0.0.1:1/v1", **settings)
        command = c.Command(picture, "t", c.Config(), vlm, Mine())
        return command.prepare()[0].folder

    assert folder() == folder(timeout=5.0) != folder(verify_fps=2.0)


def test_keys_in_extra_fields_are_not_recorded(picture, tmp_path):
    """Some gateways take them there. A name that only holds such a word is shown."""
    extra = '{"api_key": "sk-hidden-1", "more": [{"access_token": "sk-2"}], "max_tokens": 5}'
    vlm = c.OpenAIVLM(vlm_url="http://127.0.0.1:1/v1", request_extra=extra)
    settings = c.Command(picture, "t", c.Config(), vlm, Mine()).settings()
    assert settings["request_extra"] == (
        '{"api_key": "***", "more": [{"access_token": "***"}], "max_tokens": 5}')


def test_a_reader_that_stops_spoils_no_run(job, tmp_path):
    """The video was made: the exit status is 0, whatever becomes of what is printed."""
    with Endpoint(plan(), accept()) as endpoint, open("/dev/full", "w") as full:
        argv = [sys.executable, str(tmp_path / "mine.py"), *job, "--vlm-url", endpoint.url]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            argv, check=False, env=env, stdout=full, stderr=subprocess.PIPE, timeout=100)
    assert run.returncode == 0 and b"Traceback" not in run.stderr


def swapped(argv, name, value):
    """The arguments, with another value for one of them."""
    at = argv.index(name)
    return [*argv[: at + 1], str(value), *argv[at + 2 :]]


def process(tmp_path, argv, **env):
    """The same command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([sys.executable, str(tmp_path / "mine.py"), *argv], text=True, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(running):
    """(exit status, stdout, stderr)"""
    with running:
        out, err = running.communicate(timeout=100)
    return running.returncode, out, err


def refused(capsys, argv, vgm=Mine):
    """What bad input is told: tyro's box or a sentence, status 2, and nothing else."""
    capsys.readouterr()
    sentence = False
    try:
        status = c.main(vgm, [str(word) for word in argv])
        sentence = True
    except SystemExit as stopped:  # tyro's box
        status = stopped.code
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and "Traceback" not in err and "KeyError" not in err
    assert not sentence or err.startswith("collabvr: ") and err.count("\n") == 1
    return " ".join(err.replace("│", " ").split())


def test_a_run_ends_in_a_video_and_its_cost(job, tmp_path, capsys):
    """Exit status 0, and what it came to on stdout."""
    with Endpoint(plan(left=2), reject(), accept("partial"), plan(), accept()) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    out, _ = capsys.readouterr()
    told = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert told["status"] == "complete" and told["unverified_steps"] == "[]"
    assert (told["clips"], told["steps"], told["regenerations"]) == ("3", "2", "1")
    assert told["vgm_seconds"] == "5.0" and told["video"] == str(tmp_path / "out" / "video.mp4")
    assert endpoint.requests[0][0] == "Bearer sk-secret-123"
    assert decoded(tmp_path / "a.mp4", Path(told["video"]).read_bytes())[0].shape[0] == 13


def test_the_same_command_replays(job, tmp_path, monkeypatch):
    """Without key, endpoint or generator, to the same trace."""
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    monkeypatch.delenv("OPENAI_API_KEY")
    done = trace(tmp_path)
    assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    assert MADE == [0] and trace(tmp_path) == done


def test_a_field_named_like_another_option_is_refused(capsys):
    """Two options of one name would be one."""

    @dataclass
    class Clashing:
        timeout: int = 3

    assert c.main(Clashing, []) == 2
    assert "Clashing.timeout" in capsys.readouterr().err



@pytest.mark.parametrize("fields", [{"__init__": lambda self, shade: None}, {}])
def test_a_class_without_fields_is_no_command(job, capsys, fields):
    """What its __init__ takes would be told to nobody, and change no folder."""
    assert "Plain must be a dataclass" in refused(capsys, job, type("Plain", (), fields))


def test_without_a_key_no_clip_is_made_after_a_stop(job, tmp_path, monkeypatch, capsys):
    """The verifier would be missing. A finished run needs no key."""
    replies = [said(plan())]
    monkeypatch.setenv("GEMINI_API_KEY", "sk-not-a-secret")
    monkeypatch.setattr(c.OpenAIVLM, "__call__", lambda *_: replies.pop(0))

    def stopped(*request):
        raise KeyboardInterrupt

    monkeypatch.setattr(Mine, "__call__", stopped)
    assert c.main(Mine, job) == 130
    monkeypatch.undo()
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    assert "No API key" in refused(capsys, job) and not MADE


def test_an_own_generators_fields_are_options(job, capsys):
    """With type, default and the comment behind the field as help."""
    with pytest.raises(SystemExit) as stopped:
        c.main(Mine, ["--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stopped.value.code == 0 and "--shade INT" in told
    assert "grey levels from seed to seed (default: 40)" in told
    assert "--offload" not in told and "--sampling-steps" not in told
    assert "--shade" in refused(capsys, [*job, "--shade", "dark"])
    assert "--fps" in refused(capsys, [*job, "--fps", "8"]), "an option of Wan's"


def test_a_trace_records_what_was_used(job, tmp_path):
    """The fields of one's own, and nothing of Wan's; of a secret, that there was one."""
    with Endpoint(plan(), accept()) as endpoint:
        argv = [*job, "--vlm-url", endpoint.url, "--shade", "50", "--M", "2", "--seed", "1"]
        assert c.main(Mine, [*argv, "--api-token", "k-secret-9"]) == 0
    done = trace(tmp_path)
    chosen = done["settings"]
    assert (chosen["shade"], chosen["M"], chosen["seed"]) == (50, 2, 1)
    assert chosen["vlm_url"] == endpoint.url and chosen["api_token"] == "***"
    assert set(chosen) == {"shade", "api_token", "seed", *c.Config.__dataclass_fields__,
                           *c.OpenAIVLM.__dataclass_fields__}
    assert done["task"] == "t" and done["image"] == job[1]
    assert b"k-secret-9" not in written(tmp_path / "out")


def test_a_file_of_ones_own_is_a_command(job, tmp_path):
    """`sys.exit(collabvr.main(Mine))` at its end, from any folder."""
    with Endpoint(plan(), accept()) as endpoint:
        argv = [*job, "--vlm-url", endpoint.url, "--shade", "50"]
        status, out, err = ended(process(tmp_path, argv))
    assert status == 0 and re.search("^status +complete$", out, re.MULTILINE), err
    assert trace(tmp_path)["settings"]["shade"] == 50
    assert "At worst: 12 clips, 17.0 s" in err and "18 VLM calls" in err


XT = ["--image", "X", "--task", "t"]  # X becomes the picture


@pytest.mark.parametrize("argv, told", [
    (["--task", "t"], "--image"),
    (["--image", "nowhere.png", "--task", "t"], "nowhere.png: there is no file of this name"),
    (["--image", __file__, "--task", "t"], "cannot be read as a picture"),
    (["--image", "X", "--task", "  "], "task is empty"),
    (["--image", "X", "--task", "move \udcff"], "no valid text"),
    ([*XT, "--N-max", "0"], "N_max"), ([*XT, "--N-max", "99999999999"], "N_max"),
    ([*XT, "--M", "two"], "--M"), ([*XT, "--seconds-first", "nan"], "seconds_first"),
    ([*XT, "--verify-fps", "inf"], "verify_fps"), ([*XT, "--temperature", "inf"], "temperature"),
    ([*XT, "--on-exhausted", "stop"], "--on-exhausted"),
    ([*XT, "--video-input", "video"], "--video-input"),
    ([*XT, "--request-extra", "{"], "request_extra"),
    ([*XT, "--request-extra", "[]"], "not a JSON object"),
    ([*XT, "--colour"], "--colour"), ([*XT, "--n-max", "2"], "--n-max"),
    (XT, "No API key for generativelanguage.googleapis.com: set GEMINI_API_KEY"),
    ([*XT, "--vlm-url", "localhost:8000/v1"], "starts with http:// or https://"),
    ([*XT, "--vlm-url", "http://user:secret@example.org/v1"], "no user, password or query"),
    ([*XT, "--vlm-url", "http://example.org/v1?key=secret"], "no user, password or query"),
    ([*XT, "--vlm-url", "http://[::1/v1"], "vlm_url"),
    ([*XT, "--vlm-url", "http://local..host/v1"], "vlm_url"),
    ([*XT, "--vlm-url", "http://a b/v1"], "no blanks"),
])
def test_bad_input_is_told_so(argv, told, job, capsys, picture, tmp_path, monkeypatch):
    """Exit status 2, no traceback, nothing written."""
    monkeypatch.delenv("OPENAI_API_KEY")
    out = ["--out", tmp_path / "out"] if "X" in argv else []
    sentence = refused(capsys, [picture if word == "X" else word for word in argv] + out)
    assert told in sentence and "secret" not in sentence and not MADE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", ".", "x.png", "x.png/run"])
def test_a_folder_that_cannot_be_used_is_told_so(job, capsys, out, tmp_path, monkeypatch):
    """In a sentence that names it."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    argv = swapped([*job, "--vlm-url", "http://127.0.0.1:1/v1"], "--out", out)
    assert c.main(Mine, argv) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    expected = f"{out} cannot be used as a run folder" if len(out) > 1 else "needs one of its own"
    assert told.startswith("collabvr: ") and expected in told
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["video.mp4", "trace.json", "calls.jsonl", "lock"])
def test_a_folder_in_a_files_place_is_refused(tmp_path, name):
    """Before anything is paid for."""
    (tmp_path / name).mkdir()
    with pytest.raises(c.Problem, match="no ordinary file|cannot be used as a run folder"):
        c.RecordedModels(None, None, tmp_path)


@pytest.mark.parametrize("argv, told", [
    ([*XT, "--fps", "-1"], "fps"), ([*XT, "--offload", "auto"], "--offload"),
    ([*XT, "--vgm", "no/such/folder"], "neither a folder nor a hub id"),
    ([*XT, "--vgm", str(ROOT)], "no diffusers checkpoint: it has no model_index.json")])
def test_a_wrong_checkpoint_is_told_so(argv, told, job, capsys, picture, tmp_path):
    """Before any model is called."""
    with Endpoint() as endpoint:
        argv = [picture if word == "X" else word for word in argv]
        argv += ["--vlm-url", endpoint.url, "--out", tmp_path / "out"]
        assert told in refused(capsys, argv, c.Wan)
    assert not endpoint.requests


def test_a_generator_that_cannot_work_says_so(job, capsys):
    """Its `check` is called before anything is paid for."""
    @dataclass
    class Broken(Mine):
        def check(self):
            raise c.Problem("Its server is not there.")

    with Endpoint() as endpoint:
        assert "Its server is not there." in refused(
            capsys, [*job, "--vlm-url", endpoint.url], Broken)
    assert not endpoint.requests
    both = refused(capsys, job, Broken)
    assert "No API key" in both and "Its server is not there." in both


def test_a_missing_endpoint_is_told_so(job, capsys, naps):
    """Nothing was kept, and nothing else is said."""
    url = "http://127.0.0.1:9/v1"
    told = refused(capsys, [*job, "--vlm-url", url])
    assert f"{url} gave no usable answer" in told and "goes on" not in told


def test_an_endpoint_that_stops_ends_the_run(job, tmp_path, capsys):
    """Status 1 after a model has answered; the next start goes on."""
    refusal = 400, [{"error": {"message": "bad key sk-secret-123", "status": "INVALID_ARGUMENT"}}]
    with Endpoint(plan(left=2), accept(), refusal) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 1
    err = capsys.readouterr().err
    assert f"{endpoint.url} gave no usable answer (400" in err and "INVALID_ARGUMENT" in err
    assert "same command goes on" in err and "***" in err and err.count("\n") == 1
    assert not (tmp_path / "out" / "video.mp4").exists()
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    assert MADE == [0, 1]


def test_a_generator_that_raises_ends_the_run(job, capsys, caplog):
    """Status 1, a sentence, and its traceback in the log."""
    @dataclass
    class Broken(Mine):
        def __call__(self, *request):
            return undefined_thing  # noqa: F821

    with Endpoint(plan()) as endpoint:
        assert c.main(Broken, [*job, "--vlm-url", endpoint.url]) == 1
    assert "failed twice in a row (NameError" in capsys.readouterr().err
    assert "Traceback" in caplog.text and "return undefined_thing" in caplog.text


def test_retries_are_told(job, naps, caplog):
    """A busy endpoint looks like a hanging program otherwise."""
    with Endpoint((503, {}), plan(), accept()) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    assert "Retrying request" in caplog.text


def test_another_task_in_the_folder_is_refused(job, capsys):
    """Status 2: no model was called."""
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    told = refused(capsys, [*swapped(job, "--task", "another"), "--vlm-url", endpoint.url])
    assert "another picture or task" in told


@pytest.mark.parametrize("place", ["x.png", "x.png/run"])
def test_a_folder_that_cannot_be_made_is_told_so(job, tmp_path, capsys, place):
    """There is a file of that name."""
    argv = [*swapped(job, "--out", tmp_path / place), "--vlm-url", "http://127.0.0.1:9/v1"]
    assert str(tmp_path / place) in refused(capsys, argv)


def test_each_command_has_a_default_folder(job, tmp_path, monkeypatch):
    """Another setting, another folder; the same command goes on in its own."""
    monkeypatch.chdir(tmp_path)
    at = job.index("--out")
    argv = [*job[:at], *job[at + 2 :]]
    commands = [[], ["--M", "2"], ["--seed", "3"], ["--shade", "8"], ["--temperature", "None"]]
    with Endpoint(*[reply for _ in commands for reply in (plan(), accept())]) as endpoint:
        for others in [*commands, ["--M", "2"]]:
            assert c.main(Mine, [*argv, "--vlm-url", endpoint.url, *others]) == 0
    folders = list(Path("runs").iterdir())
    assert len(folders) == len(commands) == len(MADE) and len(endpoint.requests) == 10
    assert all(re.fullmatch(r"x-[0-9a-f]{8}", folder.name) for folder in folders)


def test_secrets_are_printed_and_written_nowhere(job, tmp_path, capsys, monkeypatch, caplog):
    """Though a generator and an endpoint repeat them."""
    monkeypatch.setenv("MY_TOKEN", 't-"secret\\456')

    @dataclass
    class Telltale(Mine):
        def __call__(self, *request):
            raise ValueError(f"no {os.environ['MY_TOKEN']} and sk-secret-123")

    repeated = reject(reason="sk-secret-123", suggestion=os.environ["MY_TOKEN"])
    refusal = 401, {"error": {"message": "x" * 260 + "bad key sk-secret-123 is not valid"}}
    with Endpoint(plan(), plan(), repeated, refusal) as endpoint:
        argv = [*job, "--vlm-url", endpoint.url]
        assert c.main(Telltale, argv) == 1
        assert c.main(Mine, swapped(argv, "--out", tmp_path / "out" / "2")) == 1
    told = "".join(capsys.readouterr())
    told += "".join(c.CleanFormatter().format(record) for record in caplog.records)
    assert "failed twice" in told and "401" in told and "***" in told
    for secret in ("sk-secret", "secret\\456", "secret\\\\456"):
        assert secret not in told and secret.encode() not in written(tmp_path / "out")


def test_blanks_around_a_key_are_no_part_of_it(job, monkeypatch):
    """And it is masked without them."""
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret-123\n")
    with Endpoint(plan(), accept()) as endpoint:
        assert c.main(Mine, [*job, "--vlm-url", endpoint.url]) == 0
    assert {key for key, _ in endpoint.requests} == {"Bearer sk-secret-123"}
    assert c.clean("no such key: sk-secret-123!") == "no such key: ***!"


def test_a_narrow_terminal_spoils_nothing(job, tmp_path):
    """ASCII only, a picture called 猫.png, and a reply that would steer the terminal."""
    sly = {**accept(), "reason": "猫 \x1b[2J\x1b]0;owned\x07\u202e"}
    cat = tmp_path / "猫.png"
    shutil.copy(job[1], cat)
    argv = swapped(swapped(job, "--image", cat), "--out", tmp_path / "out" / "猫")
    ascii_only = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C.UTF-8"}
    with Endpoint(plan(), sly) as endpoint:
        argv += ["--vlm-url", endpoint.url]
        status, out, err = ended(process(tmp_path, argv, **ascii_only))
    assert status == 0, err
    assert "video " in out and (tmp_path / "out" / "猫" / "video.mp4").exists()
    assert "[2J" in err and not {"\x1b", "\x07", "\u202e"} & set(out + err)


def test_importing_and_help_are_light():
    """No heavy package is imported, and help names the paper's sections."""
    heavy = ["torch", "diffusers", "transformers", "openai"]
    code = (f"import sys, collabvr\ntry: collabvr.main(argv=['--help'])\n"
            f"except SystemExit: print([m for m in {heavy} if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                          cwd=ROOT)
    assert done.stdout.endswith("[]\n"), done.stderr
    for word in ("--on-exhausted", "App. A.1", "--offload", "frames per second", "run folder"):
        assert word in done.stdout


def wait_for(endpoint, requests):
    while len(endpoint.requests) < requests:
        time.sleep(0.02)


def go_on(tmp_path, argv):
    """The same command once more, in this process. Returns its exit status."""
    return c.main(runpy.run_path(str(tmp_path / "mine.py"))["Mine"], argv)


def made_by_process(tmp_path):
    return len((tmp_path / "count").read_text())


def test_sigterm_ends_like_ctrl_c(job, tmp_path, capsys):
    """130 and a sentence. The folder is its own until it ends; then the next start goes on."""
    with Endpoint(plan(), lambda handler: time.sleep(3), accept()) as endpoint:
        argv = [*job, "--vlm-url", endpoint.url]
        running = process(tmp_path, argv)
        wait_for(endpoint, 2)
        assert "is in use by another run" in refused(capsys, argv)
        running.send_signal(signal.SIGTERM)
        status, _, err = ended(running)
        assert status == 130 and "Interrupted." in err and "goes on" in err
        assert "Traceback" not in err
        assert go_on(tmp_path, argv) == 0
    assert made_by_process(tmp_path) == 1 and len(endpoint.requests) == 3


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=slow)])
def test_a_killed_run_loses_one_call_at_most(job, tmp_path, sent):
    """The one that was under way. Ctrl-C and kill -9."""
    with Endpoint(plan(), lambda handler: time.sleep(3), accept()) as endpoint:
        argv = [*job, "--vlm-url", endpoint.url]
        running = process(tmp_path, argv)
        wait_for(endpoint, 2)
        running.send_signal(sent)
        assert ended(running)[0] == (130 if sent == signal.SIGINT else -9)
        assert go_on(tmp_path, argv) == 0
    assert made_by_process(tmp_path) == 1 and len(endpoint.requests) == 3


def test_a_full_disk_ends_the_run_in_a_sentence(job, tmp_path):
    """And loses nothing that was paid for before."""
    with Endpoint(plan(), accept()) as endpoint:
        argv = [*job, "--vlm-url", endpoint.url]
        status, _, err = ended(process(tmp_path, argv, DISK="5000"))
        assert status == 1 and "Traceback" not in err, err
        assert "File too large" in err and "same command goes on" in err
        assert re.search(r"clips.001\.mkv cannot be written \(.+\)\. What was recorded", err)
        assert not list((tmp_path / "out").rglob("*.m[pk][4v]"))
        assert go_on(tmp_path, argv) == 0
    assert len(endpoint.requests) == 2, "the plan was safe"
    assert made_by_process(tmp_path) == 2, "the clip could not be kept"


# ------------------------------------------------------------------------------
# Anything: property-based

anything_goes = hypothesis.settings(
    max_examples=200 if SLOW else 15, deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck))
some = hypothesis.settings(anything_goes, max_examples=200 if SLOW else 8)
texts = st.text(st.characters(exclude_characters="\0"))
OPTIONS = [
    "--N-max", "--M", "--seconds-first", "--seconds-next", "--seed", "--temperature",
    "--verify-fps", "--timeout", "--request-extra", "--on-exhausted", "--video-input", "--fps",
    "--sampling-steps", "--guidance-scale", "--offload", "--vlm-url", "--vgm", "--vlm"]


@some
@hypothesis.given(task=texts, name=st.sampled_from(OPTIONS),
                  value=texts | st.floats().map(str) | st.integers().map(str))
@hypothesis.example(task="t", name="--M", value="x" * 500)
@hypothesis.example(task="t", name="--M", value="│ ──")
@hypothesis.example(task="-t", name="--vgm", value="")
def test_whatever_is_typed_is_taken_or_refused(task, name, value, job, capsys, monkeypatch):
    """A value that is taken leads to the planner; any other gets a box or a sentence."""
    hypothesis.assume(not {"-h", "--help"} & {value, task})

    def planner(*request):
        raise c.Problem("The planner was asked.")

    monkeypatch.setattr(c.OpenAIVLM, "__call__", planner)
    monkeypatch.setattr(c.Wan, "check", lambda self: None)
    argv = [*swapped(job, "--task", task), "--vlm-url", "http://127.0.0.1:9/v1", name, value]
    assert len(refused(capsys, argv, c.Wan)) > 30


@anything_goes
@hypothesis.given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_picture_is_read_or_refused(data, kind, tmp_path):
    """In a sentence."""
    raw = io.BytesIO()
    Image.fromarray(noise(24, 24, 1, 3).frames[:, :, 0]).save(raw, kind)
    raw = bytearray(raw.getvalue())
    for _ in range(data.draw(st.integers(0, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        loaded = c.load_image(tmp_path / "x")
    except c.Problem as problem:
        assert re.search("cannot be read|pixels|8 bits", str(problem))
    else:
        assert loaded.dtype == np.uint8 and loaded.ndim == 3 and loaded.shape[2] == 3


@anything_goes
@hypothesis.given(data=st.data(), orientation=st.integers(1, 8))
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_exif_leaves_a_picture_readable(data, orientation, tmp_path):
    """Bytes of it may be wrong; the picture is not."""
    exif = Image.Exif()
    exif[0x112], exif[0x10F], exif[0x11A] = orientation, "a camera", 72.0
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment"
    raw = bytearray(exif.tobytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(14, len(raw) - 1))] = data.draw(st.integers(0, 255))
    loaded = saved(tmp_path, Image.new("RGB", (40, 20)), "x.jpg", exif=bytes(raw))
    assert sorted(loaded.shape) == [3, 20, 40]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
nearly = st.fixed_dictionaries(
    {}, optional={k: st.sampled_from([v, str(v), None]) | values for k, v in accept().items()})


@anything_goes
@hypothesis.given(reply=values | nearly)
@hypothesis.example(reply=accept())
@hypothesis.example(reply={**accept(), "verdict": " Accept "})
def test_only_a_said_accept_is_an_accept(reply):
    """Of anything that JSON can say."""
    models = c.Models(None, lambda *_: json.dumps(reply))
    try:
        d = models.ask("verifier", "", [], c.Verification)
    except c.Problem as problem:
        assert "no usable reply" in str(problem)
    else:
        assert reply["verdict"].strip().lower() == d.verdict and set(reply) <= set(accept())
        assert reply["progress"].strip().lower() == d.progress
        assert d.verdict == "reject" or (d.action_executed and d.progress != "none")
        assert type(d.reason) is type(d.suggestion) is str and 0 <= d.good_fraction <= 1


@anything_goes
@hypothesis.given(data=st.data())
def test_any_line_is_read_or_refused(data, tmp_path):
    """Of calls.jsonl, with any values in its fields: a sentence, or a run to its end."""
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    go(plan(), accept(), folder=folder)
    calls = lines(folder)
    for call in calls:
        for name in data.draw(st.lists(st.sampled_from(sorted(call)), max_size=2)):
            call[name] = data.draw(values)
    write_lines(folder, calls)

    def vlm(instructions, parts, schema):
        return json.dumps(plan() if schema is c.FirstPlan else accept())

    try:
        assert go(vlm=vlm, folder=folder).status in ("complete", "step_cap")
    except c.Problem as problem:
        assert re.search(r"calls\.jsonl, line \d is damaged|failed twice", str(problem))


def is_a_name(text):
    with contextlib.suppress(UnicodeEncodeError):  # half a character, which no file is called
        return "/" not in text and "\0" not in text and len(os.fsencode(text)) < 100


@some
@hypothesis.given(stem=(texts | st.binary().map(os.fsdecode)).filter(is_a_name))
@hypothesis.example(stem="\udcff")  # a byte that is no UTF-8
@hypothesis.example(stem="猫" * 83)  # as long as a name can be
@hypothesis.example(stem="..")
def test_no_picture_leads_out_of_runs(stem, job, tmp_path, monkeypatch):
    """Whatever it is called, a run has a folder directly under runs/."""
    monkeypatch.chdir(tmp_path)
    named = tmp_path / f"x{stem}.png"
    Image.fromarray(I0).save(named, "PNG")
    replies = [said(plan()), said(accept())]
    monkeypatch.setattr(c.OpenAIVLM, "__call__", lambda *_: replies.pop(0))
    monkeypatch.setattr(c.OpenAIVLM, "check", lambda _: None)  # there is no key
    at = job.index("--out")
    argv = swapped([*job[:at], *job[at + 2 :]], "--image", named)
    before = {path.name for path in tmp_path.iterdir()}
    try:
        assert c.main(Mine, argv) == 0
        (folder,) = (tmp_path / "runs").iterdir()
        assert (folder / "video.mp4").exists()
        assert json.loads((folder / "trace.json").read_bytes())["task"] == "t"
        assert {path.name for path in tmp_path.iterdir()} - before == {"runs"}
    finally:
        named.unlink()
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)


# ------------------------------------------------------------------------------
# The real pipeline: diffusers' WanImageToVideoPipeline with 9 MB of weights

MOVE = "Move the red circle right 2 cells."


@pytest.fixture(scope="module")
def wan():
    return c.Wan(vgm=str(TINY_WAN), fps=8, sampling_steps=2, guidance_scale=1.0)


def test_tiny_wan_is_repeatable(wan):
    """The same clip from the same seed, bit for bit; another from another."""
    frame = np.full((64, 64, 3), 200, np.uint8)
    one, two, other = (wan(frame, MOVE, 1.0, seed) for seed in (5, 5, 6))
    assert one.frames.shape == (9, 64, 64, 3) and one.frames.dtype == np.uint8
    assert one.seconds == 1
    assert (one.frames == two.frames).all() and (one.frames != other.frames).any()


@slow
def test_frames_per_clip_are_4_k_plus_1(wan):
    """As Wan makes them. [D8]"""
    frame = np.full((64, 80, 3), 200, np.uint8)
    made = [len(wan(frame, "x", seconds, 0).frames) for seconds in (0.1, 0.5, 1.0, 1.2)]
    assert made == [5, 5, 9, 9]


def test_the_papers_clips_have_97_and_49_frames(monkeypatch):
    """A.1: 6 s and 3 s at 16 fps, 20 steps, CFG 5.0."""
    asked = []

    class Pipe:
        vae_scale_factor_spatial = 8

        class transformer:
            class config:
                patch_size = (1, 2, 2)

        class tokenizer:
            model_max_length = 10**30

        def __call__(self, **request):
            asked.append(request)
            video = np.zeros((request["num_frames"], 2, 2, 3))
            return type("Output", (), {"frames": [video]})

    wan = c.Wan()
    wan.__dict__["pipe"] = Pipe()
    for seconds in (6.0, 3.0):
        wan(np.zeros((1080, 1920, 3), np.uint8), "q", seconds, 0)
    assert [request["num_frames"] for request in asked] == [97, 49]
    assert (asked[0]["width"], asked[0]["height"]) == (832, 464)
    assert asked[0]["num_inference_steps"] == 20 and asked[0]["guidance_scale"] == 5.0
    assert asked[0]["max_sequence_length"] == 512


def test_what_goes_wrong_in_wan_is_a_failure(wan, monkeypatch):
    """Frames that are not finite, and too little memory, with what to try."""
    import torch

    weight = wan.pipe.vae.decoder.conv_out.weight
    kept = weight.detach().clone()
    torch.nn.init.constant_(weight, math.nan)
    try:
        with pytest.raises(c.Problem, match="failed twice in a row .*not finite"):
            go(plan(), vgm=wan)
    finally:
        weight.data.copy_(kept)

    def full(*args, **others):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(wan.pipe.vae, "decode", full)
    with pytest.raises(c.Problem, match="out of GPU memory: try --offload group"):
        go(plan(), vgm=wan)


def test_offload_places_the_weights(monkeypatch):
    """On the GPU, a part at a time, or a layer at a time."""
    import torch

    class Pipe:
        def __init__(self):
            self.done = []

        def to(self, device):
            self.done.append(device)

        def enable_model_cpu_offload(self):
            self.done.append("model")

        def enable_group_offload(self, device, offload_type, **others):
            self.done.append((device.type, offload_type))

    def placed(offload):
        pipe = Pipe()
        c.Wan(offload=offload).place(pipe)
        return pipe.done

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placed("none") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placed("none") == ["cuda"] and placed("model") == ["model"]
    assert placed("group") == [("cuda", "leaf_level")]


def test_offload_does_not_change_what_wan_is():
    """A run goes on with another setting of it."""
    assert c.Wan(offload="none").identity == c.Wan(offload="group").identity
    assert c.Wan(fps=16).identity != c.Wan(fps=8).identity


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_checkpoint_runs(tmp_path):
    """Weights come from safetensors only, and a checkpoint's Python is not imported."""
    folder, trap = shutil.copytree(TINY_WAN, tmp_path / "wan"), tmp_path / "executed"
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(c.Problem, match="cannot be loaded"):
        _ = c.Wan(vgm=str(folder)).pipe
    shutil.copy(TINY_WAN / "text_encoder" / "model.safetensors", folder / "text_encoder")
    index = json.loads((folder / "model_index.json").read_text())
    index.update(_class_name=["pipeline", "Own"], scheduler=["own_scheduler", "Own"])
    (folder / "model_index.json").write_text(json.dumps(index))
    code = f"from pathlib import Path; Path({str(trap)!r}).touch()\nclass Own: pass\n"
    for path in ("pipeline.py", "scheduler/own_scheduler.py"):
        (folder / path).write_text(code)
    with pytest.raises(c.Problem, match="cannot be loaded"):
        _ = c.Wan(vgm=str(folder)).pipe
    assert not trap.exists()


def test_without_a_gpu_the_offline_run_is_named(monkeypatch):
    """For a checkpoint that is too large for a CPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(c.Problem, match=r"needs a CUDA GPU; python -m examples\.maze\.run"):
        _ = c.Wan().pipe
    with pytest.raises(c.Problem, match="neither a folder nor a hub id such as Video-Reason/"):
        _ = c.Wan(vgm="./no-folder").pipe


@slow
def test_loop_and_files_take_under_5_percent(wan, tmp_path, monkeypatch):
    """Of tiny-wan's half-second clips, one core each. The wait for the disk is told apart: it is
    the disk's, and may be anything on a busy one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took, waits, fsync = [], [], os.fsync

    def waiting(file):
        began = time.perf_counter()
        fsync(file)
        waits.append(time.perf_counter() - began)

    monkeypatch.setattr(os, "fsync", waiting)
    frame = np.full((96, 96, 3), 200, np.uint8)
    wan(frame, MOVE, 2.0, 0)  # the weights are loaded
    try:
        for number in range(6):
            waits.clear()
            vlm = Script(plan(left=2), reject(), accept("partial"), plan(), accept())
            models = c.RecordedModels(wan, vlm, tmp_path / str(number))
            began = time.perf_counter()
            c.CollabVR(models, c.Config(seconds_first=2, seconds_next=2)).run(frame, MOVE)
            whole = time.perf_counter() - began
            waited = sum(models.cost()["wall_seconds"].values())
            took.append((whole - waited - sum(waits), sum(waits), waited))
    finally:
        torch.set_num_threads(threads)
    work, disk, waited = map(min, zip(*took, strict=True))  # what else the machine does only adds
    print(f"{waited:.2f} s of models, {1000 * work:.1f} ms of loop and files, "
          f"{1000 * disk:.1f} ms of waiting for the disk")
    assert len(waits) > 10 and work < 0.05 * waited


# ------------------------------------------------------------------------------
# A real VLM server


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


@slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ["fastapi", "uvicorn"])),
                    reason="needs fastapi and uvicorn: pip install 'transformers[serving]'")
def test_a_random_vlm_server_ends_the_run_loudly(job, tmp_path, capsys):
    """transformers serve with random weights: its calls are counted, and nothing is an accept."""
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
            argv = [*swapped(job, "--vlm", tmp_path / "vlm"), "--request-extra",
                    '{"max_tokens": 60}', "--vlm-url", f"http://127.0.0.1:{port}/v1"]
            status = c.main(Mine, argv)
        finally:
            server.terminate()
    assert status == 1, (tmp_path / "log").read_text()
    assert "The planner gave no usable reply (" in capsys.readouterr().err
    calls = lines(tmp_path / "out")
    assert [call["role"] for call in calls] == ["planner"] * 3
    assert not MADE and not any("reply" in call for call in calls)
    for call in calls:
        assert call["tokens_out"] > 0 and call["tokens_in"] > len(c.PLANNER)
    assert not (tmp_path / "out" / "video.mp4").exists()
    assert "POST /v1/chat/completions" in (tmp_path / "log").read_text()


# ------------------------------------------------------------------------------
# The file keeps its promises


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_line_tags_of_algorithm_1_ascend():
    """And are all there; lines 12 and 16 to 18 only end blocks."""
    tags = [int(n) for n in re.findall(r"# line (\d+)$", read("collabvr.py"), re.MULTILINE)]
    assert tags == sorted(tags) and set(tags) == {*range(1, 12), 13, 15, 19}


def test_every_departure_is_tagged_and_in_the_readme():
    """A tag where it happens, a line in the README's table."""
    source = read("collabvr.py") + read("examples/baselines.py")
    tagged = {int(number) for number in re.findall(r"\[D(\d+)\]", source)}
    rows = re.findall(r"^\| D(\d+) \|", read("README.md"), re.MULTILINE)
    table = [int(number) for number in rows]
    assert table == [*range(1, len(table) + 1)] and tagged == set(table)


def test_the_readmes_statuses_are_all_there_are():
    """A line in its table for each."""
    named = set(re.findall(r"^\| `(\w+)` \|", read("README.md"), re.MULTILINE))
    assert {"complete", "step_cap", "fallback", "best_attempt"} <= named


def test_the_readme_says_what_a_run_can_cost():
    """At worst, with the default settings."""
    clips, seconds, calls = c.Config().worst_case()
    text = " ".join(read("README.md").split())
    assert f"{clips} clips ({seconds:.0f} s of video) and {calls} VLM calls" in text


def test_the_readmes_example_runs(tmp_path):
    """The first block of Python under 'From Python', as it stands, in an empty folder."""
    _, _, section = read("README.md").partition("## From Python")
    (tmp_path / "example.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1])
    done = subprocess.run([sys.executable, "example.py"], check=False, capture_output=True,
                          text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "complete" in done.stdout and list(tmp_path.rglob("video.mp4"))


@slow
def test_the_offline_run_ends_in_a_verified_video(tmp_path):
    """The README's first command."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.maze.run", "--out", str(tmp_path / "run")], check=False,
        capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert made["status"] == "complete"
    assert made["cost"]["clips"] >= 3 and made["cost"]["calls"]["verifier"] >= 3
    assert {call["model"] for call in made["calls"] if call["role"] != "vgm"} == {"maze-reader"}
    assert "by rule" in done.stdout and (tmp_path / "run" / "video.mp4").stat().st_size > 1000


def test_these_tests_have_short_names_and_a_sentence():
    """Up to 50 characters; what is tested stands in the docstring."""
    functions = re.findall(r'^def (test_\w+)\(.*?\):\n(    """)?', read("test_collabvr.py"),
                           re.MULTILINE | re.DOTALL)
    assert len(functions) > 100
    assert not [name for name, docstring in functions if len(name) > 50 or not docstring]
