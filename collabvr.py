#!/usr/bin/env python3
"""CollabVR (arXiv 2605.08735v1): a VLM plans, checks and repairs what a video generator shows.

    python collabvr.py --image x.png --task "Move the circle to the square."    # Gemini, one GPU
    python collabvr.py --image x.png --task "..." --vlm-url http://localhost:8000/v1 --vlm NAME
    python -m examples.maze.run                                    # no GPU, no key, no network

    CollabVR(Models(vgm, vlm), Config(N_max=3, M=3)).run(I0, q)    # any two callables

Paper                                  here, from the top
Sec. 3.1  problem and symbols          Config, Clip, concat, Attempt, History, Result
Alg. 1    the loop                     CollabVR.run
Sec. 3.2  M1, progressive planning     CollabVR.plan; PLANNER, Plan
Sec. 3.3  M2, verification, evolution  CollabVR.verify, .evolve; VERIFIER, Verification
App. A.5  failure router               CollabVR.exhausted and what follows it; ROUTER, Routing
Sec. 4    cost                         Models.cost
App. A.1  settings                     the defaults of Config, OpenAIVLM and Wan

The paper's part ends with Models. Below it are the two models and the command-line tool.
[Dn] marks a departure from the paper, or where it is silent; README.md lists them all.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import io
import json
import linecache
import logging
import math
import os
import re
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar
from urllib.parse import urlsplit

import av
import filelock
import imageio.v3 as iio
import jiter
import numpy as np
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.dataclasses import dataclass as settings

log = logging.getLogger("collabvr")


class Problem(Exception):
    """What went wrong, in one sentence, and what to do about it."""


# ------------------------------------------------------------------------------
# Sec. 3.1: problem formulation


@settings(frozen=True, config={"extra": "forbid"})
class Config:
    """Settings of the method. Seconds are seconds of video."""

    N_max: Annotated[int, Field(ge=1, le=1000)] = 3  # planning steps at most (App. A.1)
    M: Annotated[int, Field(ge=1, le=1000)] = 3  # attempts per step (App. A.1)
    # after M rejections: ask the router (A.5), replan (Algorithm 1), keep the best (C.2) [D3]
    on_exhausted: Literal["route", "replan", "best"] = "route"
    seconds_first: Annotated[float, Field(gt=0, le=600)] = 6.0  # clips of step 1 (A.1, Gen-ViRe)
    seconds_next: Annotated[float, Field(gt=0, le=600)] = 3.0  # clips of later steps (A.1)

    def seconds(self, t: int) -> float:
        """The length of each attempt at step t. The paper is silent on re-generations. [D8]"""
        return self.seconds_first if t == 1 else self.seconds_next

    def worst_case(self) -> tuple[int, float, int]:
        """(clips, seconds of video, VLM calls) if every clip is rejected and no call fails."""
        one_each = self.seconds_first + (self.N_max - 1) * self.seconds_next
        clips = self.N_max * self.M
        seconds = self.M * one_each
        calls = self.N_max * (1 + self.M)  # a plan, M verifications
        if self.on_exhausted == "route":  # each step adds a regen; the last may fall back [D3]
            clips += self.N_max
            seconds += one_each + max(0, self.seconds_first - self.seconds(self.N_max))
            calls += self.N_max * 2  # a routing, a verification
        return clips, seconds, calls


@dataclass(frozen=True, eq=False)
class Clip:
    """A video: uint8 RGB frames (T, H, W, 3). Frame 0 is the conditioning frame."""

    frames: np.ndarray
    fps: float

    @property
    def seconds(self) -> float:
        """Seconds of new video: frame 0 was there before."""
        return (len(self.frames) - 1) / self.fps


def concat(clips: list[Clip]) -> Clip:
    """c_1 + .. + c_t. A later clip's frame 0 repeats the frame before it and is dropped. [D8]"""
    first, *later = clips
    frames = [first.frames] + [clip.frames[1:] for clip in later]
    return Clip(np.concatenate(frames), first.fps)


@dataclass(frozen=True)
class Attempt:
    """One clip c_t of step t, the prompt a_t that made it, and the verifier's diagnosis d."""

    t: int
    a_t: str
    c_t: Clip
    d: Any = None  # a Verification; None: not verified

    @property
    def accepted(self) -> bool:
        return self.d is not None and self.d.verdict == "accept"

    @property
    def good_seconds(self) -> float:
        """Seconds from the clip's start that were right, of a verified attempt."""
        return self.d.good_fraction * self.c_t.seconds


@dataclass
class History:
    """H: what joined the video, what was rejected since, and each step's outcome in words."""

    joined: list[Attempt] = field(default_factory=list)
    rejected: list[Attempt] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    @property
    def clips(self) -> list[Clip]:
        return [attempt.c_t for attempt in self.joined]

    @property
    def unverified(self) -> list[int]:
        """The steps whose clip joined without an accept."""
        return [attempt.t for attempt in self.joined if not attempt.accepted]

    def join(self, attempt: Attempt) -> None:
        if attempt.d is None:
            outcome = "not verified"
        elif attempt.accepted:
            outcome = f"accepted, progress {attempt.d.progress}"
        else:
            outcome = f"rejected, kept as the best one: {attempt.d.reason}"
        self.joined.append(attempt)
        self.rejected.clear()
        self.outcomes.append(f"Step {attempt.t}: {attempt.a_t} Outcome: {outcome}")

    def best(self, t: int | None = None) -> Attempt:
        """The rejected attempt (of step t) with most good seconds, the latest of equals. [D3]"""
        candidates = [attempt for attempt in self.rejected if t is None or attempt.t == t]
        # max takes the first of equals: of the reversed list, the latest
        return max(reversed(candidates), key=lambda attempt: attempt.good_seconds)

    def told(self) -> list:
        """What the VLM is told of H: all outcomes, and the newest eight last frames.

        The paper shows it frames of H. How many is not said, and requests have limits. [D7]
        """
        parts: list = ["Steps so far:"] + (self.outcomes or ["none"])
        for attempt in self.joined[-8:]:
            parts.append(f"Last frame of step {attempt.t}:")
            parts.append(attempt.c_t.frames[-1])
        return parts


@dataclass(frozen=True)
class Result:
    """The video V, and how it came about."""

    video: Clip
    status: str  # complete, step_cap, fallback or best_attempt; README.md says what each means
    unverified_steps: list[int]  # steps whose clip is in the video without an accept


# ------------------------------------------------------------------------------
# Algorithm 1


@dataclass
class CollabVR:
    """The loop. H and f are all that changes while it runs; they are local to `run`."""

    models: Models
    config: Config = field(default_factory=Config)

    def run(self, I0: np.ndarray, q: str) -> Result:
        """Algorithm 1. I0: uint8 RGB (height, width, 3); q: the task prompt. Raises Problem.

        [D1] The paper does not say how a run ends when nothing is left to do. Its counts of calls
        leave no room for a question of its own, so the next plan may say so.
        [D4] Line 19 would return no video if nothing had joined H.
        """
        I0 = self.models.begin(I0, q)                                           # require
        N_max, M = self.config.N_max, self.config.M                             # require
        H, f = History(), I0                                                    # line 1
        for t in range(1, N_max + 1):                                           # line 2
            a_t, p = self.plan(I0, q, H, t)                                     # line 3
            if p.task_complete:                                                 # [D1]
                return Result(concat(H.clips), "complete", H.unverified)
            for j in range(1, M + 1):                                           # line 4
                c_t = self.g(f, a_t, t, j)                                      # line 5
                v, d = self.verify(I0, q, H, c_t, a_t, p, t)                    # line 6
                if v == "accept":                                               # line 7
                    H.join(Attempt(t, a_t, c_t, d))                             # line 8
                    f = c_t.frames[-1]                                          # line 9
                    if self.is_complete(p, d):                                  # line 10
                        return Result(concat(H.clips), "complete", H.unverified)  # line 11
                    break                                                       # line 13
                H.rejected.append(Attempt(t, a_t, c_t, d))                      # [D3]
                a_t = self.evolve(a_t, d)                                       # line 15
            else:  # no attempt was accepted                                    # [D3]
                H, f, status = self.exhausted(I0, q, H, f, p, t)
                if status:
                    return Result(concat(H.clips), status, H.unverified)
        if not H.joined:                                                        # [D4]
            best = H.best()
            return Result(best.c_t, "best_attempt", [best.t])
        return Result(concat(H.clips), "step_cap", H.unverified)                # line 19

    def plan(self, I0, q: str, H: History, t: int) -> tuple[str, Plan]:
        """Line 3: a_t = π_plan(I0, q, H), and the plan p that a_t is part of.

        It is told the cap and the clip's length: it cannot keep to what it does not know. [D7]
        """
        N_max = self.config.N_max
        last = " (the last allowed step)" if t == N_max else ""
        current = "the last of these" if H.joined else "the input image"
        parts = [
            f"Task prompt: {q}", "Input image:", I0,
            *H.told(),
            f"Current frame: {current}",
            f"Step: {t} of at most {N_max}{last}",
            f"Clip length: {self.config.seconds(t):g} s",
        ]
        schema = Plan if H.joined else FirstPlan
        p = self.models.ask("planner", PLANNER, parts, schema, t)
        return p.instruction, p

    def g(self, f, a_t: str, t: int, j: int) -> Clip:
        """Line 5: c_t = g(f, a_t)."""
        return self.models.generate(f, a_t, self.config.seconds(t), t, j)

    def verify(self, I0, q: str, H: History, c_t: Clip, a_t: str, p: Plan, t: int):
        """Line 6: (v, d) = π_verify(I0, q, H, c_t).

        It judges a_t as it stands, evolved, because that is what the clip followed (Fig. 10). The
        target state is the plan's, and stays. [D11]
        """
        parts = [
            f"Task prompt: {q}", "Input image:", I0,
            *H.told(),
            f"Planned action: {a_t}",
            f"Target state: {p.target_state}",
            "Clip to check:", c_t,
        ]
        d = self.models.ask("verifier", VERIFIER, parts, Verification, t)
        return d.verdict, d

    def is_complete(self, p: Plan, d: Verification) -> bool:
        """Line 10: the plan called step t its last one, and the clip shows it done.

        Only the plan knows which step is the last, only the verifier whether it worked. [D2]
        """
        return p.estimated_steps_remaining <= 1 and d.progress == "complete"

    def evolve(self, a_t: str, d: Verification | Routing) -> str:
        """Line 15: a_t = evolve(a_t, d). An unchanged prompt would repeat its mistake. [D5]"""
        return f"{a_t} Correction: {advice(d)}"

    # After M rejections of a step: App. A.5, Algorithm 1 or C.2. [D3]
    # Each method below that ends a step returns H, f, and a status if the run ends here.

    def exhausted(self, I0, q: str, H: History, f, p: Plan, t: int):
        """Go on as `on_exhausted` says; with "route", as the router says."""
        if self.config.on_exhausted == "best":
            return self.keep_best(H, t)
        if self.config.on_exhausted == "replan":
            return self.replan(H, f, t)
        r = self.route(I0, q, H, t)
        hint = r
        if not r.suggestion.strip():  # then the verifier's suggestion counts
            hint = H.best(t).d
        if r.action == "regen":
            return self.regen(I0, q, H, p, t, hint)
        if r.action == "fallback":
            return self.fallback(I0, q, t, hint)
        steps = r.estimated_steps or "not said"
        return self.replan(H, f, t, f" Advice: {advice(hint)} Steps needed: {steps}.")  # split

    def route(self, I0, q: str, H: History, t: int) -> Routing:
        """App. A.5: the VLM sees the best failed clip: regen, split or fallback?

        The paper does not say which of the M clips it sees. [D13]
        """
        best = H.best(t)
        is_last = t == self.config.N_max
        allowed = "regen, fallback" if is_last else "regen, split, fallback"
        parts = [
            f"Task prompt: {q}", "Input image:", I0,
            *H.told(),
            f"Planned action: {best.a_t}",
            "Failed clip:", best.c_t,
            f"Reason: {best.d.reason}",
            f"Suggestion: {best.d.suggestion}",
            f"Good fraction: {best.d.good_fraction:.2f}",
            f"Allowed actions: {allowed}",
        ]
        schema = LastRouting if is_last else Routing
        return self.models.ask("router", ROUTER, parts, schema, t)

    def regen(self, I0, q: str, H: History, p: Plan, t: int, hint):
        """The good part of the best clip stays; the rest is generated once more (D.5, Fig. 21).

        The joined clip is longer than the step's others [D8], and is verified as one.
        """
        best = H.best(t)
        frames = best.c_t.frames
        k = math.floor(best.d.good_fraction * (len(frames) - 1) + 1e-6)  # the last good frame
        a_t = self.evolve(best.a_t, hint)
        rest = self.g(frames[k], a_t, t, self.config.M + 1)
        c_t = concat([Clip(frames[: k + 1], best.c_t.fps), rest])
        v, d = self.verify(I0, q, H, c_t, a_t, p, t)
        repaired = Attempt(t, a_t, c_t, d)
        if v != "accept":
            H.rejected.append(repaired)
            return self.keep_best(H, t)
        H.join(repaired)
        status = None
        if self.is_complete(p, d):
            status = "complete"
        return H, c_t.frames[-1], status

    def replan(self, H: History, f, t: int, split: str = ""):
        """Algorithm 1: nothing joins, the next plan is told why. A split adds the advice (A.5)."""
        best = H.best(t)
        rejected = f"rejected, nothing was kept: {best.d.reason}"
        H.outcomes.append(f"Step {t}: {best.a_t} Outcome: {rejected}{split}")
        H.rejected = [H.best()]  # only the best of all may still be returned [D4]
        return H, f, None

    def fallback(self, I0, q: str, t: int, hint):
        """App. A.5: one clip for the whole task, from I0, is the video. It is not verified."""
        a_t = self.evolve(q, hint)
        c_t = self.models.generate(I0, a_t, self.config.seconds_first, t)
        return History([Attempt(t, a_t, c_t)]), I0, "fallback"

    def keep_best(self, H: History, t: int):
        """C.2: the best attempt of step t joins although it was rejected."""
        best = H.best(t)
        H.join(best)
        return H, best.c_t.frames[-1], None


def advice(d: Verification | Routing) -> str:
    """What a diagnosis says to do: its suggestion or, without one, its reason. [D5]"""
    return d.suggestion.strip() or d.reason.strip()


# ------------------------------------------------------------------------------
# App. A.2 and A.5: what the three roles are told, and what they reply
#
# In every reply the reasons come before the verdict: a verdict that is written first is not based
# on them. [D12]


def a_word(value):
    return value.strip().lower() if isinstance(value, str) else value


Word = BeforeValidator(a_word)  # of fields of one word: upper case and blanks are ignored


class Reply(BaseModel, extra="forbid", allow_inf_nan=False):
    """A role's reply. Small faults are forgiven where no reject could become an accept. [D9]"""

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, reply: dict) -> dict:
        """What may be missing: confidence is not used, and steps are for a split only."""
        for name, value in {"suggestion": "", "confidence": "", "estimated_steps": 0}.items():
            if name in cls.model_fields and reply.get(name) is None:
                reply = {**reply, name: value}
        return reply


PLANNER = """\
You plan for an image-to-video generator that works on a visual task in short clips, each of which
starts from the last frame of the one before. You get the task prompt, the input image and what has
really happened so far, and you plan the next action only.

- Look first: observation says what the current frame shows, not what was meant to happen.
- remaining_goal is what of the task is still to be done. If a clip was kept and nothing is left to
  do, set task_complete to true and leave instruction and target_state empty.
- Otherwise instruction is one visible action that one clip of the given length can show: what moves
  or changes, in which way and direction, how far, and where to. No second action, no outlook.
  target_state is exact: what the last frame must show if the action went right.
- estimated_steps_remaining counts the steps from here, this one included: it is 1 on the last.
- After a rejected step plan another way. On the last allowed step the action must finish it all.
Reply with one JSON object with the fields observation, remaining_goal, task_complete, instruction,
target_state, estimated_steps_remaining.
"""


class Plan(Reply):
    observation: str
    remaining_goal: str
    task_complete: bool
    instruction: str
    target_state: str
    estimated_steps_remaining: int = Field(ge=0)

    @model_validator(mode="after")
    def has_an_action(self):
        acts = self.instruction.strip() and self.target_state.strip()
        if not self.task_complete and not acts:
            raise ValueError("an incomplete task needs an instruction and a target_state")
        return self


class FirstPlan(Plan):  # while H is empty [D1]
    @model_validator(mode="after")
    def is_not_complete(self):
        if self.task_complete:
            raise ValueError("task_complete must be false: no clip was kept yet")
        return self


VERIFIER = """\
You check one clip that an image-to-video generator made for one planned action of a longer task.
You get the task prompt, the input image, what came of the steps before, the action with its target
state, and the clip. If a correction at the action's end contradicts the rest, the correction holds.

- Judge the planned action only: does the right thing start to move or change, in the right way and
  direction, and does the clip end in agreement with the plan, even if short of the target state?
- Reject only for a fundamental error: wrong direction, object or action, or a scene that collapses
  or becomes another one. Partial progress, small artefacts and an unfinished task are no reasons.
- action_executed says whether the action happens, be it in part. progress is none, partial, or
  complete if the target state is reached. An accept needs both the action and some progress.
- good_fraction is the part of the clip, from its start, in which nothing is wrong yet: 0 to 1.
- When you reject, suggestion is one sentence for the generator: what to show instead.
Reply with one JSON object with the fields reason, action_executed, progress, good_fraction,
suggestion, confidence (low, medium or high), verdict (accept or reject).
"""

ANY_CONFIDENCE = WithJsonSchema({"type": "string", "enum": ["low", "medium", "high"]})


class Verification(Reply):
    reason: str
    action_executed: bool
    progress: Annotated[Literal["none", "partial", "complete"], Word]
    good_fraction: float = Field(ge=0, le=1)
    suggestion: str
    confidence: Annotated[Any, ANY_CONFIDENCE]
    verdict: Annotated[Literal["accept", "reject"], Word]

    @model_validator(mode="before")
    @classmethod
    def accepts_whole(cls, reply: dict) -> dict:
        """A.2 has a good fraction beside a reject only; an accepted clip is all good. [D9]"""
        if a_word(reply.get("verdict")) == "accept" and reply.get("good_fraction") is None:
            reply = {**reply, "good_fraction": 1.0}
        return reply

    @model_validator(mode="after")
    def does_not_contradict_itself(self):
        if self.verdict == "accept" and (not self.action_executed or self.progress == "none"):
            raise ValueError("an accept needs action_executed true and progress not none")
        if self.verdict == "reject" and not advice(self):
            raise ValueError("a reject needs a reason")
        return self


ROUTER = """\
All attempts at one step of a video generation task were rejected. You decide how to go on. You get
the task prompt, the input image, what came of the steps before, the planned action, the best of the
failed clips, and of it reason, suggestion and good fraction (how much was right before the error).

- regen: an execution slip in one coherent change, with a moderate or high good fraction. The good
  part is kept and the rest is generated once more, with your suggestion.
- split: the step is too much for one clip, it needs states in between, or the good fraction is very
  low. The planner goes on in smaller steps; estimated_steps says in how many (otherwise 0).
- fallback: it is the splitting that spoils the clips, at the seams between steps, and what is left
  is simple enough for one clip. The whole task is generated in a single clip.

Choose among the allowed actions only. suggestion is one sentence for the generator or the planner.
Reply with one JSON object with the fields reason, action, suggestion, estimated_steps.
"""


class Routing(Reply):
    reason: str
    action: Annotated[Literal["regen", "split", "fallback"], Word]
    suggestion: str
    estimated_steps: int = Field(ge=0)


class LastRouting(Routing):  # at t = N_max no step is left to take up a split
    action: Annotated[Literal["regen", "fallback"], Word]


# ------------------------------------------------------------------------------
# Both models behind one seam. Sec. 4: what they cost


class Call(BaseModel, allow_inf_nan=False):
    """One call of a model, as it stands in a trace and in calls.jsonl."""

    role: str  # vgm (the generator), planner, verifier, router; baselines have their own
    t: int  # step
    wall_seconds: float = 0.0  # seconds of waiting
    request: str = ""  # hash of what was asked, in a run folder
    # of the generator
    prompt: str | None = None
    seed: int | None = None
    j: int | None = None  # attempt within the step; 1 also for a fallback
    seconds: float | None = None  # of new video; None: the generation failed
    size: tuple[int, int, Annotated[float, Field(gt=0)]] | None = None  # H, W, fps
    clip: str | None = None  # file in the run folder
    sha256: str | None = None  # of that file
    error: str | None = None  # why there is no clip
    # of the VLM
    text: str | None = None
    reply: dict | None = None  # the text, parsed; None: it could not be used
    fault: str | None = None  # why not
    tokens_in: int | None = None
    tokens_out: int | None = None
    model: str | None = None  # as the endpoint calls it
    host: str | None = None

    @property
    def failed(self) -> bool:
        return self.seconds is None and self.reply is None


ANSWER = ("text", "tokens_in", "tokens_out", "model", "host", "fault")  # what a VLM may return


class Models:
    """The two models of one run. Every call of them is made, checked and counted here.

    vgm(frame, prompt, seconds, seed) -> Clip
        frame: uint8 RGB (H, W, 3), which frame 0 of the clip depicts.
        seconds: length of the clip, of new video. seed: int.
    vlm(instructions, parts, schema) -> str, or dict with `text` and, where they are known,
        `tokens_in`, `tokens_out`, `model`, `host`, and `fault` if the reply was cut off.
        parts: strings, pictures (uint8 RGB) and Clips, in reading order.
        schema: the pydantic model that the reply must fit.

    Any exception but a Problem is a failed call, which is tried again. A Problem stops the run.
    """

    def __init__(self, vgm, vlm, seed: int = 0):
        self.vgm = vgm
        self.vlm = vlm
        self.seed = seed  # of the first clip
        self.calls: list[Call] = []

    def begin(self, I0, q: str) -> np.ndarray:
        """Called first by every method. Raises Problem for a bad picture, or a second run."""
        if self.calls:
            raise Problem("These models have served a run: make new ones for the next.")
        return checked_picture(I0)

    def generate(self, frame, prompt: str, seconds: float, t=1, j=1, seed=None) -> Clip:
        """A clip for attempt j of step t. Raises Problem after two failures in a row.

        A failed generation uses up no attempt: it is tried once more, with another seed. [D9]
        Each clip of a run has a seed of its own: the same prompt and seed would give the same
        rejected clip again. [D6]
        """
        frame = checked_picture(frame)
        for failures in range(2):
            if seed is None:
                number = self.seed + sum(call.role == "vgm" for call in self.calls)
            else:
                number = seed + 1000 * failures  # there are fewer candidates than 1000
            call, clip = self.call_vgm(t, j, frame, prompt, seconds, number)
            self.note(call)
            if clip is not None:
                return clip
        raise Problem(f"The generator failed twice in a row ({call.error}).")

    def ask(self, role: str, instructions: str, parts: list, schema: type[Reply], t=1) -> Any:
        """A role's reply, as `schema`. Raises Problem after three unusable ones. [D9]"""
        asked = parts
        for _ in range(3):
            call = self.call_vlm(role, t, instructions, asked, schema)
            self.note(call)
            if call.reply is not None:
                return schema.model_validate(call.reply)
            if call.text:
                asked = [
                    *parts,
                    f"Your last reply was: {call.text[:4000]}",
                    f"It could not be used: {call.fault}. Reply with the JSON object only.",
                ]
        text = f": {call.text!r:.300}" if call.text else ""
        raise Problem(f"The {role} gave no usable reply ({call.fault}){text}.")

    def call_vgm(self, t: int, j: int, frame, prompt: str, seconds: float, seed: int):
        """One call of the generator: (call, clip), or (call, None) if it failed."""
        log.info("step %d: vgm: attempt %d, seed %d: waiting", t, j, seed)
        call = Call(role="vgm", t=t, j=j, prompt=prompt, seed=seed)
        clip = None
        began = time.monotonic()
        try:
            clip = self.checked_clip(self.vgm(frame.copy(), prompt, seconds, seed), seconds)
            call.seconds = clip.seconds
            call.size = (*clip.frames.shape[1:3], clip.fps)
        except Problem:
            raise
        except Exception as error:  # whatever it is, the generation failed
            log.warning("the generation failed", exc_info=True)
            call.error = first_line(error)
        call.wall_seconds = round(time.monotonic() - began, 3)
        return call, clip

    def call_vlm(self, role: str, t: int, instructions: str, parts: list, schema) -> Call:
        """One call of the VLM. Counted before it is read: an unusable reply was paid for, too."""
        log.info("step %d: %s: waiting", t, role)
        call = Call(role=role, t=t)
        began = time.monotonic()
        try:
            answer = self.vlm(instructions, parts, schema)
            if isinstance(answer, str):
                answer = {"text": answer}
            known = {name: answer.get(name) for name in ANSWER}
            call = Call(role=role, t=t, **known)
        except Problem:
            raise
        except ValidationError as error:  # the answer has odd types
            call.fault = every_fault(error)
        except Exception as error:  # whatever it is, the call failed
            log.warning("the call of the VLM failed", exc_info=True)
            call.fault = first_line(error)
        call.wall_seconds = round(time.monotonic() - began, 3)
        if call.fault is None:
            try:
                call.reply = schema.model_validate(find_object(call.text or "")).model_dump()
            except ValueError as error:
                call.fault = every_fault(error)
        return call

    def checked_clip(self, made, seconds: float) -> Clip:
        """A copy of what the generator returned. Raises ValueError if it is no good clip."""
        frames = getattr(made, "frames", None)
        if not isinstance(frames, np.ndarray):
            raise TypeError(f"a generator returns a Clip of an array of frames, not {made!r:.80}")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(
                f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
        clip = Clip(frames.copy(), float(made.fps))
        height, width = frames.shape[1:3]
        if not (0 < clip.fps <= 1000 and 2 <= min(height, width) <= max(height, width) <= 16384):
            raise ValueError(f"a video of {width}x{height}, {clip.fps:g} fps cannot be saved")
        if len(frames) < 2 or clip.seconds < seconds / 2:
            raise ValueError(f"{seconds:g} s of new video were asked for, not {clip.seconds:g} s")
        size = (height, width, clip.fps)
        for call in self.calls:
            if call.size and call.size != size:
                raise ValueError(f"(H, W, fps) {size} differs from {call.size} of the clips before")
        return clip

    def note(self, call: Call) -> None:
        """Add a finished call to the run's calls, and to the log."""
        self.calls.append(call)
        shown = call.reply or call.model_dump(
            include={"seconds", "clip", "error", "fault"}, exclude_none=True)
        text = "; ".join(f"{name}: {value}" for name, value in shown.items())
        log.info("step %d: %s: %s", call.t, call.role, text)

    def cost(self) -> dict:
        """Sec. 4: what the run's calls came to, whatever became of the clips."""
        clips = [call for call in self.calls if call.seconds is not None]
        cost: dict[str, Any] = {
            "vgm_seconds": sum(call.seconds or 0 for call in clips),
            "clips": len(clips),
            "steps": len({call.t for call in clips}),
            "regenerations": sum((call.j or 1) > 1 for call in clips),  # as in Tables 10 and 12
            "generator_errors": sum(
                call.role == "vgm" and call.error is not None for call in self.calls),
            "calls": {},
            "tokens_in": {},
            "tokens_out": {},
            "wall_seconds": {},
        }
        for role in dict.fromkeys(call.role for call in self.calls):
            calls = [call for call in self.calls if call.role == role]
            cost["calls"][role] = len(calls)
            cost["tokens_in"][role] = sum(call.tokens_in or 0 for call in calls)
            cost["tokens_out"][role] = sum(call.tokens_out or 0 for call in calls)
            cost["wall_seconds"][role] = round(sum(call.wall_seconds for call in calls), 3)
        return cost


def checked_picture(frame) -> np.ndarray:
    """The picture as an array. Raises Problem."""
    frame = np.asarray(frame)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise Problem(f"A picture is a uint8 RGB array (H, W, 3), not {frame.dtype} {frame.shape}.")
    return frame


def find_object(text: str) -> dict:
    """The JSON object of a reply: bare, fenced, among words or after a thought. [D9]

    Raises ValueError if there is none, or more than one.
    """
    text = text.strip()
    bare = text.removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        found = parse(bare)
    except ValueError:
        found = parse(cut_out(text))
    if type(found) is not dict:
        raise ValueError("no JSON object")
    return found


def cut_out(text: str) -> str:
    """The object in a reply of thoughts and words: from its { to the last }."""
    answer = text.rpartition("</")[2]  # a thought ends with a closing tag
    before, brace, rest = answer.partition("{")
    if "<" in before:
        raise ValueError("a < before the object: was the thinking finished?")
    if not brace or "[" in before:  # an object in a list is not taken for the reply
        raise ValueError("no JSON object")
    return brace + rest[: rest.rfind("}") + 1]


def parse(text: str) -> Any:
    return jiter.from_json(text.encode(), catch_duplicate_keys=True, allow_inf_nan=False)


def every_fault(error: Exception) -> str:
    """All that is wrong with a reply, or with a file, in one line."""
    if not isinstance(error, ValidationError):
        return first_line(error)
    faults = [": ".join([*map(str, fault["loc"]), fault["msg"]]) for fault in error.errors()]
    return "; ".join(faults).replace("Value error, ", "")[:2000]


def first_line(error: Exception) -> str:
    """An error in one short line, without secrets."""
    text = clean(f"{type(error).__name__}: {error}")
    return text.strip(": ").splitlines()[0][:400]


# The paper's part ends here.
# ------------------------------------------------------------------------------
# The VLM: any OpenAI-compatible endpoint

GOOGLE = "https://generativelanguage.googleapis.com/v1beta/openai/"


def base_url(url: str) -> str:
    """A URL that can be called, and shown without giving a secret away."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("a base URL starts with http:// or https://: http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a base URL has no user, password or query; keys go into the environment")
    parts.hostname.encode("idna")  # raises a ValueError for what can be no host
    if re.search(r"\s", url):
        raise ValueError("a base URL has no blanks")
    return url


def json_object(text: str) -> str:
    try:
        found = parse(text)
    except ValueError:
        found = None
    if type(found) is not dict:
        raise ValueError('not a JSON object, such as {"top_k": 20}')
    return text


@settings(
    config={"extra": "forbid", "hide_input_in_errors": True, "allow_inf_nan": False}, eq=False)
class OpenAIVLM:
    """Gemini, a local vLLM, or any other endpoint that speaks OpenAI's chat API.

    The key for Google's host is GEMINI_API_KEY or GOOGLE_API_KEY; for any other host it is
    OPENAI_API_KEY. Both come from the environment.
    """

    vlm: str = "gemini-2.5-pro"  # name of the VLM (App. A.1)
    vlm_url: Annotated[str, AfterValidator(base_url)] = GOOGLE  # vLLM: http://HOST:8000/v1
    temperature: Annotated[float, Field(ge=0)] | None = 0.2  # None: not sent (App. A.1)
    # how the VLM sees a clip: sampled frames, or an MP4 in a part of that type [D10]
    video_input: Literal["frames", "video_url", "image_url"] = "frames"
    verify_fps: Annotated[float, Field(gt=0)] = 1.0  # sampled frames per second (App. A.1)
    # more fields for each request, as a JSON object
    request_extra: Annotated[str, AfterValidator(json_object)] = "{}"
    timeout: Annotated[float, Field(gt=0)] = 600.0  # longest wait for an answer, in seconds

    @property
    def identity(self) -> dict:
        """The settings that change the answers."""
        return {**asdict(self), "vlm_url": None, "timeout": None}

    @property
    def host(self) -> str:
        return urlsplit(self.vlm_url).netloc

    def check(self) -> None:
        """Raises Problem if there is no key where one is needed."""
        _ = self.client

    @cached_property
    def client(self):
        import openai

        google = urlsplit(self.vlm_url).hostname == urlsplit(GOOGLE).hostname
        names = ["GEMINI_API_KEY", "GOOGLE_API_KEY"] if google else ["OPENAI_API_KEY"]
        keys = [os.environ.get(name, "").strip() for name in names]
        key = keys[0] or keys[-1]
        if google and not key:
            raise Problem(f"No API key for {self.host}: set {names[0]}, or try "
                          "python -m examples.maze.run, which needs none.")
        if not key.isascii():
            raise Problem("The API key contains a character that no key has.")
        return openai.OpenAI(
            api_key=key or "none",  # local servers want no key, the client wants a text
            base_url=self.vlm_url,
            max_retries=6,  # Gemini says 503 when it is busy
            timeout=openai.Timeout(self.timeout, connect=8),
            # a redirect would send the pictures to a host that nobody named
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def __call__(self, instructions: str, parts: list, schema: type[BaseModel]) -> dict:
        """See Models. Raises Problem when the endpoint cannot be reached or refuses."""
        import openai

        content = []
        for part in parts:
            content += self.encode(part)
        request: dict[str, Any] = {
            "model": self.vlm,
            "messages": [
                {"role": "system", "content": instructions},
                {"role": "user", "content": content},
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": schema.__name__,
                    "schema": schema.model_json_schema(),
                    "strict": True,
                },
            },
            "extra_body": parse(self.request_extra),
        }
        if self.temperature is not None:
            request["temperature"] = self.temperature
        try:
            raw = self.client.chat.completions.with_raw_response.create(**request)
        except openai.OpenAIError as error:
            reason = self.reason(error)
            raise Problem(f"{self.vlm_url} gave no usable answer ({reason}).") from error
        return {"host": self.host, **read_completion(raw.text)}

    def reason(self, error) -> str:
        """Why the endpoint gave no answer, and what to try."""
        if hasattr(error, "status_code"):  # str() hides Google's bodies, which are lists
            reason = f"{error.status_code}; {error.body or error}"
        else:
            reason = f"{error} {error.__cause__ or ''}"  # "Connection error." says too little
        reason = clean(" ".join(reason.split()))[:600]
        if "/v1" not in self.vlm_url and getattr(error, "status_code", 404) == 404:
            reason += "; a base URL usually ends in /v1"
        return reason

    def encode(self, part) -> list[dict]:
        """A text, a picture or a clip, as parts of a chat message."""
        if isinstance(part, str):
            return [{"type": "text", "text": part}]
        if isinstance(part, np.ndarray):
            return [media("image_url", "image/jpeg", jpeg(part))]
        if self.video_input != "frames":
            return [media(self.video_input, "video/mp4", mp4(part))]
        content = []
        for i in sample(part, self.verify_fps):
            content += self.encode(f"Frame at {i / part.fps:.2f} s:")
            content += self.encode(part.frames[i])
        return content


def media(kind: str, mime: str, data: bytes) -> dict:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    return {"type": kind, kind: {"url": url}}


def jpeg(picture: np.ndarray) -> bytes:
    """A JPEG of at most 1024 pixels a side."""
    image = Image.fromarray(picture)
    out = io.BytesIO()
    image.thumbnail((1024, 1024))
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


def sample(clip: Clip, per_second: float) -> list[int]:
    """Frame numbers at about that rate, first and last included: 7 of a 6 s clip. (A.1) [D10]"""
    last = len(clip.frames) - 1
    n = min(last, max(1, round(clip.seconds * per_second)))
    return [round(i * last / n) for i in range(n + 1)]


CUT_OFF = ("length", "max_tokens", "content_filter", "safety")  # finish reasons of half a reply


def read_completion(body: str) -> dict:
    """The answer in a chat completion, as Models wants it; with a `fault` if it cannot be used."""
    answer: dict[str, Any] = {}
    try:
        completion = parse(body)
        usage = completion.get("usage") or {}
        answer["model"] = completion.get("model")
        answer["tokens_in"] = usage.get("prompt_tokens") or 0
        # thoughts are billed, but not every endpoint counts them as completion
        answer["tokens_out"] = max(
            usage.get("completion_tokens") or 0,
            (usage.get("total_tokens") or 0) - answer["tokens_in"])
        choice = completion["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        finish_reason = str(choice.get("finish_reason")).lower()
        thought = message.get("reasoning") or message.get("reasoning_content")
        refusal = message.get("refusal")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        sent = clean(body)[:300] or "nothing"
        return {**answer, "fault": f"the endpoint sent no chat completion, but {sent}"}
    answer["text"] = text
    if refusal:
        answer["fault"] = f"refused: {refusal}"
    elif finish_reason in CUT_OFF:
        answer["fault"] = f"finish_reason {finish_reason}"
    elif thought and not text.strip():
        answer["fault"] = "the content is empty: the thinking was not finished"
    return answer


# ------------------------------------------------------------------------------
# The generator: Wan2.2 image-to-video with diffusers


@settings(config={"extra": "forbid", "allow_inf_nan": False}, eq=False)
class Wan:
    """Any Wan image-to-video checkpoint, in at most 832x480 pixels, never enlarged (App. A.1)."""

    vgm: str = "Video-Reason/VBVR-Wan2.2"  # hub id or folder (App. A.1)
    # none: all on the GPU (80 GB); model: a part at a time; group: a layer at a time (24 GB)
    offload: Literal["none", "model", "group"] = "model"
    fps: Annotated[int, Field(ge=1, le=240)] = 16  # frames per second (App. A.1)
    sampling_steps: Annotated[int, Field(ge=1)] = 20  # denoising steps (App. A.1)
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0  # CFG, of both experts (App. A.1)

    @property
    def identity(self) -> dict:
        """The settings that change the clips."""
        return {**asdict(self), "offload": None}

    def check(self) -> None:
        """Raises Problem if this cannot work. Called before anything is paid for."""
        import torch

        folder = Path(self.vgm)
        if folder.is_dir():
            if not (folder / "model_index.json").is_file():
                raise Problem(f"{folder} is no diffusers checkpoint: it has no model_index.json.")
        elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.vgm):
            raise Problem(f"{self.vgm} is neither a folder nor a hub id such as {Wan.vgm}.")
        # without a GPU only a local checkpoint below 2 GB will do, such as tiny-wan
        size = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
        if not torch.cuda.is_available() and not 0 < size < 2e9:
            raise Problem(f"{self.vgm} needs a CUDA GPU; python -m examples.maze.run needs none.")

    @cached_property
    def pipe(self):
        """The diffusers pipeline, loaded when it is first needed. Raises Problem."""
        # transformers warns of a weight that Wan does not use
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import diffusers
        import torch
        import transformers

        if not sys.stderr.isatty():  # progress bars are for eyes, not for files
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        self.check()
        with explained(f"{self.vgm} cannot be loaded", Exception):  # whatever the loaders raise
            pipe = diffusers.WanImageToVideoPipeline.from_pretrained(
                self.vgm,
                use_safetensors=True,
                dtype={"default": torch.bfloat16, "vae": torch.float32},
            )
            self.place(pipe)
        pipe.set_progress_bar_config(desc="denoising", leave=False, disable=None)  # for eyes only
        return pipe

    def place(self, pipe) -> None:
        """Move to the GPU what `offload` does not leave in main memory."""
        import torch

        if not torch.cuda.is_available():
            return
        if self.offload == "none":
            with self.memory():
                pipe.to("cuda")
        elif self.offload == "model":
            pipe.enable_model_cpu_offload()
        else:
            pipe.enable_group_offload(
                torch.device("cuda"), offload_type="leaf_level", use_stream=True)

    @contextmanager
    def memory(self):
        """Says what to try when the GPU's memory is not enough."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            smaller = {"none": "try --offload model", "model": "try --offload group"}
            hint = smaller.get(self.offload, "this GPU is too small")
            raise RuntimeError(f"out of GPU memory: {hint} ({error})") from error

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames, 5 at least: 97 for 6 s, 49 for 3 s. [D8]

        Raises ValueError if it is not finite, and what diffusers raises.
        """
        import torch

        transformer = self.pipe.transformer or self.pipe.transformer_2
        multiple = self.pipe.vae_scale_factor_spatial * transformer.config.patch_size[1]
        width, height = fit(frame.shape[1], frame.shape[0], multiple)
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        with self.memory():
            video = self.pipe(
                image=image,
                prompt=prompt,
                width=width,
                height=height,
                num_frames=4 * max(1, int(seconds * self.fps / 4 + 1e-6)) + 1,
                num_inference_steps=self.sampling_steps,
                guidance_scale=self.guidance_scale,
                max_sequence_length=min(512, self.pipe.tokenizer.model_max_length),
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).frames[0]
        if not np.isfinite(video).all():
            raise ValueError("the clip contains values that are not finite")
        return Clip((video * 255).round().astype(np.uint8), self.fps)


def fit(width: int, height: int, multiple: int) -> tuple[int, int]:
    """About this shape in at most 832x480 pixels, each side a multiple; never enlarged."""
    scale = min(1.0, math.sqrt(832 * 480 / (width * height)))

    def side(pixels: int) -> int:
        return max(1, int(pixels * scale / multiple + 1e-6)) * multiple

    return side(width), side(height)


# ------------------------------------------------------------------------------
# Pictures and videos

UPRIGHT = {  # what turns a picture upright, by its EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3), upright, transparency on white. Raises Problem."""
    if not Path(path).is_file():
        raise Problem(f"{path}: there is no file of this name.")
    unreadable = f"{path} cannot be read as a picture; convert it to PNG or JPEG"
    with explained(unreadable, Exception), Image.open(path) as image:
        width, height = image.size
        if min(width, height) < 16 or max(width, height) > 8192 or width * height > 50e6:
            raise Problem(f"{path} has {width}x{height} pixels: a side needs 16 to 8192, and the "
                          "picture may have 50 million.")
        if image.mode.startswith(("I", "F")):
            raise Problem(f"{path} has more than 8 bits a channel: convert it to 8 bits.")
        turn = UPRIGHT.get(image.getexif().get(0x112, 1))
        upright = image if turn is None else image.transpose(turn)
        colours = upright.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return np.array(Image.alpha_composite(white, colours).convert("RGB"))


def mp4(clip: Clip) -> bytes:
    """H.264 that plays anywhere, the same bytes each time. imageio cannot set x264's options."""
    height, width = clip.frames.shape[1:3]
    frames = np.pad(clip.frames, [(0, 0), (0, height % 2), (0, width % 2), (0, 0)], "edge")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        rate = Fraction(clip.fps).limit_denominator(1001)
        options = {"crf": "18", "x264-params": "mbtree=0"}  # with mbtree the bytes vary
        stream = file.add_stream("libx264", rate, options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    return out.getvalue()


def lossless(clip: Clip) -> bytes:
    """FFV1 in Matroska: read_lossless gives the same frames, bit for bit."""
    return iio.imwrite("<bytes>", clip.frames, extension=".mkv", plugin="pyav", codec="ffv1",
                       out_pixel_format="bgr0", fps=clip.fps)


def read_lossless(data: bytes) -> np.ndarray:
    """The frames, uint8 RGB (T, H, W, 3). Raises OSError or av.FFmpegError.

    The format is named, because ffmpeg would also follow a playlist to other files.
    """
    with iio.imopen(data, "r", plugin="pyav", format="matroska") as file:  # type: ignore
        return file.read()


# ------------------------------------------------------------------------------
# The run folder: what was paid for is kept, and a run that was interrupted goes on


ANOTHER = "choose another folder (--out)"


class RecordedModels(Models):
    """Models that write each call into a folder, and never make one that the folder answers.

    A recorded call answers a request if role, contents (a clip's seed among them) and the model's
    settings are equal. Of equal requests in one run, the second call answers the second.
    The folder contains calls.jsonl (a line per call), clips/ (every clip, lossless), input.png,
    start.json and, after `save`, video.mp4 and trace.json. Raises Problem for a folder that
    another process uses, or that is damaged.
    """

    def __init__(self, vgm, vlm, folder: str | Path, seed: int = 0):
        super().__init__(vgm, vlm, seed)
        self.folder = Path(folder)
        self.facts: dict = {}  # more entries for start.json and trace.json; set before the run
        with explained(f"{self.folder} cannot be used as a run folder", OSError):
            self.check_folder()
            lock = self.folder.resolve() / "lock"
            self.lock = filelock.FileLock(lock, is_singleton=True)  # this process may open it twice
            with explained(f"{self.folder} is in use by another run", filelock.Timeout):
                self.lock.acquire(blocking=False)
            recorded = self.read_calls()
        names = [call.clip for call in recorded if call.clip]
        self.clips = max(map(number_in, names), default=0)  # the number of the newest clip
        while recorded and recorded[-1].failed:  # they ended the last run: try again
            recorded.pop()
        self.recorded = {call.request: call for call in recorded}
        self.requests: Counter[str] = Counter()  # of this run

    def check_folder(self) -> None:
        """Raises Problem if something in the folder would be written through, or waited for."""
        clips = self.folder / "clips"
        clips.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.iterdir(), *clips.iterdir()]:
            kind = path.lstat()
            file = stat.S_ISREG(kind.st_mode) and kind.st_nlink == 1
            folder = stat.S_ISDIR(kind.st_mode) and not path.suffix  # none called video.mp4
            if not (file or folder):
                raise Problem(f"{path} is a link, or no ordinary file: {ANOTHER}.")

    def read_calls(self) -> list[Call]:
        """The lines of calls.jsonl. A last line that a power cut tore is dropped."""
        path = self.folder / "calls.jsonl"
        data = path.read_bytes() if path.exists() else b""
        *lines, torn = data.split(b"\n")
        calls = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                with explained(f"{path}, line {number} is damaged: delete the line, and its call "
                               f"is made again, or {ANOTHER}", ValueError):
                    calls.append(Call.model_validate_json(line))
        if not torn.strip():
            return calls
        if not torn.startswith(b"{"):
            raise Problem(f"{path} does not end with a call: delete its last line, or {ANOTHER}.")
        try:
            calls.append(Call.model_validate_json(torn))
        except ValueError:
            os.truncate(path, len(data) - len(torn))
        else:  # only the end of the line is missing
            write_file(path, data + b"\n")
        return calls

    def begin(self, I0, q: str) -> np.ndarray:
        """As in Models, and the folder must be of this picture and task. Writes them into it."""
        I0 = super().begin(I0, q)
        start = self.folder / "start.json"
        self.facts = {**self.facts, "input": digest(I0, q), "task": q}
        if start.exists():
            with explained(f"{start} is damaged: {ANOTHER}", ValueError, TypeError, KeyError):
                recorded = json.loads(start.read_bytes())["input"]
            if recorded != self.facts["input"]:
                raise Problem(f"{self.folder} is a run with another picture or task: {ANOTHER}.")
        write_file(start, to_json(self.facts))
        write_file(self.folder / "input.png", iio.imwrite("<bytes>", I0, extension=".png"))
        return I0

    def call_vgm(self, t: int, j: int, frame, prompt: str, seconds: float, seed: int):
        request = self.name_request("vgm", self.vgm, frame, prompt, seconds, seed)
        call = self.recorded.get(request)
        if call is not None:
            clip = self.read_clip(call, seconds)
            if clip is not None or call.error:
                log.info("step %d: vgm: attempt %d, seed %d: recorded", t, j, seed)
                return call.model_copy(update={"t": t, "j": j}), clip
            log.warning("%s is missing, or has changed: it is made again", call.clip)
        call, clip = super().call_vgm(t, j, frame, prompt, seconds, seed)
        call.request = request
        if clip is not None:
            self.clips += 1
            data = lossless(clip)
            call.clip = f"clips/{self.clips:03}.mkv"
            call.sha256 = hashlib.sha256(data).hexdigest()
            write_file(self.folder / call.clip, data)  # before the line that promises it
        return self.write(call), clip

    def call_vlm(self, role: str, t: int, instructions: str, parts: list, schema) -> Call:
        request = self.name_request(role, self.vlm, instructions, parts, schema)
        call = self.recorded.get(request)
        if call is not None:
            unusable = call.reply is None and call.fault is not None
            if unusable or fits(call.reply, schema):
                log.info("step %d: %s: recorded", t, role)
                return call.model_copy(update={"t": t})
        call = super().call_vlm(role, t, instructions, parts, schema)
        call.request = request
        return self.write(call)

    def name_request(self, role: str, model, *contents) -> str:
        """A hash of a request, and a number: how often this run has made an equal one."""
        name = digest(role, identity(model), *contents)
        self.requests[name] += 1
        return f"{name}-{self.requests[name]}"

    def write(self, call: Call) -> Call:
        """Append a finished call to calls.jsonl. Returns it as it was written, without secrets."""
        line = to_json(call.model_dump(exclude_none=True), indent=None)
        path = self.folder / "calls.jsonl"
        with explained(f"{path} cannot be written", OSError), open(path, "ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return Call.model_validate_json(line)

    def read_clip(self, call: Call, seconds: float) -> Clip | None:
        """The clip of a recorded call; None if it is missing, has changed, or is no good clip."""
        if call.clip is None or call.size is None:
            return None
        try:
            data = (self.folder / "clips" / Path(call.clip).name).read_bytes()
            if hashlib.sha256(data).hexdigest() != call.sha256:
                return None
            clip = self.checked_clip(Clip(read_lossless(data), call.size[2]), seconds)
        except (OSError, ValueError, av.FFmpegError):
            return None
        return clip if clip.seconds == call.seconds else None

    def save(self, result: Result, **facts) -> Path:
        """Write video.mp4 and trace.json, with the calls of this run. Returns the video's path."""
        trace = {
            "status": result.status,
            "unverified_steps": result.unverified_steps,
            **self.facts,
            **facts,
            "cost": self.cost(),
            "calls": [call.model_dump(exclude_none=True) for call in self.calls],
        }
        write_file(self.folder / "video.mp4", mp4(result.video))
        write_file(self.folder / "trace.json", to_json(trace))
        return self.folder / "video.mp4"


def identity(model) -> Any:
    """What makes a model another one: its `identity`, or else its source file and its fields."""
    owner = getattr(model, "__self__", model)  # of a method: its object
    if hasattr(owner, "identity"):
        return owner.identity
    if isinstance(model, partial):
        return [identity(model.func), model.args, model.keywords]
    function = model if inspect.isroutine(model) else type(model).__call__
    code = getattr(inspect.unwrap(function), "__code__", None)
    source = []
    if code is not None:
        linecache.checkcache(code.co_filename)  # it may have been edited
        source = linecache.getlines(code.co_filename)  # finds a notebook's cell, too
    values = {}
    if is_dataclass(owner) and not isinstance(owner, type):
        values = {each.name: getattr(owner, each.name) for each in fields(owner)}
    name = getattr(model, "__qualname__", type(model).__qualname__)  # a function's, or its class's
    return [name, values, source]


def digest(*parts) -> str:
    """A hash of texts, numbers, pictures, clips and schemas, in lists or dicts.

    Raises Problem for an object that would be another one in the next process.
    """

    def plain(part):
        if isinstance(part, np.ndarray):
            data = np.ascontiguousarray(part)
            return [part.shape, str(part.dtype), hashlib.sha256(data).hexdigest()]
        if isinstance(part, Clip):
            return [part.frames, part.fps]
        if isinstance(part, type):
            return part.model_json_schema()
        if " at 0x" in repr(part):
            raise Problem(f"{part!r:.200} is never the same again: give the model an `identity`, a "
                          "dict of the settings that count.")
        return repr(part)

    return hashlib.sha256(json.dumps(parts, default=plain).encode()).hexdigest()


def number_in(name: str) -> int:
    digits = re.search(r"\d{1,9}", name)
    return int(digits[0]) if digits else 0


def fits(reply: dict | None, schema: type[BaseModel]) -> bool:
    if reply is None:
        return False
    try:
        schema.model_validate(reply)
    except ValueError:
        return False
    return True


def to_json(value, indent: int | None = 2) -> bytes:
    return clean(json.dumps(value, indent=indent, default=str)).encode()


def write_file(path: Path, data: bytes) -> None:
    """All of it or nothing, also if the power goes; a link is replaced. Raises Problem."""
    with (
        explained(f"{path} cannot be written", OSError),
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file,
    ):
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@contextmanager
def explained(what: str, *errors: type[Exception]):
    """Turn a library's errors into one sentence. A Problem goes through as it is."""
    try:
        yield
    except Problem:
        raise
    except errors as error:
        raise Problem(f"{what} ({every_fault(error)}).") from error


SECRET = re.compile("KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)  # in a variable's name
SECRET_FIELD = re.compile("(key|token|secret|password)$", re.IGNORECASE)  # as a setting's name ends


def clean(text: str) -> str:
    """The text without the environment's secrets, and without control characters."""
    for name, value in os.environ.items():
        secret = value.strip()
        if SECRET.search(name) and len(secret) >= 8:
            for spelling in (secret, json.dumps(secret)[1:-1]):  # as it is, and in JSON
                text = text.replace(spelling, "***")
    return "".join(
        character if character.isprintable() or character == "\n" else "\ufffd"
        for character in text)


# ------------------------------------------------------------------------------
# The command line

VGM = TypeVar("VGM")


@dataclass
class Command(Generic[VGM]):
    """CollabVR (arXiv 2605.08735v1): a VLM plans, checks and repairs a generator's video."""

    image: str  # the input image I0
    task: str  # the task prompt q
    config: Config
    vlm: OpenAIVLM
    vgm: VGM
    out: Path | None = None  # run folder, which resumes; None: runs/IMAGE-HASH
    seed: int = 0  # seed of the first clip; later ones count up

    def prepare(self) -> tuple[RecordedModels, np.ndarray]:
        """The models and I0. Raises Problem if something is wrong before anything is paid for."""
        if not self.task.strip():
            raise Problem("The task is empty: say what the video should show.")
        with explained("The task is no valid text", UnicodeError):
            self.task.encode()
        if not 0 <= self.seed < 2**62:
            raise Problem(f"--seed is {self.seed}: it must be 0 or more, and below 2 to the 62nd.")
        if self.out == Path():
            raise Problem("--out is empty, or the current folder: a run needs one of its own.")
        I0 = load_image(self.image)
        out = self.out
        if out is None:
            both = [identity(self.vlm), identity(self.vgm)]
            request = digest(I0, self.task, asdict(self.config), both, self.seed)
            name = re.sub(r"[^-\w]", "_", clean(Path(self.image).stem))[:60]
            out = Path("runs", f"{name}-{request[:8]}")
        if not (out / "trace.json").exists():  # a finished run needs neither key nor GPU
            check(self.vlm, self.vgm)
            log.info("%s will see the pictures.", self.vlm.host)
            log.info("At worst: %d clips, %.1f s of generated video, %d VLM calls. Failed calls "
                     "come on top.", *self.config.worst_case())
        models = RecordedModels(self.vgm, self.vlm, out, self.seed)
        models.facts = {"image": self.image, "settings": self.settings()}
        return models, I0

    def settings(self) -> dict:
        """All options by name, for the trace; keys are masked."""
        values = {**asdict(self.config), **asdict(self.vlm), "seed": self.seed}
        if is_dataclass(self.vgm):
            values.update(asdict(self.vgm))  # type: ignore[arg-type]
        values["request_extra"] = json.dumps(masked(parse(self.vlm.request_extra)))
        return masked(values)


def check(*models) -> None:
    """Raises Problem with all that would stop their first calls, as far as their `check` knows."""
    problems = []
    for model in models:
        try:
            getattr(model, "check", lambda: None)()
        except Problem as problem:
            problems.append(str(problem))
    if problems:
        raise Problem(" ".join(problems))


def masked(value):
    """The value without what stands in it under a key's name."""
    if isinstance(value, list):
        return [masked(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {name: "***" if SECRET_FIELD.search(name) else masked(each)
            for name, each in value.items()}


class CleanFormatter(logging.Formatter):
    """Keeps secrets and control characters out of the log."""

    def format(self, record):
        return clean(super().format(record))


def prepare_terminal() -> None:
    """The log goes to stderr, SIGTERM ends like Ctrl-C, and no file name stops a print."""
    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter())
    logging.basicConfig(handlers=[handler])
    log.setLevel(logging.INFO)
    logging.getLogger("openai").setLevel(logging.INFO)  # says when it tries again
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(values: dict) -> None:
    """Print them, a line each. That nobody reads any more does not spoil a run."""
    try:
        for name, value in values.items():
            print(f"{name:17} {value}", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_fields(vgm: type) -> None:
    """Raises Problem if a generator's fields cannot become options."""
    if not is_dataclass(vgm):
        raise Problem(f"{vgm.__name__} must be a dataclass: its fields become options.")
    taken = {each.name for kind in (Command, Config, OpenAIVLM) for each in fields(kind)}
    taken.remove("vgm")  # Command.vgm holds options and is none
    for each in fields(vgm):
        if each.name in taken:
            raise Problem(
                f"{vgm.__name__}.{each.name} is the name of another option: choose another.")


def main(vgm: type = Wan, argv: list[str] | None = None) -> int:
    """The command line. `sys.exit(collabvr.main(Mine))` makes one for a generator of your own:
    the fields of the dataclass Mine become options.

    Returns the exit status: 0, a video was made; 2, something was wrong before any model had
    answered; 1, something failed later; 130, interrupted. Raises SystemExit for bad options.
    """
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "false")  # they do not fit tyro's box
    import tyro

    prepare_terminal()
    models = None
    try:
        check_fields(vgm)
        command = tyro.cli(
            Command[vgm],  # type: ignore[valid-type]
            args=argv,
            prog=Path(sys.argv[0]).name,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        models, I0 = command.prepare()
        result = CollabVR(models, command.config).run(I0, command.task)
        video = models.save(result)
    except KeyboardInterrupt:
        status, message = 130, "Interrupted."
    except (Problem, OSError) as error:
        answered = models and any(call.text or call.seconds for call in models.calls)
        status, message = 1 if answered else 2, str(error)
    else:
        show({
            "status": result.status,
            "unverified_steps": result.unverified_steps,
            **models.cost(),
            "video": clean(str(video)),
        })
        return 0
    if models and models.calls:
        message += " What was recorded is kept: the same command goes on from here."
    print(f"collabvr: {clean(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
