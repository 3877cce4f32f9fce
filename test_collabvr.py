"""What collabvr.py does. No network, no GPU, no mock library.

The first part is the method's specification. A test is a script of what the VLM replies:

    run = go(plan(left=2), reject(), accept("partial"), plan(), accept())
    assert run.roles() == "pvvpv" and run.shown() == [2, 3] and run.status == "complete"

plan, accept, reject and route are replies of the planner, the verifier and the failure router.
Clip n of a run, counted from 1, is painted with the number n: `shown` tells which clips a video
consists of. Then come replies, models and cost, the run folder, pictures and videos, the endpoint,
the command line, a real pipeline, and what the README promises.
"""

import ast
import base64
import http.server
import inspect
import io
import itertools
import json
import math
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import av
import filelock
import hypothesis
import imageio.v3 as iio
import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

import collabvr as c

ROOT = Path(c.__file__).parent
I0 = np.full((32, 48, 3), 250, np.uint8)


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


def route(action, suggestion="slower", steps=0):
    return {
        "reason": "so it is", "action": action, "suggestion": suggestion, "estimated_steps": steps,
    }


class Script:
    """A VLM that replies what it is told to, and remembers what it was asked."""

    identity = "script"

    def __init__(self, *replies):
        self.replies = list(replies)
        self.asked = []

    def __call__(self, instructions, parts, schema):
        self.asked.append(SimpleNamespace(
            instructions=instructions, schema=schema,
            text="\n".join(part for part in parts if isinstance(part, str)),
            pictures=[part for part in parts if isinstance(part, np.ndarray)],
            clips=[part for part in parts if isinstance(part, c.Clip)]))
        if not self.replies:
            pytest.fail(f"a {schema.__name__} was asked for, and the script is over")
        reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        text = reply if isinstance(reply, str) else json.dumps(reply)
        return {"text": text, "tokens_in": 100, "tokens_out": 10, "model": "script-1"}


class Painter:
    """A generator: frame 0 is the frame that it is given, the others show the clip's number."""

    identity = "painter"

    def __init__(self, fails=()):
        self.fails = fails  # seeds
        self.made = []

    def __call__(self, frame, prompt, seconds, seed):
        self.made.append(SimpleNamespace(frame=frame, prompt=prompt, seconds=seconds, seed=seed))
        if seed in self.fails:
            raise RuntimeError("no more memory")
        return painted(frame, seconds, (seed + 1) % 256)


def painted(frame, seconds, number, fps=4):
    frames = np.repeat(frame[None], int(seconds * fps) + 1, 0)
    frames[1:] = number
    return c.Clip(frames, fps)


def numbers(clip):
    """The numbers that a clip shows, frame 0 apart."""
    return [number for number, _ in itertools.groupby(clip.frames[1:, 0, 0, 0].tolist())]


class Run:
    """A run that is over. `made` and `asked` are what the models were given, call by call."""

    def __init__(self, models, result):
        self.models, self.result, self.cost = models, result, models.cost()
        self.status, self.unverified = result.status, result.unverified_steps
        self.made = getattr(models.vgm, "made", None)
        self.asked = getattr(models.vlm, "asked", None)

    def roles(self):
        """The VLM's calls, p for planner, v for verifier, r for router; in `asked`'s order."""
        return "".join(call.role[0] for call in self.models.calls if call.role != "vgm")

    def shown(self):
        """The numbers of the clips that the video consists of."""
        return numbers(self.result.video)


def go(*replies, vgm=None, vlm=None, folder=None, seed=0, method=c.CollabVR, **config):
    """A run to the script's end, with two seconds a clip at step 1 and one second later."""
    models = c.Models(vgm or Painter(), vlm or Script(*replies), seed)
    if folder:
        models = c.RecordedModels(models.vgm, models.vlm, folder, seed)
    config = c.Config(**{"seconds_first": 2, "seconds_next": 1, **config})
    result = method(models, config).run(I0, "solve the maze")
    assert not getattr(models.vlm, "replies", None), "the run ended before the script did"
    return Run(models, result)


# ------------------------------------------------------------------------------
# Algorithm 1


def test_figure_10():
    """The paper's trace: reject, evolve, accept, plan again, accept."""
    run = go(
        plan("go right", left=2), reject(suggestion="to the right, not up"), accept("partial"),
        plan("go down", left=1), accept(),
    )
    assert run.roles() == "pvvpv"
    assert [clip.prompt for clip in run.made] == [
        "go right", "go right Correction: to the right, not up", "go down"]
    assert run.shown() == [2, 3], "the rejected clip is not in the video"
    assert run.status == "complete" and run.unverified == []
    assert run.result.video.seconds == 2 + 1


def test_the_papers_bounds():
    """Table 10, with the router off: 1 to 9 clips, 2 to 12 VLM calls, 1 to 3 steps."""
    shortest = go(plan(), accept())
    assert (shortest.cost["clips"], shortest.cost["steps"]) == (1, 1)
    assert len(shortest.roles()) == 2
    never = [plan(), reject(), reject(), reject()] * 3
    for policy in ("replan", "best"):
        longest = go(*never, on_exhausted=policy)
        assert (longest.cost["clips"], longest.cost["steps"]) == (9, 3)
        assert longest.roles() == "pvvv" * 3
    assert c.worst_case(c.Config(on_exhausted="replan")) == (9, 3 * 6 + 6 * 3, 12)
    assert c.worst_case(c.Config()) == (12, 36 + 15, 18), "the router adds a clip to each step"


def test_attempts_of_a_step_share_frame_and_length():
    """Each starts from f, which becomes the accepted clip's last frame (line 9). [D8]

    Each clip has a seed of its own: the run's, plus the number of clips so far. [D6]
    """
    run = go(plan(left=2), reject(), accept(), plan(), reject(), accept(), seed=40)
    assert [clip.frame[0, 0, 0] for clip in run.made] == [250, 250, 42, 42]
    assert [clip.seconds for clip in run.made] == [2, 2, 1, 1]
    assert [clip.seed for clip in run.made] == [40, 41, 42, 43]


@pytest.mark.parametrize("left", [0, 1])
def test_complete_takes_planner_and_verifier(left):
    """Line 10: the plan counts one step, or none, and the verifier sees it done. [D2]"""
    assert go(plan(left=left), accept("complete")).roles() == "pv"
    run = go(plan(left=2), accept("complete"), plan(left=left), accept("partial"),
             plan(left=left), accept("complete"))
    assert run.roles() == "pvpvpv" and run.status == "complete"


def test_a_planner_may_end_the_run():
    """A later plan may find that nothing is left to do, once a clip is in H. [D1]"""
    run = go(plan(left=2), accept("partial"), plan("", done=True, target=""))
    assert run.roles() == "pvp" and run.shown() == [1] and run.status == "complete"
    run = go(plan(), reject(), plan(done=True), plan("on"), accept(), M=1, on_exhausted="replan")
    assert run.roles() == "pvppv" and run.made[1].prompt == "on"
    assert "task_complete must be false" in run.asked[3].text


@pytest.mark.parametrize("left, progress", [(1, "partial"), (2, "complete")])
def test_a_run_ends_at_the_step_cap(left, progress):
    """Line 19, after N_max steps. At the last one, too, the plan counts as it speaks."""
    run = go(*[plan(left=left), accept(progress)] * 3)
    assert run.roles() == "pvpvpv" and run.shown() == [1, 2, 3]
    assert run.status == "step_cap" and run.unverified == []


def test_corrections_of_a_step_add_up():
    """Line 15: each suggestion joins the prompt as it stands; the reason does, if there is none.

    The same prompt once more would repeat its mistake. [D5]
    """
    run = go(plan("go"), reject(suggestion="up"), reject(suggestion=" ", reason="it fell"),
             accept())
    assert run.made[2].prompt == "go Correction: up Correction: it fell"


few = hypothesis.settings(
    max_examples=20, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])


@few
@hypothesis.given(data=st.data(), policy=st.sampled_from(["route", "replan", "best"]))
def test_no_run_says_more_than_its_models_said(data, policy):
    """Whatever they reply: steps without an accept are named, and the costs are within bounds."""
    def vlm(instructions, parts, schema):
        replies = [accept(), accept("partial"), reject(0.9), reject(0.2)]
        if issubclass(schema, c.Plan):
            replies = [plan(left=0), plan(left=2), plan(done=schema is c.Plan)]
        if issubclass(schema, c.Routing):
            allowed = schema.model_json_schema()["properties"]["action"]["enum"]
            replies = [route(action) for action in allowed]
        return json.dumps(data.draw(st.sampled_from(replies)))

    run = go(vlm=vlm, on_exhausted=policy)
    accepted, step = set(), {}
    for call in run.models.calls:
        if call.role == "vgm":
            step[call.seed + 1] = call.t
        elif call.role == "verifier" and call.reply["verdict"] == "accept":
            accepted.add(call.t)
    assert {step[number] for number in run.shown()} - accepted == {*run.unverified}
    config = c.Config(seconds_first=2, seconds_next=1, on_exhausted=policy)
    cost = run.cost["clips"], run.cost["vgm_seconds"], len(run.roles())
    assert all(one <= most for one, most in zip(cost, c.worst_case(config), strict=True))


# ------------------------------------------------------------------------------
# App. A.2: what planner and verifier are told


def test_the_planner_is_told_what_came_of_each_step():
    """Task, step, cap, the clip's length, and every outcome in words. [D7] [D18]"""
    run = go(
        plan("one", left=3), accept("partial"),
        plan("two", left=2), reject(0.6, reason="too late"), reject(0.1, reason="astray"),
        plan("three"), accept(), M=2, on_exhausted="replan",
    )
    first, last = run.asked[0].text, run.asked[5].text
    assert "Task prompt: solve the maze" in first and "Steps so far:\nnone" in first
    assert "Step: 1 of at most 3\n" in first and "Clip length: 2 s" in first
    assert "Step 1: one Outcome: accepted, progress partial" in last
    assert re.search("Step 2: two.* Outcome: rejected, nothing was kept: too late", last)
    assert "astray" not in last, "only the best attempt of a step counts"
    assert "Step: 3 of at most 3 (the last allowed step)" in last and "Clip length: 1 s" in last


def test_the_planner_sees_input_and_last_frames():
    """The input image and the last frame of each clip in H, and no other. [D7]"""
    run = go(plan(left=3), accept("partial"), plan(left=2), reject(), accept(), plan(), accept())
    seen = [[picture[0, 0, 0] for picture in run.asked[i].pictures] for i in (0, 2, 5)]
    assert run.roles() == "pvpvvpv" and seen == [[250], [250, 1], [250, 1, 3]]


def test_no_role_sees_more_than_eight_clips():
    """Requests have limits: H's newest eight. [D7]"""
    run = go(*[plan(left=2), accept("partial")] * 12, N_max=12)
    for question in run.asked[-2:]:
        assert question.text.count("Last frame of step") == 8
        assert "Last frame of step 11" in question.text


def test_the_verifier_judges_the_evolved_action():
    """With the plan's target state, the input image and the clip. [D11]"""
    run = go(plan("go right", target="at the door"), reject(suggestion="hop"), accept())
    _, first, second = run.asked
    assert "Planned action: go right\nTarget state: at the door" in first.text
    assert "Planned action: go right Correction: hop\nTarget state: at the door" in second.text
    assert [numbers(clip) for clip in second.clips] == [[2]]
    assert (second.pictures[0] == I0).all()


def test_each_role_has_its_own_prompt():
    """It names every field of its schema, reasons before verdicts. [D12]"""
    run = go(plan(), reject(), route("regen"), accept(), M=1)
    prompts = [c.PLANNER, c.VERIFIER, c.ROUTER, c.VERIFIER]
    assert [question.instructions for question in run.asked] == prompts
    for question in run.asked:
        names = list(question.schema.model_fields)
        assert [name for name in names if name not in question.instructions] == []
        assert names[0] in ("reason", "observation")


# ------------------------------------------------------------------------------
# After M rejections: Algorithm 1 (replan), C.2 (best) or the router (A.5) [D3]


def test_replan_is_algorithm_1_to_the_letter():
    """Nothing joins, the frame stays, the next plan is told why."""
    run = go(plan(left=2), reject(), reject(reason="a wall"), plan(), accept(),
             M=2, on_exhausted="replan")
    assert run.roles() == "pvvpv" and run.shown() == [3]
    assert (run.made[2].frame == I0).all()
    assert "Outcome: rejected, nothing was kept: a wall" in run.asked[3].text


def test_best_keeps_the_most_good_seconds():
    """The latest of equals joins H, unverified, and the run goes on from its last frame."""
    run = go(plan(left=2), reject(0.7), reject(0.7), reject(0.1), plan(), accept(),
             on_exhausted="best")
    assert run.shown() == [2, 4] and run.unverified == [1] and run.status == "complete"
    assert (run.made[3].frame == 2).all()
    assert "Outcome: rejected, kept as the best one" in run.asked[4].text


@pytest.mark.parametrize("goods, shown", [((0.2, 0.6, 0.3), 2), ((0.5, 0.9, 0.9), 1)])
def test_with_nothing_in_H_the_best_attempt_is_shown(goods, shown):
    """What was paid for, marked so. 0.5 of two seconds are more than 0.9 of one. [D4]"""
    steps = [[plan(), reject(good)] for good in goods]
    run = go(*itertools.chain(*steps), M=1, on_exhausted="replan")
    assert run.status == "best_attempt"
    assert run.shown() == [shown] and run.unverified == [shown]


def test_regen_keeps_the_good_part_of_the_best():
    """D.5: new video from the first bad frame on; the joined clip is verified. [D15]"""
    run = go(plan("go"), reject(0.2, "up"), reject(0.5, "down"), reject(0.3, "left"),
             route("regen", "slower"), accept())
    assert run.roles() == "pvvvrv" and run.status == "complete" and run.unverified == []
    assert [call.j for call in run.models.calls if call.role == "vgm"] == [1, 2, 3, 4]
    again, judged = run.made[3], run.asked[5]
    assert (again.frame == 2).all() and again.seconds == 2
    assert again.prompt == "go Correction: up Correction: slower"
    assert f"Planned action: {again.prompt}\n" in judged.text
    assert numbers(judged.clips[0]) == run.shown() == [2, 4]
    assert len(run.result.video.frames) == 1 + 4 + 8  # half of 8, and 8 new ones


@pytest.mark.parametrize("good, T, k", [(0.29, 101, 29), (0.57, 101, 57), (1.0, 9, 8), (0, 9, 0)])
def test_regen_starts_after_the_last_good_frame(good, T, k):
    """k = floor(good_fraction (T - 1)): 0.29 of 100 frames are 29 frames, not 28."""
    def vgm(frame, prompt, seconds, seed):
        clip = painted(frame, 1, 0, fps=T - 1)
        clip.frames[1:] += np.arange(1, T, dtype=np.uint8)[:, None, None, None]
        return clip

    run = go(plan(), reject(good), route("regen"), accept(), M=1, vgm=vgm, seconds_first=1)
    frames = run.result.video.frames
    assert len(frames) == k + T
    assert frames[: k + 1, 0, 0, 0].tolist() == [250, *range(1, k + 1)]


@pytest.mark.parametrize("good, repaired, shown, unverified", [
    (0.5, accept("partial"), [1, 2], []), (0.2, reject(0.9), [1, 2], [1]),
    (0.5, reject(0.1), [1], [1])])
def test_the_best_of_all_goes_on_after_a_regen(good, repaired, shown, unverified):
    """An accepted one or, of the attempts and the repaired clip, that with most good seconds."""
    run = go(plan(left=2), reject(good), route("regen"), repaired, plan(), accept(), M=1)
    assert run.roles() == "pvrvpv" and run.status == "complete"
    assert run.unverified == unverified and run.shown() == [*shown, 3]


def test_split_hands_the_task_back_to_the_planner():
    """A.5: the next plan gets diagnosis, advice and estimate; H and f do not change. [D16]"""
    run = go(plan("all of it"), reject(reason="too much"), route("split", "in two moves", 2),
             plan("half"), accept(), M=1)
    told = run.asked[3].text
    assert re.search("rejected, nothing was kept: too much.* Advice: in two moves .*2", told)
    assert (run.made[1].frame == I0).all() and run.shown() == [2]


def test_split_is_not_offered_at_the_last_step():
    """No step is left to take it up; a router that says so nevertheless is asked again. [D13]"""
    run = go(plan(), reject(), route("split"), route("fallback"), M=1, N_max=1)
    assert run.roles() == "pvrr" and run.status == "fallback"
    assert "Allowed actions: regen, fallback" in run.asked[2].text
    assert "action: Input should be 'regen' or 'fallback'" in run.asked[3].text


def test_fallback_is_one_clip_for_the_whole_task():
    """A.5: from I0, the task and the advice, as long as step 1. Nobody verifies it. [D17]"""
    run = go(plan(left=2), accept(), plan(), reject(), route("fallback", "in one go"), M=1)
    last = run.made[-1]
    assert last.prompt == "solve the maze Correction: in one go"
    assert (last.frame == I0).all() and last.seconds == 2
    assert run.status == "fallback" and run.shown() == [3] and run.unverified == [2]


@pytest.mark.parametrize("suggestion, advice", [("go left", "go left"), (" ", "it fell")])
def test_without_the_routers_word_the_verifiers_holds(suggestion, advice):
    """Its suggestion or, without one, its reason. [D14]"""
    bad = reject(suggestion=suggestion, reason="it fell")
    for action, then in (("regen", [accept()]), ("fallback", [])):
        run = go(plan(), bad, route(action, " "), *then, M=1)
        assert run.made[1].prompt.endswith(f" Correction: {advice}")
    run = go(plan(), bad, route("split", ""), plan(), accept(), M=1)
    assert f"Advice: {advice}" in run.asked[3].text


def test_the_router_sees_the_best_failed_clip():
    """With its action, its diagnosis, and the allowed routes. [D13]"""
    run = go(plan(left=2), accept(), plan("go down"), reject(0.1, "hop"),
             reject(0.6, "run", reason="late"), reject(0.3), route("fallback"))
    question = run.asked[6]
    assert "Last frame of step 1:" in question.text
    assert "Planned action: go down Correction: hop\n" in question.text
    assert "Reason: late\nSuggestion: run\nGood fraction: 0.60" in question.text
    assert "Allowed actions: regen, split, fallback" in question.text
    assert [numbers(clip) for clip in question.clips] == [[3]]


# A subclass of one's own


def test_a_subclass_may_replace_a_prompt():
    """`ask` is the one place where a role is asked."""
    class Strict(c.CollabVR):
        def ask(self, role, prompt, parts, schema, t):
            return super().ask(role, f"You are a strict {role}.", parts, schema, t)

    run = go(plan(), reject(), route("fallback"), M=1, method=Strict)
    assert [question.instructions for question in run.asked] == [
        "You are a strict planner.", "You are a strict verifier.", "You are a strict router."]


def test_a_subclass_may_have_other_routes():
    """Fewer, and methods of its own; the router is told, and held to it."""
    class Patient(c.CollabVR):
        def routes(self, t):
            return ["split", "give_up"]

        def give_up(self, I0, q, H, f, p, best, r):
            return f, c.Result(best.c_t, "gave_up", [best.t])

    run = go(plan(), reject(), route("regen"), route("split"),
             plan(), reject(), route("give_up"), M=1, method=Patient)
    assert run.roles() == "pvrrpvr" and run.status == "gave_up" and run.shown() == [2]
    assert "Allowed actions: split, give_up" in run.asked[2].text


# ------------------------------------------------------------------------------
# Sec. 4: cost


def test_all_clips_and_calls_count():
    """Rejected and routed clips, too, and replies that could not be used."""
    cost = go(plan(left=2), accept(), plan(), "?", reject(), route("fallback"), M=1).cost
    assert (cost["clips"], cost["vgm_seconds"], cost["steps"]) == (3, 2 + 1 + 2, 2)
    assert cost["calls"] == {"planner": 2, "vgm": 3, "verifier": 3, "router": 1}
    assert cost["tokens_in"]["verifier"] == 300 and cost["tokens_out"]["router"] == 10
    assert set(cost["wall_seconds"]) == set(cost["calls"])


@pytest.mark.parametrize("count, replies", [
    (0, [plan(left=2), accept(), plan(), accept()]),
    (2, [plan(left=2), reject(), accept(), plan(), reject(), accept()]),
    (3, [plan(), reject(), reject(), reject(), route("regen"), accept()]),
    (2, [plan(), reject(), reject(), reject(), route("fallback")]),
    (2, [plan(), reject(), reject(), reject(), route("split"), plan(), accept()]),
])
def test_regenerations_are_attempts_after_the_first(count, replies):
    """As in Tables 10 and 12: within a step, and regen's clip. A fallback is none."""
    assert go(*replies).cost["regenerations"] == count


# ------------------------------------------------------------------------------
# Replies: lenient where no reject can become an accept, strict in all else [D9]


def without(reply, *names):
    return {name: value for name, value in reply.items() if name not in names}


ACCEPT = json.dumps(accept())
REJECT = json.dumps(reject())

UNUSABLE = {
    "nothing": "",
    "prose": "Accept.",
    "null": "null",
    "cut off": ACCEPT[:-20],
    "another verdict": {**accept(), "verdict": "accepted"},
    "no verdict": without(accept(), "verdict"),
    "a null verdict": {**accept(), "verdict": None},
    "no action_executed": without(accept(), "action_executed"),
    "no progress": without(accept(), "progress"),
    "no reason": without(accept(), "reason"),
    "a reject without good_fraction": without(reject(), "good_fraction"),
    "a reject without a reason": reject(reason=" ", suggestion=""),
    "a field too many": {**accept(), "note": 1},
    "a wrong type": {**accept(), "action_executed": "perhaps"},
    "a fraction out of range": {**accept(), "good_fraction": 1.7},
    "not a number": {**accept(), "good_fraction": math.nan},
    "accepted though not executed": accept(executed=False),
    "accepted without progress": accept("none"),
    "two verdicts": ACCEPT[:-1] + ', "verdict": "reject"}',
    "two objects": ACCEPT + REJECT,
    "two objects in words": f"{ACCEPT} or {REJECT}",
    "two objects in a fence": f"```json\n{ACCEPT}\n{REJECT}\n```",
    "a list": f"[{ACCEPT}]",
    "a list in words": f"Here: [{ACCEPT}]",
    "only a thought": f"<think>{ACCEPT}</think>",
    "an unfinished thought": f"<think>maybe {ACCEPT} but no, it fell",
    "a thought that ends later": f"{ACCEPT}</think>no",
    "deep lists": "[" * 50_000,
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_reply_is_never_an_accept(name):
    """The VLM is asked again, with its own reply and what is wrong with it."""
    bad = UNUSABLE[name] if isinstance(UNUSABLE[name], str) else json.dumps(UNUSABLE[name])
    run = go(plan(), bad, reject(), accept())
    assert run.roles() == "pvvv" and len(run.made) == 2
    again = run.asked[2].text
    assert not bad or f"Your last reply was: {bad[:4000]}\nIt could not be used: " in again


words = st.sampled_from(["", "accept", "reject", "complete", "true", "0"])
anything = st.recursive(
    st.none() | st.booleans() | st.floats() | words,
    lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=5)
nearly = st.fixed_dictionaries({}, optional={
    name: st.sampled_from([value, str(value), None]) | anything
    for name, value in accept().items()})


@few
@hypothesis.given(reply=anything | nearly)
@hypothesis.example(reply={**accept(), "verdict": " Accept "})
def test_only_a_said_accept_is_an_accept(reply):
    """Of anything that JSON can say."""
    models = c.Models(None, lambda *_: json.dumps(reply))
    try:
        d = models.ask("verifier", "", [], c.Verification)
    except c.Problem as problem:
        assert "no usable reply" in str(problem)
    else:
        assert d.verdict == reply["verdict"].strip().lower() and set(reply) <= set(accept())
        assert d.verdict == "reject" or (d.action_executed and d.progress != "none")


def test_all_faults_are_told_at_once():
    """Beside the last reply only."""
    bad = {**without(reject(), "verdict"), "progress": "much", "good_fraction": 2, "note": 1}
    again = go(plan(), "one", bad, accept()).asked[3].text
    assert f"Your last reply was: {json.dumps(bad)}" in again and "was: one" not in again
    for name in ("verdict", "progress", "good_fraction", "note"):
        assert re.search(f"could not be used: .*{name}: ", again), name


def test_three_unusable_replies_end_the_run():
    """With the reply in the sentence, so that one can see it."""
    with pytest.raises(c.Problem, match="verifier gave no usable reply .*'Accept.'"):
        go(plan(), "Accept.", "Accept.", "Accept.")


@pytest.mark.parametrize("empty", [plan(instruction=" "), plan(target="")])
def test_a_plan_needs_an_action_and_its_target(empty):
    """A plan without one of the two is not usable."""
    run = go(empty, plan(), accept())
    assert run.roles() == "ppv" and len(run.made) == 1


LENIENT = {
    "case and blanks": {**accept(), "verdict": " ACCEPT\n", "progress": "Complete "},
    "no suggestion": without(accept(), "suggestion"),
    "a null suggestion": {**accept(), "suggestion": None},
    "no confidence": without(accept(), "confidence"),
    "confidence as a number": {**accept(), "confidence": 0.9},
    "numbers as text": {**accept(), "good_fraction": "1.0"},
    "booleans as text": {**accept(), "action_executed": "true"},
    "an accept without good_fraction": without(accept(), "good_fraction"),
    "a fence": f"```json\n{ACCEPT}\n```",
    "words around it": f"Sure, here it is: {ACCEPT} Good luck!",
    "a thought before it": f"<think>It is {{so}}, or is it?</think>\n{ACCEPT}",
    "half a thought before it": f"so it is</think>```{ACCEPT}```",
    "a thought in its text": {**accept(), "reason": "</think> [1] } ```"},
}


@pytest.mark.parametrize("name", LENIENT)
def test_what_cannot_turn_a_reject_is_forgiven(name):
    """One reply is enough."""
    run = go(plan(), LENIENT[name])
    assert run.roles() == "pv" and run.status == "complete"


def test_plans_and_routes_are_read_as_leniently():
    """Numbers and booleans as text, the route's case, a missing suggestion."""
    steps = {**plan(left=2), "estimated_steps_remaining": "2", "task_complete": "False"}
    silent = {**without(route("split"), "suggestion", "estimated_steps"), "action": " SPLIT"}
    run = go(steps, reject(suggestion=None), silent, plan(), accept(), M=1)
    assert run.roles() == "pvrpv" and "Advice: it went right" in run.asked[3].text


@pytest.mark.parametrize("odd", [
    None, 7, {}, {"text": None}, {"text": 5}, {"text": ACCEPT, "tokens_in": "many"},
    {"text": ACCEPT, "fault": "finish_reason length"},
    {"text": "no", "reply": accept(), "seconds": 3}, ConnectionError("gone")])
def test_a_vlm_that_gives_no_text_is_asked_again(odd):
    """What it claims beside its text is not believed, except a fault."""
    script = [json.dumps(plan()), odd, ACCEPT]

    def vlm(*request):
        answer = script.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    run = go(vlm=vlm)
    assert run.status == "complete" and run.roles() == "pvv"
    assert run.models.calls[2].fault and run.cost["vgm_seconds"] == 2


@pytest.mark.parametrize("schema", [
    c.Plan, c.FirstPlan, c.Verification, c.routing_of(["regen", "split"])])
def test_schemas_are_plain_enough_for_every_engine(schema):
    """No const, length or pattern: some engines refuse them, others get them wrong."""
    made = schema.model_json_schema()
    for word in ("const", "minLength", "maxLength", "pattern", "default", "anyOf"):
        assert f'"{word}"' not in json.dumps(made)
    assert made["additionalProperties"] is False
    assert made["required"] == list(made["properties"]) == list(schema.model_fields)


# ------------------------------------------------------------------------------
# Models: the one seam to both models


def test_a_failed_generation_costs_no_attempt():
    """It is tried once more with the next seed, and counted."""
    run = go(plan(), reject(), accept(), vgm=Painter(fails=[0, 2]), M=2)
    assert [clip.seed for clip in run.made] == [0, 1, 2, 3]
    assert (run.cost["generator_errors"], run.cost["clips"], run.cost["vgm_seconds"]) == (2, 2, 4)
    made = [call for call in run.models.calls if call.role == "vgm"]
    assert ["no more memory" in (call.fault or "") for call in made] == [True, False] * 2
    assert [call.j for call in made] == [1, 1, 2, 2] and run.cost["regenerations"] == 1


def test_a_second_failure_in_a_row_ends_the_run(caplog):
    """With its reason; the traceback is in the log."""
    with pytest.raises(c.Problem, match="failed twice in a row .*no more memory"):
        go(plan(), vgm=Painter(fails=[0, 1]))
    assert caplog.text.count("Traceback") == 2


def test_a_problem_of_a_model_ends_the_run():
    """It says that no further try can help."""
    def no(*request):
        raise c.Problem("The key is wrong.")

    for models in ({"vgm": no}, {"vlm": no}):
        with pytest.raises(c.Problem, match="The key is wrong"):
            go(plan(), **models)


def test_a_failed_seed_is_replaced_by_a_fresh_one():
    """Baselines give seeds; no other candidate has the one that stands in."""
    models = c.Models(Painter(fails=[2]), None)
    for seed in (1, 2, 3, 4):
        models.generate(I0, "q", 2, seed=seed)
    first, failed, instead, *others = [clip.seed for clip in models.vgm.made]
    assert [first, failed, *others] == [1, 2, 3, 4] and not 0 <= instead <= 100


NO_CLIPS = {
    "a single frame": c.Clip(np.zeros((1, 8, 8, 3), np.uint8), 4),
    "grey": c.Clip(np.zeros((9, 8, 8), np.uint8), 4),
    "floats": c.Clip(np.full((9, 8, 8, 3), math.nan), 4),
    "no height": c.Clip(np.zeros((9, 0, 8, 3), np.uint8), 4),
    "too short": c.Clip(np.zeros((4, 8, 8, 3), np.uint8), 4),
    "no rate": c.Clip(np.zeros((9, 8, 8, 3), np.uint8), math.nan),
    "no Clip": np.zeros((9, 8, 8, 3), np.uint8),
    "nothing": None,
}


@pytest.mark.parametrize("name", NO_CLIPS)
def test_a_clip_that_is_none_is_a_failure(name):
    """Frames are uint8 RGB (T, H, W, 3), of half the seconds asked for at least."""
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=lambda *_: NO_CLIPS[name])


@pytest.mark.parametrize("size, fps", [((40, 48), 4), ((32, 48), 8)])
def test_a_clip_that_cannot_join_is_a_failure(size, fps):
    """Another size or rate than the first clip's."""
    def vgm(frame, prompt, seconds, seed):
        if seed == 0:
            return painted(frame, 2, 1)
        return painted(np.zeros((*size, 3), np.uint8), 2, 1, fps)

    with pytest.raises(c.Problem, match="failed twice in a row .*differs from"):
        go(plan(left=2), accept(), plan(), vgm=vgm)


def test_a_generator_may_use_one_buffer():
    """And write into the frame that it gets: neither the input nor the video suffers."""
    buffer = np.zeros((9, *I0.shape), np.uint8)

    def vgm(frame, prompt, seconds, seed):
        buffer[0] = frame
        buffer[1:] = 100 + seed
        frame[:] = 0
        return c.Clip(buffer, 4)

    run = go(plan(left=2), accept("partial"), plan(), accept(), vgm=vgm)
    assert run.shown() == [100, 101] and (run.result.video.frames[0] == 250).all()


@pytest.mark.parametrize("picture", [I0 / 255, I0[..., 0], "x.png", np.zeros((0, 4, 3), np.uint8)])
def test_a_picture_is_a_uint8_rgb_array(picture):
    """Anything else gets a sentence before it costs something."""
    vlm = Script(plan(), accept())
    with pytest.raises(c.Problem, match="a uint8 RGB array"):
        c.CollabVR(c.Models(Painter(), vlm)).run(picture, "q")
    assert not vlm.asked


def test_models_serve_one_run():
    """A second one is refused in a sentence."""
    models = go(plan(), accept()).models
    with pytest.raises(c.Problem, match="make new ones for the next"):
        c.CollabVR(models).run(I0, "another task")


def test_results_are_printed_without_their_frames():
    """A line, not a screen of pixels."""
    run = go(plan(), accept())
    assert len(repr(run.result)) < 200 and "fps=4" in repr(run.result)


@pytest.mark.parametrize("kind, wrong", [
    (c.Config, {"n_max": 5}), (c.Config, {"M": 1.5}), (c.Config, {"seconds_next": math.nan}),
    (c.OpenAIVLM, {"model": "m"}), (c.Wan, {"steps": 3})])
def test_wrong_settings_are_refused_in_python(kind, wrong):
    """Misspelt or out of range, by name."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        kind(**wrong)


# ------------------------------------------------------------------------------
# The run folder: what was paid for is kept

FULL = [plan(left=2), reject(), accept("partial"), plan(), accept()]


def trace(folder):
    return json.loads((folder / "trace.json").read_bytes())


def outcome(run):
    """What came of a run, apart from seconds of waiting and what only a folder has."""
    calls = [call.model_dump(exclude={"wall_seconds", "request", "clip"})
             for call in run.models.calls]
    return run.status, run.unverified, calls, run.result.video.frames.tobytes()


@pytest.mark.parametrize("answered", range(5))
@pytest.mark.parametrize("stop", [KeyboardInterrupt, c.Problem])
def test_an_interrupted_run_goes_on(answered, stop, tmp_path):
    """Nothing is paid for twice. Until it is over, the record has no status."""
    vgm = Painter()
    with pytest.raises(stop):
        go(*FULL[:answered], stop(), vgm=vgm, folder=tmp_path)
    assert answered == 0 or "status" not in trace(tmp_path)
    run = go(*FULL[answered:], vgm=vgm, folder=tmp_path)
    assert len(vgm.made) == 3 and outcome(run) == outcome(go(*FULL))


def test_a_finished_run_replays_without_models(tmp_path):
    """Failed calls inside it, too, to the same record."""
    script = [plan(left=2), "?", reject(), accept("partial"), plan(), accept()]
    done = go(*script, vgm=Painter(fails=[1]), folder=tmp_path)
    done.models.save(done.result)
    record = (tmp_path / "trace.json").read_bytes()
    again = go(folder=tmp_path)
    again.models.save(again.result)
    assert outcome(again) == outcome(done) and again.cost == done.cost and not again.made
    assert (tmp_path / "trace.json").read_bytes() == record


def test_what_ended_a_run_is_tried_again(tmp_path):
    """By the next start, as if it had not been."""
    with pytest.raises(c.Problem, match="no usable reply"):
        go("?", "?", "?", folder=tmp_path)
    with pytest.raises(c.Problem, match="failed twice"):
        go(plan(), vgm=Painter(fails=[0, 1]), folder=tmp_path)
    run = go(accept(), folder=tmp_path)
    assert outcome(run) == outcome(go(plan(), accept()))
    assert outcome(go(folder=tmp_path)) == outcome(run)


def test_a_folder_has_picture_record_clips_and_video(tmp_path):
    """From Python, too: the folder is the one that the command line makes."""
    run = go(*FULL, folder=tmp_path)
    run.models.facts["id"] = "sample 7"
    assert run.models.save(run.result, score=1) == tmp_path / "video.mp4"
    assert {path.name for path in tmp_path.iterdir()} == {
        "clips", "input.png", "lock", "trace.json", "video.mp4"}
    assert (c.load_image(tmp_path / "input.png") == I0).all()
    assert (tmp_path / "video.mp4").read_bytes() == c.mp4(run.result.video)
    record = trace(tmp_path)
    assert (record["status"], record["unverified_steps"]) == ("complete", [])
    assert (record["task"], record["id"], record["score"]) == ("solve the maze", "sample 7", 1)
    assert record["cost"] == run.cost and len(record["calls"]) == 8
    clips = [call["clip"] for call in record["calls"] if call["role"] == "vgm"]
    for clip, name in zip(clips, ("step1-attempt1", "step1-attempt2", "step2-attempt1")):
        assert name in clip and (tmp_path / clip).exists()


def test_a_reply_reaches_the_generator_unchanged(tmp_path, monkeypatch):
    """Whatever stands in the environment, be it the key."""
    for name in ("MONKEY_NAME", "OPENAI_API_KEY", "API_TOKEN"):
        monkeypatch.setenv(name, "vertical")
    run = go(plan("move the vertical bar"), accept(), folder=tmp_path)
    assert run.made[0].prompt == "move the vertical bar"
    assert trace(tmp_path)["calls"][1]["prompt"] == "move the vertical bar"


@dataclass
class Shade:
    """A generator of one's own."""

    shade: int = 40  # grey levels from clip to clip

    def __call__(self, frame, prompt, seconds, seed):
        return painted(frame, seconds, self.shade * (seed + 1))


MINE = """
import test_collabvr
def vgm(frame, prompt, seconds, seed):
    return test_collabvr.painted(frame, seconds, 10)
"""
REFUSED = "another picture, task, setting or model: choose another --out"


def test_an_edited_model_is_another_one(tmp_path):
    """A function is known by its source file."""
    def shown(source, *replies):
        (tmp_path / "mine.py").write_text(source)
        vgm = runpy.run_path(str(tmp_path / "mine.py"))["vgm"]
        return go(*replies, vgm=vgm, folder=tmp_path / "run").shown()

    assert shown(MINE, plan(), accept()) == [10]
    assert shown(MINE) == [10]
    with pytest.raises(c.Problem, match=REFUSED):
        shown(MINE.replace("10", "200"))


def test_a_model_that_nothing_tells_apart_is_refused(tmp_path):
    """In the next process it would be another one, and all clips would be paid for again."""
    closure = itertools.count()
    for model in (Shade(10).__call__, lambda *_: next(closure)):
        with pytest.raises(c.Problem, match="cannot be told from others.*`identity`"):
            go(plan(), vgm=model, folder=tmp_path)


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"calls": [{"role": 5}]}', b"\xff"])
def test_a_damaged_record_gets_a_sentence(record, tmp_path):
    """And stays as it is."""
    (tmp_path / "trace.json").write_bytes(record)
    with pytest.raises(c.Problem, match="cannot be used as a run folder: choose another"):
        go(plan(), folder=tmp_path)
    assert (tmp_path / "trace.json").read_bytes() == record


def test_two_processes_on_one_folder_are_refused(tmp_path):
    """The second one, in a sentence; the first goes on."""
    in_use = pytest.raises(c.Problem, match="in use by another run")
    with filelock.FileLock(tmp_path / "lock"), in_use:
        go(plan(), folder=tmp_path)
    assert go(plan(), accept(), folder=tmp_path).status == "complete"


# ------------------------------------------------------------------------------
# Pictures and videos


@pytest.mark.parametrize("T, fps, rate, chosen", [
    (97, 16, 1, [0, 16, 32, 48, 64, 80, 96]), (49, 16, 1, [0, 16, 32, 48]),
    (17, 8, 8, list(range(17))), (2, 16, 1, [0, 1]), (50, 16, 1, [0, 16, 33, 49])])
def test_sampled_frames_are_evenly_spread(T, fps, rate, chosen):
    """A.1: one a second, the first and the last among them: 7 of 6 s, 4 of 3 s. [D10]"""
    assert c.sample(c.Clip(np.zeros((T, 1, 1, 3), np.uint8), fps), rate) == chosen


def test_joining_drops_the_repeated_frame():
    """And the seconds add up. [D8]"""
    one, two = (c.Clip(np.zeros((T, 2, 2, 3), np.uint8), 16) for T in (97, 49))
    both = c.concat([one, two])
    assert len(both.frames) == 145 and both.seconds == 6 + 3


@pytest.mark.parametrize("size, multiple, fitted", [
    ((832, 480), 16, (832, 480)), ((1920, 1080), 16, (832, 464)), ((96, 96), 16, (96, 96)),
    ((100, 90), 16, (96, 80)), ((20, 20), 32, (32, 32))])
def test_pictures_shrink_to_the_area(size, multiple, fitted):
    """A.1: at most 832x480 pixels in all, the shape kept, never enlarged."""
    assert c.fit(*size, multiple) == fitted


def noise(*shape):
    return c.Clip(np.random.default_rng(0).integers(0, 256, shape, np.uint8), 8)


def test_videos_are_exact_and_repeatable():
    """FFV1 gives the same frames, also of odd sides. The same frames give the same MP4."""
    clip = noise(9, 33, 47, 3)
    assert (iio.imread(c.lossless(clip), plugin="pyav") == clip.frames).all()
    large = c.Clip(clip.frames.repeat(4, 1).repeat(4, 2), 8)
    assert len({c.mp4(large) for _ in range(5)}) == 1


@pytest.mark.parametrize("size, written", [((33, 47), (34, 48)), ((96, 96), (96, 96))])
def test_a_video_plays_anywhere(size, written):
    """H.264 of even sides in yuv420p, at the clip's rate, and with names for its colours."""
    with av.open(io.BytesIO(c.mp4(noise(5, *size, 3)))) as file:
        stream = file.streams.video[0]
        made = stream.codec_context
        assert (made.name, made.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        assert (made.height, made.width) == written and len(list(file.decode(stream))) == 5
        # smpte170m, bt709, sRGB, limited: players guess what is not named
        names = made.colorspace, made.color_primaries, made.color_trc, made.color_range
        assert names == (6, 1, 13, 1)


def saved(path, picture, **options):
    picture.save(path, **options)
    return c.load_image(path)


def test_pictures_become_rgb(tmp_path):
    """Upright, transparency on white; palettes, CMYK and grey."""
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))
    assert (saved(tmp_path / "clear.png", clear) == 255).all()
    palette = Image.new("P", (20, 20))
    palette.putpalette([10, 20, 30])
    assert (saved(tmp_path / "palette.png", palette) == (10, 20, 30)).all()
    assert (saved(tmp_path / "grey.png", Image.new("LA", (20, 20), (7, 255))) == 7).all()
    assert saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (20, 30))).shape == (30, 20, 3)
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned
    turned = saved(tmp_path / "turned.jpg", Image.new("RGB", (20, 30)), exif=exif)
    assert turned.shape == (20, 30, 3)


def test_what_is_no_picture_is_told_so(tmp_path):
    """In a sentence with the file's name."""
    def refused(name, told):
        with pytest.raises(c.Problem, match=f"{name}.*{told}"):
            c.load_image(tmp_path / name)

    whole = Image.fromarray(noise(1, 99, 99, 3).frames[0])
    whole.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder").mkdir()
    for name in ("cut.png", "text.png", "nowhere.png", "folder"):
        refused(name, "cannot be read as a picture")
    whole.save(tmp_path / "script.png", "EPS")
    refused("script.png", "cannot be read as a picture")  # Pillow would start Ghostscript
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "deep.png")
    refused("deep.png", "8 bits")
    for size in ((8193, 20), (8000, 8000), (15, 100)):
        Image.new("1", size).save(tmp_path / "size.png")
        refused("size.png", "pixels")


# ------------------------------------------------------------------------------
# The endpoint: real HTTP


class Endpoint:
    """An OpenAI-compatible server on a free port. It answers what it is told to, in turn."""

    def __init__(self):
        self.answers = []  # a reply, or (status, body) or (status, body, headers)
        self.requests = []  # (headers, body)
        endpoint = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.requests.append((self.headers, json.loads(body)))
                answer = endpoint.answers.pop(0)
                self.send(*(answer if isinstance(answer, tuple) else chat(answer)))

            def do_GET(self):
                self.send(200, {"object": "list", "data": [{"id": "one"}, {"id": "two"}]})

            def send(self, status, body, headers=()):
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def talk(self, *answers, **settings):
        """A run whose VLM is this endpoint, with these answers."""
        self.answers = list(answers)
        return go(vlm=c.OpenAIVLM(**{"vlm": "test", "vlm_url": self.url, **settings}))

    def content(self, number):
        """What request `number` shows to the VLM."""
        return self.requests[number][1]["messages"][1]["content"]


def chat(reply, finish="stop", message=(), choice=(), **others):
    """The status and body of a chat completion, with what differs from the usual."""
    text = reply if isinstance(reply, str) else json.dumps(reply)
    message = {"role": "assistant", "content": text, **dict(message)}
    choice = {"index": 0, "finish_reason": finish, "message": message, **dict(choice)}
    usage = {"prompt_tokens": 9000, "completion_tokens": 5, "total_tokens": 9800}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "test-2026",
            "choices": [choice], "usage": usage}
    return 200, {**body, **others}


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    made = Endpoint()
    threading.Thread(target=made.server.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """How long collabvr.py and the client waited. The clock goes by that, and nobody waits."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(
        c, "time", SimpleNamespace(sleep=waits.append, monotonic=lambda: sum(waits)))
    return waits


def test_a_request_has_prompt_pictures_and_schema(endpoint):
    """App. A.1: temperature 0.2; one frame a second with its time; the schema, strict."""
    assert endpoint.talk(plan(), accept()).status == "complete"
    headers, body = endpoint.requests[1]
    assert headers["Authorization"] == "Bearer sk-secret-123"
    assert body["model"] == "test" and body["temperature"] == 0.2
    assert body["messages"][0] == {"role": "system", "content": c.VERIFIER}
    form = body["response_format"]["json_schema"]
    assert form["name"] == "Verification" and form["strict"] is True
    assert form["schema"] == c.Verification.model_json_schema()
    content = endpoint.content(1)
    pictures = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    assert len(pictures) == 1 + 3 and content[-2]["text"] == "Frame at 2.00 s:"
    head, data = pictures[0].split(",")
    assert head == "data:image/jpeg;base64"
    assert iio.imread(base64.b64decode(data)).shape == I0.shape


@pytest.mark.parametrize("kind", ["video_url", "image_url"])
def test_a_clip_may_go_as_raw_video(kind, endpoint):
    """An MP4, in a part of the type that is set. [D10]"""
    endpoint.talk(plan(), accept(), video_input=kind)
    part = endpoint.content(1)[-1]
    head, data = part[kind]["url"].split(",")
    assert part["type"] == kind and head == "data:video/mp4;base64"
    assert len(iio.imread(base64.b64decode(data), plugin="pyav")) == 9


def test_extra_fields_go_into_each_request(endpoint):
    """And a temperature of None goes into none."""
    endpoint.talk(plan(), accept(), temperature=None, request_extra='{"top_k": 5}')
    for _, body in endpoint.requests:
        assert "temperature" not in body and body["top_k"] == 5


def test_large_pictures_are_sent_smaller():
    """At most 1024 pixels a side."""
    assert iio.imread(c.jpeg(np.zeros((500, 4096, 3), np.uint8))).shape == (125, 1024, 3)


BUSY = {"error": {"message": "overloaded"}}
ODD = {  # an answer, and the fault
    "no choices": (chat(ACCEPT, choices=[]), "no chat completion"),
    "null choices": (chat(ACCEPT, choices=None), "no chat completion"),
    "a null message": (chat(ACCEPT, choice={"message": None}), "no chat completion"),
    "usage of another type": (chat(ACCEPT, usage=[1]), "no chat completion"),
    "content of another type": (chat("", message={"content": 5}), "no chat completion"),
    "a list": ((200, [accept()]), "no chat completion"),
    "the reply alone": ((200, accept()), "no chat completion"),
    "an error": ((200, BUSY), "overloaded"),
    "an error in the choice": (chat(ACCEPT, choice=BUSY), "endpoint's error: overloaded"),
    "a refusal": (chat(ACCEPT, message={"refusal": "I cannot"}), "refused: I cannot"),
    "a thought only": (chat("", message={"reasoning": ACCEPT}), "the content is empty"),
    "null content": (chat("", message={"content": None}), "the content is empty"),
    "cut off": (chat(ACCEPT, finish="MAX_TOKENS"), "finish_reason max_tokens"),
    "filtered": (chat(ACCEPT, finish="content_filter"), "finish_reason content_filter"),
    "a call of a tool": (chat(ACCEPT, finish="tool_calls"), "finish_reason tool_calls"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_answer_is_asked_for_again(name, endpoint, caplog):
    """It is an unusable reply, even if its text parses: never an accept, never a traceback."""
    answer, fault = ODD[name]
    run = endpoint.talk(plan(), answer, reject(), accept())
    assert run.roles() == "pvvv" and fault in run.models.calls[2].fault
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos", "end_turn", "", None])
def test_a_reply_that_stopped_by_itself_counts(reason, endpoint):
    """Endpoints have words of their own."""
    assert endpoint.talk(chat(plan(), finish=reason), chat(ACCEPT, finish=reason)).roles() == "pv"


@pytest.mark.parametrize("usage, tokens_in, tokens_out", [
    ({"prompt_tokens": 9000, "completion_tokens": 5, "total_tokens": 9800}, 9000, 800),
    ({"prompt_tokens": 9000, "completion_tokens": 5}, 9000, 5), (None, 0, 0), ({}, 0, 0)])
def test_thoughts_count_as_tokens(usage, tokens_in, tokens_out, endpoint):
    """They are billed, though not every endpoint counts them as completion."""
    cost = endpoint.talk(plan(), chat(ACCEPT, usage=usage)).cost
    assert cost["tokens_in"]["verifier"] == tokens_in
    assert cost["tokens_out"]["verifier"] == tokens_out


def test_another_model_that_answers_is_told_once(endpoint, caplog):
    """However many calls; a version of the same model is no other."""
    endpoint.talk(plan(), accept())
    assert "answered" not in caplog.text
    run = endpoint.talk(chat(plan(), model="cheap-1"), *[chat("?", model="cheap-1")] * 2,
                        chat(accept(), model="cheap-1"))
    assert caplog.text.count("test was asked, but cheap-1 answered") == 1
    assert {call.model for call in run.models.calls} == {None, "cheap-1"}


@pytest.mark.parametrize("body, headers, seconds", [
    ({"error": {"details": [{"retryDelay": "7.5s"}]}}, {}, 7.5),  # Google
    ({"error": {}}, {"Retry-After": "3"}, 3),
    ({"error": {}}, {"Retry-After": "Wed, 02 Dec 2026 07:28:00 GMT"}, 20),
    ({"error": {}}, {}, 20)])
def test_a_429_is_waited_for_as_it_says(body, headers, seconds, endpoint, waits, caplog):
    """In the body, in a header, or nowhere. The log tells it."""
    caplog.set_level("INFO", "collabvr")
    run = endpoint.talk((429, body, headers), plan(), accept())
    assert run.roles() == "pv" and waits == [seconds] and len(endpoint.requests) == 3
    assert f"wants fewer requests: waiting {seconds:.0f} s" in caplog.text


@pytest.mark.parametrize("seconds, waited", [(3600, []), (60, [60] * 10)])
def test_a_429_is_waited_for_ten_minutes(seconds, waited, endpoint, waits):
    """In all. One that says longer is not waited for."""
    spent = 429, [{"error": {"message": "spent", "details": [{"retryDelay": f"{seconds}s"}]}}]
    with pytest.raises(c.Problem, match="429: spent"):
        endpoint.talk(*[spent] * 20)
    assert waits == waited and len(endpoint.requests) == len(waited) + 1


def test_a_busy_endpoint_is_tried_again(endpoint, waits):
    """By the client itself; the calls count once."""
    run = endpoint.talk((503, {}), plan(), (500, {}), accept())
    assert run.cost["calls"] == {"planner": 1, "vgm": 1, "verifier": 1} and len(waits) == 2


@pytest.mark.parametrize("status, message, hint", [
    (400, "no temperature, please", "--temperature None"), (401, "the key *** is bad", ""),
    (404, "no such model", "its models: one, two")])
def test_a_refusal_is_told_as_its_message(status, message, hint, endpoint):
    """With the URL, what to try, and without the key. Google's bodies are lists."""
    error = {"error": {"code": 5, "message": message.replace("***", "sk-secret-123")}}
    for body in (error, [error]):
        with pytest.raises(c.Problem, match=f"{status}: {re.escape(message)}") as told:
            endpoint.talk((status, body))
        told = str(told.value)
        assert endpoint.url in told and hint in told and "{" not in told


def test_a_redirect_is_not_followed(endpoint):
    """The pictures would go to a host that nobody named."""
    away = {"Location": f"{endpoint.url}/elsewhere"}
    with pytest.raises(c.Problem, match="307"):
        endpoint.talk((307, {}, away), plan())
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("name, value, told", [
    ("ALL_PROXY", "socks9://localhost:1", "see ALL_PROXY"),
    ("SSL_CERT_FILE", "/nowhere.pem", "and SSL_CERT_FILE"),
    ("OPENAI_API_KEY", "schl\u00fcssel", "a character that no key has")])
def test_a_variable_that_breaks_the_client_is_named(name, value, told, monkeypatch):
    """Before anything is paid for."""
    monkeypatch.setenv(name, value)
    with pytest.raises(c.Problem, match=told):
        c.OpenAIVLM(vlm_url="https://example.org/v1").check()


def test_googles_key_goes_to_googles_host_only(monkeypatch):
    """Any other host gets OPENAI_API_KEY, or none. Blanks around a key are no part of it."""
    monkeypatch.setenv("GEMINI_API_KEY", "g")
    monkeypatch.setenv("OPENAI_API_KEY", " o\n")
    elsewhere = "http://example.org:80/generativelanguage.googleapis.com"
    assert c.OpenAIVLM().key == "g" and c.OpenAIVLM(vlm_url=elsewhere).key == "o"
    alike = "https://generativelanguage.googleapis.com.example.org"
    assert c.OpenAIVLM(vlm_url=alike).key == "o"
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.setenv("GOOGLE_API_KEY", "g2")
    assert c.OpenAIVLM().key == "g2"


# ------------------------------------------------------------------------------
# The command line


@dataclass
class Reader:
    """A VLM of one's own."""

    patience: int = 1  # steps that it plans

    def __call__(self, instructions, parts, schema):
        return json.dumps(accept() if schema is c.Verification else plan(left=self.patience))


@pytest.fixture
def job(tmp_path, monkeypatch, capsys, caplog):
    """The options of a run. Whatever a test does with it, no file and no output has its key."""
    caplog.set_level("INFO", "collabvr")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    Image.fromarray(I0).save(tmp_path / "x.png")
    yield {"--image": tmp_path / "x.png", "--task": "t", "--out": tmp_path / "out"}
    seen = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    told = [record.getMessage() for record in caplog.get_records("call")]
    seen += [text.encode() for text in (*told, *capsys.readouterr())]
    assert b"sk-secret" not in b"".join(seen)


def command(job, **others):
    """The words of a command; an option that is None is left out."""
    options = {**job, **{f"--{name}".replace("_", "-"): value for name, value in others.items()}}
    given = [option for option in options.items() if option[1] is not None]
    return [str(word) for option in given for word in option]


def main(job, vgm=Shade, vlm=Reader, /, **others):
    return c.main(vgm, vlm, command(job, **others))


def asked(endpoint):
    """The options that name an endpoint."""
    return {"vlm": "test", "vlm_url": endpoint.url}


def refused(capsys, *arguments, **others):
    """What bad input is told: tyro's box or one sentence, status 2, and nothing else."""
    capsys.readouterr()
    try:
        status = main(*arguments, **others)
        out, err = capsys.readouterr()
        assert err.startswith("collabvr: ") and err.count("\n") == 1
    except SystemExit as stopped:  # tyro's box
        status = stopped.code
        out, err = capsys.readouterr()
    assert status == 2 and out == "" and "Traceback" not in err and "secret" not in err
    return " ".join(err.replace("│", " ").split())


def test_a_run_ends_in_a_video_and_its_cost(job, endpoint, capsys):
    """Status 0, and on stdout what it came to, and who answered."""
    endpoint.answers = [plan(left=2), reject(), accept("partial"), plan(), accept()]
    options = {**asked(endpoint), "seconds_first": 2, "seconds_next": 1}
    assert main(job, Shade, c.OpenAIVLM, **options) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["status"] == "complete" and told["unverified_steps"] == "[]"
    assert (told["clips"], told["steps"], told["regenerations"]) == ("3", "2", "1")
    assert told["vgm_seconds"] == "5.0" and told["answered_by"] == "['test-2026']"
    assert told["video"] == str(job["--out"] / "video.mp4")
    assert iio.imread(told["video"], plugin="pyav").shape == (13, *I0.shape)


def test_fields_of_ones_own_models_are_options(job, capsys):
    """Of both doors, with type, default and comment; those of Wan and OpenAIVLM are none."""
    with pytest.raises(SystemExit) as stopped:
        c.main(Shade, Reader, ["--help"])
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stopped.value.code == 0
    assert "--shade INT grey levels from clip to clip (default: 40)" in told
    assert "--patience INT steps that it plans (default: 1)" in told
    assert "--offload" not in told and "--vlm-url" not in told
    assert main(job, shade=7, patience=2, N_max=2, seed=1) == 0
    settings = trace(job["--out"])["settings"]
    assert (settings["shade"], settings["patience"], settings["seed"]) == (7, 2, 1)
    assert set(settings) == {"shade", "patience", "seed", *c.Config.__dataclass_fields__}


def test_importing_and_help_are_light():
    """No heavy package is imported, and help names the paper's sections."""
    heavy = ["torch", "diffusers", "transformers", "openai"]
    code = (f"import sys, collabvr\ntry: collabvr.main(argv=['--help'])\n"
            f"except SystemExit: print([name for name in {heavy} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True,
                          text=True, cwd=ROOT)
    assert done.stdout.endswith("[]\n"), done.stderr
    for word in ("--on-exhausted", "App. A.1", "--offload", "frames per second", "run folder"):
        assert word in done.stdout


def test_a_finished_run_replays_without_a_key(job, endpoint, monkeypatch):
    """And wherever the model is."""
    endpoint.answers = [plan(), accept()]
    assert main(job, Shade, c.OpenAIVLM, **asked(endpoint)) == 0
    done = trace(job["--out"])
    monkeypatch.delenv("OPENAI_API_KEY")
    assert main(job, Shade, c.OpenAIVLM, vlm="test") == 0  # at Google's URL
    again = trace(job["--out"])
    assert again["calls"] == done["calls"] and again["cost"] == done["cost"]


def test_each_command_has_a_default_folder(job, tmp_path, monkeypatch):
    """Another setting, another folder; the same command goes on in its own."""
    monkeypatch.chdir(tmp_path)
    for others in ({}, {"M": 2}, {"seed": 3}, {"shade": 8}, {"patience": 0}, {"M": 2}):
        assert main(job, out=None, **others) == 0
    names = [folder.name for folder in Path("runs").iterdir()]
    assert len(names) == 5 and all(re.fullmatch("x-[0-9a-f]{8}", name) for name in names)


@pytest.mark.parametrize("others", [
    {"task": "another"}, {"seed": 1}, {"seconds_first": 2}, {"shade": 8}, {"patience": 2}])
def test_a_folder_of_another_run_is_refused(others, job, capsys):
    """With status 2; the record stays as it is."""
    assert main(job) == 0
    done = trace(job["--out"])
    assert REFUSED in refused(capsys, job, **others)
    assert trace(job["--out"]) == done
    Image.fromarray(I0 - 1).save(job["--image"])
    assert REFUSED in refused(capsys, job)


def test_a_source_may_be_edited_during_a_run(tmp_path, monkeypatch):
    """The calls that follow are still those of the model that began."""
    file = tmp_path / "mine.py"
    file.write_text("def vgm(frame, prompt, seconds, seed): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = __import__("mine")
    began = c.identity(mine.vgm)
    file.write_text("# another line\ndef vgm(frame, prompt, seconds, seed): ...\n")
    assert c.identity(mine.vgm) == began


def test_a_shorter_run_does_not_replace_a_longer(tmp_path):
    """It is another run, although each call that it makes is recorded."""
    always = plan(), reject(), route("regen"), reject()
    run = go(*always, folder=tmp_path, N_max=1, M=1)
    video = run.models.save(run.result).read_bytes()
    models = c.RecordedModels(Painter(), Script(), tmp_path)
    config = c.Config(N_max=1, M=1, on_exhausted="best", seconds_first=2)
    with pytest.raises(c.Problem, match="another picture, task, setting"):
        models.save(c.CollabVR(models, config).run(I0, "solve the maze"))
    assert (tmp_path / "video.mp4").read_bytes() == video


@pytest.mark.parametrize("others, told", [
    ({"image": "nowhere.png"}, "nowhere.png cannot be read as a picture"),
    ({"image": __file__}, "cannot be read as a picture"),
    ({"task": "  "}, "The task is empty"),
    ({"out": __file__}, "cannot be used as a run folder"),
    ({"N_max": 0}, "N_max"), ({"N_max": 9999}, "N_max"), ({"M": "two"}, "--M"),
    ({"seconds_first": "nan"}, "seconds_first"), ({"on_exhausted": "stop"}, "--on-exhausted"),
    ({"n_max": 2}, "--n-max"), ({"shade": "dark"}, "--shade"), ({"fps": 8}, "--fps")])
def test_bad_input_is_told_so(others, told, job, capsys):
    """Status 2, and nothing is written."""
    assert told in refused(capsys, job, **others)
    assert not job["--out"].exists()


@pytest.mark.parametrize("others, told", [
    ({}, "No API key for https://generativelanguage.googleapis.com/"),
    ({"vlm_url": "localhost:8000/v1"}, "vlm_url"),
    ({"vlm_url": "ftp://example.org/v1"}, "vlm_url"),
    ({"vlm_url": "http://user:secret@example.org/v1"}, "vlm_url"),
    ({"vlm_url": "http://example.org/v1?key=secret"}, "vlm_url"),
    ({"temperature": "inf"}, "temperature"), ({"verify_fps": 0}, "verify_fps"),
    ({"video_input": "video"}, "--video-input"), ({"request_extra": "{"}, "request_extra"),
    ({"request_extra": "[]"}, "not a JSON object")])
def test_a_bad_endpoint_is_told_so(others, told, job, capsys):
    """Status 2, and nothing is written."""
    assert told in refused(capsys, job, Shade, c.OpenAIVLM, **others)
    assert not job["--out"].exists()


def test_a_model_that_cannot_work_says_so(job, capsys, endpoint):
    """Its `check` is called before anything is paid for."""
    @dataclass
    class Broken(Shade):
        def check(self):
            raise c.Problem("Its server is not there.")

    told = refused(capsys, job, Broken, c.OpenAIVLM, **asked(endpoint))
    assert "Its server is not there." in told and not endpoint.requests


def test_an_endpoint_that_is_not_there_is_told_so(job, capsys, waits):
    """With the cause of the client's error. Nothing was recorded, and nothing else is said."""
    told = refused(capsys, job, Shade, c.OpenAIVLM, vlm_url="http://127.0.0.1:9/v1")
    assert re.search("127.0.0.1:9/v1 gave no usable answer .*refused", told)
    assert "goes on" not in told


def test_an_endpoint_that_stops_ends_the_run(job, endpoint, capsys):
    """Status 1 once a model has answered; the same command goes on. The key is not shown."""
    refusal = 401, [{"error": {"message": "the key sk-secret-123 is bad"}}]
    endpoint.answers = [
        plan(), chat(accept(), choice={"error": {"message": "sk-secret-123"}}),
        chat(None, choices=["sk-secret-123"]), refusal]
    assert main(job, Shade, c.OpenAIVLM, **asked(endpoint)) == 1
    told = capsys.readouterr().err
    assert "401: the key *** is bad" in told and "the same command goes on from here" in told
    assert "status" not in trace(job["--out"])
    endpoint.answers = [accept()]
    assert main(job, Shade, c.OpenAIVLM, **asked(endpoint)) == 0
    assert trace(job["--out"])["status"] == "complete"


def test_ctrl_c_ends_with_130(job, capsys):
    """And a sentence."""
    @dataclass
    class Stopped(Shade):
        def __call__(self, *request):
            raise KeyboardInterrupt

    assert main(job, Stopped) == 130
    told = capsys.readouterr().err
    assert "Interrupted." in told and "the same command goes on from here" in told


KILLED = """
import os, signal, sys
import collabvr, test_collabvr
moments = []
def watched(function):
    def call(*arguments):
        moments.append(function)
        if len(moments) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return call
os.fsync = watched(os.fsync)
test_collabvr.painted = watched(test_collabvr.painted)
test_collabvr.accept = watched(test_collabvr.accept)
collabvr.main(test_collabvr.Shade, test_collabvr.Reader, sys.argv[2:])
"""


def test_kill_9_loses_the_call_under_way_at_most(job, tmp_path):
    """In a clip's making, between a clip and its record, and in its verification."""
    def killed(moment):
        done = subprocess.run([sys.executable, "-c", KILLED, str(moment), *command(job)],
                              check=False, capture_output=True, cwd=ROOT)
        record = trace(job["--out"])
        assert done.returncode == -signal.SIGKILL and "status" not in record
        return [call["role"] for call in record["calls"]]

    # moments: input.png is written, the trace with the plan, painted, the clip, the trace
    assert killed(3) == ["planner"]
    assert killed(3) == ["planner"]  # moments: painted, the clip is written, the trace
    assert killed(4) == ["planner", "vgm"]  # and accept
    assert main(job) == main(job, out=tmp_path / "undisturbed") == 0
    videos = [tmp_path / name / "video.mp4" for name in ("out", "undisturbed")]
    assert videos[0].read_bytes() == videos[1].read_bytes()


# ------------------------------------------------------------------------------
# The real pipeline: diffusers' WanImageToVideoPipeline with 9 MB of weights

TINY_WAN = {"vgm": str(ROOT / "examples/maze/tiny-wan"), "fps": 8, "sampling_steps": 2}
GREY = np.full((64, 80, 3), 200, np.uint8)


def test_the_papers_clips_have_97_and_49_frames():
    """A.1: 6 s and 3 s at 16 fps. Wan makes 4k + 1 frames, 5 at least. [D8]"""
    wan = c.Wan()
    assert [wan.num_frames(seconds) for seconds in (6, 3, 1.2, 0.1)] == [97, 49, 17, 5]


def test_offload_does_not_change_what_wan_is():
    """A run goes on with another setting of it."""
    assert c.Wan(offload="none").identity == c.Wan(offload="group").identity
    assert c.Wan(flow_shift=5.0).identity != c.Wan().identity != c.Wan(fps=8).identity


@pytest.mark.slow
def test_tiny_wan_is_repeatable():
    """The same clip from the same seed, bit for bit, and whichever way it is decoded."""
    wan = c.Wan(**TINY_WAN, guidance_scale=1.0)
    one, two, other = (wan(GREY, "move", 1.0, seed).frames for seed in (5, 5, 6))
    assert one.shape == (9, 64, 80, 3) and one.dtype == np.uint8
    assert (one == two).all() and (one != other).any()
    tiled = c.Wan(**TINY_WAN, guidance_scale=1.0, tile_vae=True)
    assert tiled(GREY, "move", 1.0, 5).frames.shape == one.shape


@pytest.mark.slow
def test_settings_of_wan_reach_the_pipeline():
    """Each of them makes another clip."""
    clips = [
        c.Wan(**TINY_WAN, **settings)(GREY, "move", 0.5, 0).frames.tobytes()
        for settings in ({}, {"negative_prompt": "blur"}, {"flow_shift": 9.0},
                         {"guidance_scale": 1.0}, {"max_pixels": 1024})]
    assert len({*clips}) == 5


@pytest.mark.slow
def test_a_prompt_beyond_the_encoders_limit_is_told(caplog):
    """With both numbers: corrections stand at its end, and would be cut without a word."""
    wan = c.Wan(**TINY_WAN, guidance_scale=1.0)
    wan(GREY, "move " * 20, 0.5, 0)
    assert "tokens" not in caplog.text
    wan(GREY, "move " * 200, 0.5, 0)
    told = re.search(r"the prompt has (\d+) tokens, but only (\d+) are read", caplog.text)
    assert int(told[1]) > int(told[2]) == wan.pipe.tokenizer.model_max_length


@pytest.mark.slow
def test_what_goes_wrong_in_wan_is_a_failure(monkeypatch):
    """Frames that are not finite, and too little memory, with what to try."""
    import torch

    wan = c.Wan(**TINY_WAN, guidance_scale=1.0)
    torch.nn.init.constant_(wan.pipe.vae.decoder.conv_out.weight, math.nan)
    with pytest.raises(c.Problem, match="failed twice in a row .*not finite"):
        go(plan(), vgm=wan)

    def full(*arguments, **others):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(wan.pipe.vae, "decode", full)
    with pytest.raises(c.Problem, match="try --offload model, or group: CUDA out of memory"):
        go(plan(), vgm=wan)


@pytest.mark.slow
def test_offload_places_the_weights(monkeypatch):
    """All on the GPU, a part at a time, or a layer at a time."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = []
    pipe = SimpleNamespace(
        to=done.append, enable_model_cpu_offload=lambda: done.append("model"),
        enable_group_offload=lambda device, offload_type, **_: done.append(offload_type))
    for offload in ("none", "model", "group"):
        c.Wan(offload=offload).place(pipe)
    assert done == ["cuda", "model", "leaf_level"]


@pytest.mark.slow
def test_a_wrong_checkpoint_is_told_so(job, capsys, monkeypatch, tmp_path):
    """Before any model is called; without a GPU, with the run that needs none."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA GPU; python -m examples.maze.run" in refused(capsys, job, c.Wan)
    assert "has no model_index.json" in refused(capsys, job, c.Wan, vgm=tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(c.Problem, match="cannot be loaded"):
        _ = c.Wan(vgm=str(tmp_path)).pipe


# ------------------------------------------------------------------------------
# What README.md and collabvr.py's docstring promise

README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCE = (ROOT / "collabvr.py").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [textwrap.dedent(block) for language, block in FENCED if language == "python"]


def test_the_readmes_python_can_be_parsed():
    """Each block of it."""
    assert PYTHON
    for block in PYTHON:
        ast.parse(block)


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    """Each block that imports what it needs, as it stands, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in PYTHON if re.search("^(from|import) ", block, re.MULTILINE)]
    for number, block in enumerate(blocks):
        path = tmp_path / f"block{number}.py"
        path.write_text(block)
        runpy.run_path(str(path))
    assert "complete" in capsys.readouterr().out and list(tmp_path.rglob("video.mp4"))


def test_the_readmes_algorithm_is_the_files():
    """Line for line."""
    (block,) = [block for block in PYTHON if "# line 1\n" in block]
    run = textwrap.dedent(inspect.getsource(c.CollabVR.run))
    body = textwrap.dedent(run.partition("\n")[2])
    assert block.strip() in run or block.strip() in body


def test_the_readme_says_where_to_start():
    """At the line that begins Algorithm 1."""
    (number,) = re.findall(r"[Ss]tart reading at\s+line\s+(\d+)", README)
    line = SOURCE.splitlines()[int(number) - 1]
    assert re.search("Algorithm 1|class CollabVR|def run|# (require|line 1)$", line)


def commands(text):
    """The options of each command of collabvr.py in a text."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.match(r" *(?:python|uv run) collabvr\.py (.*)", line)
        if found:
            yield shlex.split(found[1], comments=True)


def test_every_command_that_is_shown_is_one(monkeypatch, capsys):
    """In the README's fences and in the docstring."""
    def prepare(self):
        raise c.Problem("accepted")

    monkeypatch.setattr(c.Command, "prepare", prepare)
    blocks = [block for language, block in FENCED if language != "python"]
    shown = [*commands("\n".join(blocks)), *commands(c.__doc__)]
    assert len(shown) >= 3
    for argv in shown:
        assert c.main(argv=argv) == 2, argv
        assert "accepted" in capsys.readouterr().err


def test_the_script_block_has_the_files_packages():
    """Those of requirements.txt's first part, at least in these versions (PEP 723)."""
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.MULTILINE | re.DOTALL)[1]
    script = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    pinned = (ROOT / "requirements.txt").read_text().partition("# tests")[0]
    wanted = [line.replace("==", ">=") for line in pinned.splitlines() if "==" in line]
    assert script["dependencies"] == wanted
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    packages = {name.partition(">")[0] for name in wanted} | {"PIL"}
    assert imported - packages <= sys.stdlib_module_names


def test_every_departure_is_listed_and_tagged():
    """In the docstring, once, and in the code, where it happens."""
    listed = re.findall(r"^ ?\[D(\d+)\] (.*)", c.__doc__, re.MULTILINE)
    assert [int(number) for number, _ in listed] == [*range(1, len(listed) + 1)]
    tagged = {*re.findall(r"\[D(\d+)\]", SOURCE.replace(c.__doc__, ""))}
    assert tagged == {number for number, text in listed if "examples/" not in text}


def test_the_line_tags_of_algorithm_1_ascend():
    """And are all there; lines 12 and 16 to 18 only end blocks."""
    tags = [int(number) for number in re.findall(r"# line (\d+)$", SOURCE, re.MULTILINE)]
    assert tags == sorted(tags) and {*tags} == {*range(1, 12), 13, 15, 19}
