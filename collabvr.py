#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0",
#   "accelerate==1.15.0", "ftfy==6.3.1", "openai==3.54.0", "pydantic==2.14.3", "imageio==2.38.0",
#   "av==18.1.0", "numpy==2.4.6", "pillow==13.0.0", "filelock==4.2.11", "psutil==7.2.2"]
# ///
"""CollabVR (arXiv 2605.08735v1): a VLM plans, checks and repairs what a video generator shows.

    python collabvr.py --image x.png --task "Move the red circle to the green square."
        Gemini (key in GEMINI_API_KEY) and VBVR-Wan2.2 on one GPU
    python collabvr.py .. --vlm-url http://localhost:8000/v1 --vlm Qwen/Qwen3.5-9B
        a VLM of your own, served by vLLM
    python examples/maze/run.py
        no GPU, no key, no network: a maze on a laptop

From Python: `CollabVR(vgm, vlm).run(I0, q)` with any two callables; "The two callables" says which.

Paper                                             here
Sec. 3.1  problem and symbols                     Config, Clip, Action, Cost, Result
Alg. 1    the loop                                CollabVR.run
Sec. 3.2  M1, progressive planning (A.2)          CollabVR.PLANNER, plan; Plan
Sec. 3.3  M2, verification and evolution (A.2)    CollabVR.VERIFIER, verify, evolve; Verification
App. A.5  failure router (D.5: regen)             CollabVR.ROUTER, exhausted; Routing, good_part
App. A.1  settings                                defaults of Config, OpenAIVLM and Wan
Sec. 4    cost                                    Cost

Departures. Each is tagged where it happens, with what the paper says, what we do, and why.
[D1]  The planner's task_complete ends the run with what is in H.
[D2]  Complete: the plan called the step its last and the verifier calls its progress complete.
[D3]  What follows M rejected attempts is a setting; `replan` is Algorithm 1 to the letter.
[D4]  A run that accepted nothing returns its best attempt, marked so.
[D5]  The verifier judges the plan, which stays fixed while the prompt evolves.
[D6]  evolve falls back on the reason, and accumulates over the attempts of a step.
[D7]  Every clip has a seed of its own.
[D8]  The roles see H as the last frames of its newest eight clips.
[D9]  A clip of s seconds has 4 floor(s fps / 4) + 1 frames; joining drops the repeated one.
[D10] Partial re-generation inside a step is an option, off by default.
[D11] A reply that does not fit is asked for again, twice at most, then the run stops.
[D12] Gemini gets sampled frames too; raw video is an option.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.dataclasses import dataclass as settings  # a dataclass that checks its values

if TYPE_CHECKING:  # imported where they are used: `import collabvr` and --help stay quick
    import numpy as np

log = logging.getLogger("collabvr")
finite = ConfigDict(allow_inf_nan=False)


class Problem(Exception):
    """One sentence for the user: what is wrong and what to do."""


class BudgetSpent(Problem):
    """The next clip would go over max_vgm_seconds."""


# ============================================================== Sec. 3.1 Problem formulation


@settings(frozen=True, config=finite)
class Config:
    """Settings of the method, with the paper's values. Seconds are seconds of video."""

    N_max: int = Field(default=3, ge=1, le=1000, description="planning steps at most (App. A.1)")
    M: int = Field(default=3, ge=1, le=1000, description="attempts per step (App. A.1)")
    modules: Literal["m1", "m2", "m1+m2"] = Field(
        default="m1+m2", description="what is used (Table 3)")
    on_exhausted: Literal["route", "replan", "best"] = Field(
        default="route", description="after M rejections: App. A.5, Alg. 1 to the letter, or C.2")
    partial: float | None = Field(
        default=None, gt=0, le=1,
        description="good fraction from which a retry keeps the good part (D.5)")
    seconds_first: float = Field(
        default=6.0, gt=0, le=600, description="clip length in step 1, s (A.1)")
    seconds_next: float = Field(
        default=3.0, gt=0, le=600, description="clip length afterwards, s (A.1)")
    max_vgm_seconds: float | None = Field(
        default=None, gt=0, description="cap on generated video, s")
    seed: int = Field(default=0, ge=0, lt=2**62, description="seed of the first clip")

    def __post_init__(self):
        if (self.max_vgm_seconds or math.inf) < self.seconds_first:
            raise Problem("--max-vgm-seconds must allow one clip at least, --seconds-first long.")

    def caps(self) -> tuple[int, int]:
        """(N_max, M). M2 alone has one step, M1 alone rejects nothing (Table 3)."""
        return 1 if self.modules == "m2" else self.N_max, 1 if self.modules == "m1" else self.M

    def worst_case(self) -> tuple[int, float]:
        """(clips, seconds of video) of a run in which every clip is rejected."""
        N_max, M = self.caps()
        first, rest = self.seconds_first, self.seconds_next * (N_max - 1)
        longer = 0.0
        if self.on_exhausted == "route" and self.modules != "m1":
            M += 1  # a step may end in a regen, and the last one in a fallback as long as step 1
            longer = max(first - self.seconds_next, 0.0) if N_max > 1 else 0.0
        return N_max * M, min((first + rest) * M + longer, self.max_vgm_seconds or math.inf)


@dataclass(frozen=True)
class Clip:
    """A video. frames: uint8 RGB (T, H, W, 3), frame 0 is the conditioning frame; fps."""

    frames: np.ndarray
    fps: float

    @property
    def seconds(self) -> float:
        """Seconds of new video: frame 0 was there before."""
        return (len(self.frames) - 1) / self.fps


def concat(clips: list[Clip]) -> Clip:
    """c_1 ⊕ .. ⊕ c_t. A later clip's frame 0 repeats the frame before it and is dropped. [D9]"""
    import numpy as np

    return Clip(np.concatenate([clips[0].frames, *(c.frames[1:] for c in clips[1:])]), clips[0].fps)


@dataclass(frozen=True)
class Action:
    """a_t. `prompt` is what the generator reads, and evolves; the plan stays as it is. [D5]"""

    t: int
    prompt: str
    instruction: str
    target_state: str = ""
    is_last: bool = False  # the plan says that this step finishes the task
    is_done: bool = False  # the plan says that H has finished it already


ROLES = ("planner", "verifier", "router")


@dataclass
class Cost:
    """Counted where a model is called: rejected and dropped clips and unusable replies included."""

    vgm_seconds: float = 0.0  # seconds of generated video: the paper's cost (Sec. 4)
    clips: int = 0
    steps: int = 0  # steps with at least one clip
    regenerations: int = 0  # clips after the first of their step (Table 10)
    generator_errors: int = 0
    vgm_wall_seconds: float = 0.0  # seconds of waiting
    vlm_calls: dict = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    tokens_in: dict = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    tokens_out: dict = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    vlm_wall_seconds: dict = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))

    def __str__(self) -> str:
        calls, waited = sum(self.vlm_calls.values()), sum(self.vlm_wall_seconds.values())
        share = 100 * self.vgm_wall_seconds / (self.vgm_wall_seconds + waited or 1)
        return (
            f"VGM        {self.vgm_seconds:.1f} s of video in {self.clips} clips:"
            f" {self.steps} steps, {self.regenerations} re-generations,"
            f" {self.generator_errors} generator errors\n"
            f"VLM        {calls} calls: {', '.join(f'{k} {n}' for k, n in self.vlm_calls.items())};"
            f" tokens {sum(self.tokens_in.values()):,} in, {sum(self.tokens_out.values()):,} out\n"
            f"wall time  VGM {self.vgm_wall_seconds:.1f} s ({share:.1f} %),"
            f" VLM {waited:.1f} s ({100 - share:.1f} %)")


@dataclass(frozen=True)
class Result:
    """V and how it came about. status: complete | step_cap | fallback | best_attempt."""

    video: Clip
    status: str
    unverified_steps: list[int]  # steps whose clip joined H without an accept
    cost: Cost
    steps: list[dict]  # per step the plan, the attempts with their verdicts, the route
    models: list[str]  # what the endpoint says answered


# The two callables. Any pair that keeps this contract will do:
#   vgm(frame, prompt, seconds, seed) -> Clip
#       frame: uint8 RGB (H, W, 3); the clip's frame 0 depicts it. Raising: a failed generation.
#   vlm(instructions, parts, schema) -> (text, usage)
#       parts: strings, uint8 RGB pictures and Clips in reading order. text: JSON that fits the
#       pydantic model `schema`. usage: a dict; it may hold tokens_in, tokens_out, model, and, of a
#       reply that was cut off or refused, fault.
# A backend may have `identity`, a dict of what changes its answers; the journal's keys contain it.


# =============================================================================== Algorithm 1


def within_budget(run):
    """Ends a run that reaches max_vgm_seconds as the step cap does, with what is in H."""

    @functools.wraps(run)
    def capped(self, I0, q):
        try:
            return run(self, I0, q)
        except BudgetSpent:
            return self.result(self.H, "step_cap")

    return capped


class CollabVR:
    """Two callables, the settings and, where nothing paid for may be lost, a journal."""

    def __init__(self, vgm, vlm, config: Config | None = None, journal: Journal | None = None):
        self.vgm, self.vlm = vgm, vlm
        self.config, self.journal = config or Config(), journal or Journal()
        self.begin()

    @within_budget
    def run(self, I0, q: str) -> Result:
        """"Algorithm 1". I0: uint8 RGB (H, W, 3); q: task prompt. Raises Problem."""
        N_max, M = self.begin()                                                 # require
        H, f = self.H, I0                                                       # line 1
        for t in range(1, N_max + 1):                                           # line 2
            a_t = self.plan(I0, q, H, t=t)                                      # line 3
            if a_t.is_done:                                                     # [D1]
                return self.result(H, "complete")
            for j in range(1, M + 1):                                           # line 4
                c_t = self.g(f, a_t)                                            # line 5
                v, d = self.verify(I0, q, H, c_t, a_t=a_t)                      # line 6
                if v == "accept":                                               # line 7
                    H.append(c_t)                                               # line 8
                    f = c_t.frames[-1]                                          # line 9
                    if self.is_complete(a_t, d):                                # line 10
                        return self.result(H, "complete")                       # line 11
                    break                                                       # line 13
                a_t = self.evolve(a_t, d)                                       # line 15
            else:
                H, f, end = self.exhausted(I0, q, H, f, a_t)                    # [D3]
                if end:
                    return self.result(H, end)
        return self.result(H, "step_cap")                                       # line 19

    def begin(self) -> tuple[int, int]:
        """A fresh state; (N_max, M)."""
        self.journal.seen.clear()
        self.H: list[Clip] = []
        self.steps: list[dict] = []
        self.models: list[str] = []
        self.unverified: list[int] = []
        self.cost = Cost()
        self.tried: list[tuple[Clip, Verification]] = []  # the step's rejected attempts
        self.best: list[tuple[Clip, Verification]] = []  # of all the run's the best one, if any
        self.first_clip: Clip | None = None  # whose size and fps the others must have
        return self.config.caps()

    def is_complete(self, a_t: Action, d: Verification | None) -> bool:
        """Line 10. M2 alone: what is accepted is the task. M1 alone: the next plan will say.

        [D2] Paper: a condition that no call answers. Here: the plan called this step the last, and
        the verifier calls its progress complete. Because: the paper counts no call that asks."""
        if self.config.modules != "m1+m2":
            return self.config.modules == "m2"
        return a_t.is_last and d is not None and d.progress == "complete"

    def result(self, H: list[Clip], status: str) -> Result:
        """What the run returns.

        [D4] Paper: silent on an empty H. Here: the best attempt. Because: it was paid for."""
        video, status = (concat(H), status) if H else (self.best[0][0], "best_attempt")
        return Result(video, status, self.unverified, self.cost, self.steps, self.models)

    def g(self, f, a_t: Action, prefix: Clip | None = None) -> Clip:
        """Line 5: c_t = g(f, a_t), as long as step t's clips are. After a prefix (the good part of
        a clip) it goes on from the prefix's last frame and is joined to it.

        [D10] Paper: auxiliary. Here: `partial` makes the good part of the last attempt the prefix.
        Because: Algorithm 1 starts every attempt from f."""
        if not prefix and self.config.partial and self.tried:
            clip, d = self.tried[-1]
            prefix = good_part(clip, d) if d.good_fraction >= self.config.partial else None
        seconds = self.config.seconds_first if a_t.t == 1 else self.config.seconds_next
        if not prefix:
            return self.generate(f, a_t.prompt, seconds)
        clip = self.generate(prefix.frames[-1], a_t.prompt, seconds)
        self.steps[-1]["attempts"][-1]["prefix_frames"] = len(prefix.frames)
        return concat([prefix, clip])

    def generate(self, frame, prompt: str, seconds: float, seed: int | None = None) -> Clip:
        """One clip, new or from the journal, counted. A failed call uses up no attempt and is
        repeated once with the next seed; the second failure raises Problem.

        [D7] Paper: one seed. Here: the run's seed plus the generator calls so far. Because: with
        one seed a re-sample is the same clip again."""
        cost, attempts = self.cost, self.steps[-1]["attempts"]
        if cost.vgm_seconds + seconds > (self.config.max_vgm_seconds or math.inf) + 1e-9:
            log.info("    the next clip would go over max_vgm_seconds")
            raise BudgetSpent(BudgetSpent.__doc__)
        if seed is None:
            seed = self.config.seed + cost.clips + cost.generator_errors
        key, entry, clip = self.make(frame, prompt, seconds, seed)
        for error in entry["errors"]:
            cost.generator_errors += 1
            cost.vgm_wall_seconds += error["wall_seconds"]
            attempts.append({"j": None, "prompt": prompt, "seconds": 0.0, "clip": None,
                             "status": "generator_error"} | error)
        if clip is None:
            raise Problem(f"The generator failed twice in a row ({entry['errors'][-1]['reason']}).")
        self.first_clip = self.first_clip or clip
        j = 1 + sum(a["status"] != "generator_error" for a in attempts)
        cost.clips += 1
        cost.steps += j == 1
        cost.regenerations += j > 1
        cost.vgm_seconds += clip.seconds
        cost.vgm_wall_seconds += entry["wall_seconds"]
        attempts.append({"j": j, "prompt": prompt, "seed": entry["seed"], "seconds": clip.seconds,
                         "status": "unverified", "clip": self.journal.clip_name(key)})
        return clip

    def make(self, frame, prompt: str, seconds: float, seed: int):
        """(journal key, entry, clip or None), from the journal or in at most two calls."""
        identity = getattr(self.vgm, "identity", {})
        key = self.journal.key("vgm", frame, prompt, seconds, seed, identity)
        entry, clip = self.journal.read(key) or ({"errors": []}, None)
        for _ in range(2):
            if clip is not None:
                break
            self.journal.prepare()
            entry["seed"] = seed + len(entry["errors"])
            log.info("    generating %.1f s, seed %d: %s", seconds, entry["seed"], prompt)
            began, reason = time.monotonic(), None
            try:
                made = self.vgm(frame, prompt, seconds, entry["seed"])
                clip = checked(made, frame, self.first_clip)
            except Exception as error:  # noqa: BLE001 - whatever it raises, the generation failed
                reason = redact(f"{type(error).__name__}: {error}")
                log.warning("    the generator failed: %s", reason)
            entry["wall_seconds"] = wall = time.monotonic() - began
            if reason:
                entry["errors"].append(
                    {"reason": reason, "seed": entry["seed"], "wall_seconds": wall})
            self.journal.write(key, entry, clip)
        return key, entry, clip

    # ---------------------------------------------------------- Sec. 3.2 Progressive planning

    PLANNER = """\
You plan for an image-to-video generator that works on a visual task in short clips. Every clip
starts from the last frame of the one before. You get the task prompt, the input image and what has
really happened so far, and you plan the next action only.

- Look first: observation says what the current frame shows, not what was meant to happen.
- remaining_goal says what of the task is still to be done. If nothing is, set task_complete to true
  and leave instruction and target_state empty.
- Otherwise instruction is one visible action that one short clip can show: what moves or changes,
  in which way and direction, how far, and where to. No second action and no outlook.
- target_state is exact: what the last frame must show if the action went right.
- estimated_steps_remaining counts the steps needed from here, this one included: it is 1 if this
  action finishes the task.
- After a rejected step plan another way: smaller, simpler, or in other words.
- On the last allowed step the action must finish the task.

Reply with one JSON object with the fields observation, remaining_goal, task_complete, instruction,
target_state, estimated_steps_remaining.
"""

    def plan(self, I0, q: str, H: list[Clip], *, t: int) -> Action:
        """Line 3, M1: a_t from π_plan(I0, q, H). M2 alone has no planner: its action is q.

        [D1] Paper: lines 11 and 19 end the loop. Here: task_complete does too, unless H is empty.
        Because: the paper's planner returns it, and M1 alone could not stop otherwise."""
        self.tried, N_max = [], self.config.caps()[0]
        self.steps.append({"t": t, "instruction": q, "attempts": [], "route": None})
        if self.config.modules == "m2":
            return Action(t, q, q, is_last=True)
        past = [line for step in self.steps[:-1] for line in told(step)]
        p = self.ask("planner", self.PLANNER, [
            f"Task prompt: {q}", "Input image:", I0, "Steps so far:", *(past or ["none"]),
            *last_frames(H), f"Current frame: {'the last of these' if H else 'the input image'}",
            f"Step: {t} of at most {N_max}{' (the last allowed step)' * (t == N_max)}",
        ], Plan, may_end=bool(H))
        is_done = p.task_complete and bool(H)
        is_last = t == N_max or p.estimated_steps_remaining <= 1
        log.info("step %d/%d: %s", t, N_max, "the task is complete" if is_done else p.instruction)
        self.steps[-1] |= p.model_dump()
        return Action(t, p.instruction, p.instruction, p.target_state, is_last, is_done)

    # -------------------------------------------- Sec. 3.3 Verification and prompt evolution

    VERIFIER = """\
You check one clip that an image-to-video generator made for one planned action, a step of a longer
task. You get the task prompt, the input image, the last frames of the clips accepted so far, the
planned action with its target state, and the clip.

- Judge whether the planned action happens. Finishing the task is not your concern.
- Does the right thing start to move or change, in the right way and direction?
- Does the clip end in agreement with the plan, even if short of the target state?
- Is there a fundamental error: wrong direction, wrong object, wrong action, or a scene that
  collapses or becomes another one? Only this is a reason to reject.
- Not reasons to reject: partial progress, small artefacts, a task that is not finished yet.
- progress is none, partial or complete; complete means that the target state is reached.
- good_fraction is how much of the clip, counted from its start, is right before the error: 0 if it
  is wrong from the start, 1 if there is no error.
- When you reject, suggestion is one sentence for the generator: what to show instead.

Reply with one JSON object with the fields reason, action_executed, progress, good_fraction,
suggestion, verdict (accept or reject), confidence (0 to 1).
"""

    def verify(self, I0, q: str, H: list[Clip], c_t: Clip, *, a_t: Action):
        """Line 6, M2: (v, d) = π_verify(I0, q, H, c_t). M1 alone accepts unverified, without d.

        [D5] Paper: leaves open which prompt is judged. Here: the plan, never the evolved prompt.
        Because: repairs must not move the goal."""
        if self.config.modules == "m1":
            self.unverified.append(a_t.t)
            return "accept", None
        d = self.ask("verifier", self.VERIFIER, [
            f"Task prompt: {q}", "Input image:", I0, *last_frames(H),
            f"Planned action: {a_t.instruction}",
            f"Target state: {a_t.target_state or 'as the task prompt says'}", "Clip to check:", c_t,
        ], Verification)
        attempt = self.steps[-1]["attempts"][-1]
        attempt |= {"status": d.verdict} | d.model_dump(exclude={"verdict"})
        log.info("    attempt %d: %s, progress %s, good fraction %.2f: %s%s", attempt["j"],
                 d.verdict, d.progress, d.good_fraction, d.reason,
                 d.suggestion and f" -> {d.suggestion}")
        if d.verdict == "reject":
            self.tried.append((c_t, d))
            self.best = [best_of([*self.best, (c_t, d)])]
        return d.verdict, d

    def evolve(self, a_t: Action, d: Verification | Routing) -> Action:
        """Line 15: folds the suggestion into the prompt, without a VLM call.

        [D6] Paper: the suggestion. Here: else the reason; earlier ones stay in the prompt. Because:
        an unchanged prompt asks for the same mistake."""
        learned = d.suggestion.strip() or d.reason.strip()
        return replace(a_t, prompt=f"{a_t.prompt} Correction: {learned}")

    # -------------------------------------------------------------- App. A.5 Failure router

    ROUTER = """\
All attempts at one step of a video generation task were rejected. You decide how to go on. You get
the task prompt, the input image, the last frames of the clips accepted so far, the planned action,
the best of the failed clips, and its reason, suggestion and good fraction (how much of the clip was
right before the error).

- regen: an execution slip in one coherent change, with a moderate or high good fraction. The good
  part is kept and the rest is generated once more, with your suggestion.
- split: the step is too much for one clip, it needs states in between, or the good fraction is very
  low. The planner goes on in smaller steps; estimated_steps says in how many.
- fallback: it is the splitting that spoils the clips, at the seams between steps, and what is left
  is simple enough for one clip. The whole task is generated in a single clip.

Choose among the allowed actions only. suggestion is one sentence for the generator or the planner.

Reply with one JSON object with the fields reason, action, suggestion, estimated_steps (0 if not
split).
"""

    def exhausted(self, I0, q: str, H: list[Clip], f, a_t: Action):
        """What follows M rejected attempts: the new (H, f), and a status if the run ends here.

        [D3] Paper: Algorithm 1 goes on with H and f unchanged (`replan`), C.2 with the best attempt
        (`best`), A.5 asks the router (`route`). Here: all three. Because: they differ."""
        (clip, d), action = best_of(self.tried), self.config.on_exhausted
        if action == "route":
            split = ["split"] * (a_t.t < self.config.caps()[0])  # if a step is left to take it up
            allowed = ["regen", *split, "fallback"]
            r = self.ask("router", self.ROUTER, [
                f"Task prompt: {q}", "Input image:", I0, *last_frames(H),
                f"Planned action: {a_t.instruction}", "Failed clip:", clip,
                f"Reason: {d.reason}", f"Suggestion: {d.suggestion}",
                f"Good fraction: {d.good_fraction:.2f}", f"Allowed actions: {', '.join(allowed)}",
            ], Routing, allowed=allowed)
            log.info("    router: %s: %s -> %s", r.action, r.reason, r.suggestion)
            self.steps[-1]["route"], action = r.model_dump(), r.action
        if action in ("replan", "split"):  # after a split, `told` tells the next plan
            return H, f, None
        if action == "fallback":  # one single-shot run, N = 1: from I0, with q, not verified
            H[:], self.unverified[:] = [self.generate(I0, q, self.config.seconds_first)], [a_t.t]
            return H, H[-1].frames[-1], "fallback"
        if action == "regen":  # the good part survives (D.5); the joined clip is verified
            c_t = self.g(f, self.evolve(a_t, r), prefix=good_part(clip, d))
            v, d = self.verify(I0, q, H, c_t, a_t=a_t)
            if v == "accept":
                H.append(c_t)
                return H, c_t.frames[-1], "complete" if self.is_complete(a_t, d) else None
            clip, d = best_of(self.tried)
        self.unverified.append(a_t.t)  # best, also after a regen that was rejected
        self.steps[-1]["kept"] = d.reason
        H.append(clip)
        return H, clip.frames[-1], None

    # -------------------------------------------------------------------- One call to the VLM

    def ask(self, role: str, instructions: str, parts: list, schema: type[Reply], **context):
        """One role's answer, as `schema`, new or from the journal, counted before it is read.

        [D11] Paper: silent. Here: what does not fit is asked for again with the error, twice at
        most; then Problem. Because: an accept that was not said is worse than no answer."""
        key = self.journal.key(role, instructions, parts, json_schema(schema),
                               getattr(self.vlm, "identity", {}))
        entry, _ = self.journal.read(key) or ({"replies": []}, None)
        value = fault = None
        for reply in entry["replies"]:
            value, fault = self.receive(role, reply, schema, context)
        last = len(entry["replies"]) + 3
        while value is None and len(entry["replies"]) < last:
            self.journal.prepare()
            again = f"Your last reply could not be used: {fault}. Reply with the JSON object only."
            began = time.monotonic()
            text, usage = self.vlm(instructions, parts + [again] * bool(fault), schema)
            wall = {"wall_seconds": time.monotonic() - began}
            entry["replies"].append({"text": text} | wall | usage)
            self.journal.write(key, entry)
            value, fault = self.receive(role, entry["replies"][-1], schema, context)
        if value is None:
            raise Problem(f"The {role} gave no usable reply in three calls ({fault}); the last "
                          f"was {(text or '')[:300]!r}.")
        return value

    def receive(self, role: str, reply: dict, schema: type[Reply], context: dict):
        """(value, None) for a usable reply, else (None, what is wrong with it). Counts both."""
        self.cost.vlm_calls[role] += 1
        self.cost.vlm_wall_seconds[role] += reply["wall_seconds"]
        self.cost.tokens_in[role] += reply.get("tokens_in") or 0
        self.cost.tokens_out[role] += reply.get("tokens_out") or 0
        if reply.get("model") and reply["model"] not in self.models:
            self.models.append(reply["model"])
        try:
            if reply.get("fault"):
                raise ValueError(reply["fault"])
            return schema.model_validate(parse_object(reply["text"]), context=context), None
        except (ValueError, RecursionError) as error:
            fault = first_line(error)
            log.warning("    %s: unusable reply: %s", role, fault)
            return None, fault


# -------------------------------------------------- what the roles reply (App. A.2, A.5)


class Reply(BaseModel):
    """Strict: a number in quotes or a field too many is a misunderstanding. Reasons come first."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Plan(Reply):
    """The planner's reply. Context: may_end, whether anything is in H yet."""

    observation: str
    remaining_goal: str
    task_complete: bool
    instruction: str
    target_state: str
    estimated_steps_remaining: int = Field(ge=0)

    @model_validator(mode="after")
    def _has_an_action(self, info: ValidationInfo[dict]):
        if not self.instruction.strip() and not (self.task_complete and info.context["may_end"]):
            raise ValueError("instruction must not be empty: an action is needed now")
        return self


class Verification(Reply):
    """The verifier's reply: the verdict v, and the diagnosis d around it."""

    reason: str
    action_executed: bool
    progress: Literal["none", "partial", "complete"]
    good_fraction: float = Field(ge=0, le=1)
    suggestion: str
    verdict: Literal["accept", "reject"]
    confidence: float = Field(ge=0, le=1)


class Routing(Reply):
    """The router's reply. Context: allowed, the actions that are possible here."""

    reason: str
    action: Literal["regen", "split", "fallback"]
    suggestion: str
    estimated_steps: int = Field(ge=0)

    @model_validator(mode="after")
    def _is_allowed(self, info: ValidationInfo[dict]):
        if self.action not in info.context["allowed"]:
            raise ValueError(f"action must be one of {', '.join(info.context['allowed'])}")
        return self


@functools.cache
def json_schema(schema: type[BaseModel]) -> dict:
    """What a reply has to look like, worked out once."""
    return schema.model_json_schema()


def parse_object(text: str | None) -> dict:
    """A reply's JSON object, fences stripped. Raises ValueError for anything else."""

    def once(pairs):  # json would keep the last of two verdicts
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field is given twice")
        return dict(pairs)

    text = (text or "").strip()
    if len(text) > 100_000:
        raise ValueError(f"a reply of {len(text):,} characters")
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    value = json.loads(fenced[1] if fenced else text, object_pairs_hook=once)
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could not be written
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - as for any reply that does not fit
    return value


def first_line(error: Exception) -> str:
    """An error in one short line; of pydantic's the first field and its message."""
    if isinstance(error, ValidationError):
        e = error.errors()[0]
        return ": ".join([*map(str, e["loc"]), e["msg"]])[:200]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------- clips, and what is told of H


def last_frames(H: list[Clip]) -> list:
    """The last frames of the newest eight accepted clips, with labels.

    [D8] Paper: frames of H. Here: one a clip, eight at most. Because: requests have limits."""
    newest = list(enumerate(H, 1))[-8:]
    return [x for i, c in newest for x in (f"Last frame of accepted clip {i}:", c.frames[-1])]


def told(step: dict) -> list[str]:
    """What the planner is told of an earlier step."""
    clips = [a for a in step["attempts"] if a["status"] != "generator_error"]
    last = clips[-1]
    if last["status"] == "accept":
        outcome = f"accepted, progress {last['progress']}"
    elif last["status"] == "unverified":
        outcome = "done, not verified"
    elif "kept" in step:
        outcome = f"rejected {len(clips)} times, the best attempt was kept: {step['kept']}"
    else:
        outcome = f"rejected {len(clips)} times, nothing was kept: {last['reason']}"
    lines = [f"Step {step['t']}: {step['instruction']} Outcome: {outcome}"]
    if step["route"] and step["route"]["action"] == "split":
        lines.append("Advice: split what remains into about {estimated_steps} smaller steps. "
                     "{suggestion} ({reason})".format(**step["route"]))
    return lines


def best_of(attempts: list[tuple[Clip, Verification]]) -> tuple[Clip, Verification]:
    """The attempt with the largest good fraction, the latest of equals (C.2)."""
    return max(reversed(attempts), key=lambda attempt: attempt[1].good_fraction)


def good_part(clip: Clip, d: Verification) -> Clip:
    """Frames 0..k before the error, k = floor(good_fraction (T - 1)) (D.5)."""
    return Clip(clip.frames[: math.floor(d.good_fraction * (len(clip.frames) - 1)) + 1], clip.fps)


def checked(clip: Clip, frame, like: Clip | None) -> Clip:
    """The clip, if it keeps the contract and can be joined to one like it; else ValueError. Warns
    if frame 0 does not depict the conditioning frame (A.4: SSIM 0.97 for Wan, 0.82 for Sora 2)."""
    import numpy as np

    shape, dtype = clip.frames.shape, clip.frames.dtype
    if len(shape) != 4 or shape[3] != 3 or str(dtype) != "uint8":
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {dtype} {shape}")
    if shape[0] < 2 or not 0 < clip.fps < math.inf:
        raise ValueError(f"too few frames: {shape[0]} at {clip.fps} fps")
    if like and (shape[1:], clip.fps) != (like.frames.shape[1:], like.fps):
        raise ValueError(f"a clip of {shape[2]}x{shape[1]} at {clip.fps} fps does not go with one "
                         f"of {like.frames.shape[2]}x{like.frames.shape[1]} at {like.fps} fps")
    if (same := ssim(frame, clip.frames[0])) < 0.85:
        log.warning("    frame 0 is not the conditioning frame (SSIM %.2f): is it lost?", same)
    # in a row, because it will be hashed often; a plain number, because fps may be one of numpy's
    return Clip(np.ascontiguousarray(clip.frames), float(clip.fps))


# ===================================================================================== VLM


@settings(config=finite, eq=False)
class OpenAIVLM:
    """Any OpenAI-compatible endpoint as `vlm`. Keys come from the environment when needed:
    GEMINI_API_KEY or GOOGLE_API_KEY for Google's host only, OPENAI_API_KEY for any other."""

    vlm: str = Field(default="gemini-2.5-pro", description="the VLM's model name (App. A.1)")
    vlm_url: Annotated[str, AfterValidator(lambda url: web_address(url))] = Field(
        default="https://generativelanguage.googleapis.com/v1beta/openai/",
        description="base URL of an OpenAI-compatible endpoint")
    temperature: float | None = Field(
        default=0.2, ge=0, description="or none: not sent (App. A.1)")
    video_input: Literal["frames", "video"] = Field(
        default="frames", description="how clips are sent")
    verify_fps: float = Field(
        default=1.0, gt=0, description="frames per second that it sees (App. A.1)")
    request_extra: Annotated[dict, BeforeValidator(
        lambda x: json.loads(x) if isinstance(x, str) else x)] = Field(
        default_factory=dict, description="more fields for the request, as JSON")
    timeout: float = Field(default=600.0, gt=0, description="longest wait for one answer, s")

    @property
    def identity(self) -> dict:
        names = ("vlm", "temperature", "video_input", "verify_fps", "request_extra")
        return {name: getattr(self, name) for name in names}

    @property
    def host(self) -> str:
        return urlsplit(self.vlm_url).hostname or ""

    @property
    def key(self) -> str | None:
        if self.host == "generativelanguage.googleapis.com":
            return os.environ.get("GEMINI_API_KEY") or os.environ.get("GOOGLE_API_KEY")
        return os.environ.get("OPENAI_API_KEY") or "none"  # a local server asks for none

    def check(self) -> None:
        """Raises Problem if there is no key, no endpoint, or no such model there."""
        names = self.request(lambda client: [m.id for m in client.models.list()])
        names = [name.removeprefix("models/") for name in names]
        if self.vlm not in names:
            raise Problem(f"{self.host} has no model {self.vlm!r}; it has {', '.join(names[:8])}.")

    def request(self, send):
        """send(client), the client's retries included. Raises Problem, without the key."""
        import openai

        if not self.key:
            raise Problem(f"No API key for {self.host}: set GEMINI_API_KEY, or name another "
                          f"endpoint with --vlm-url; without either there is {OFFLINE}")
        try:
            return send(openai.OpenAI(api_key=self.key, base_url=self.vlm_url, max_retries=6,
                                      timeout=self.timeout))
        except openai.APIStatusError as error:  # str() hides Google's error bodies, which are lists
            said = f"{error.status_code} {json.dumps(error.body)}"
        except Exception as error:  # noqa: BLE001 - a URL, a key, a page of HTML: all end here
            said = f"nothing usable ({first_line(error)})"
        raise Problem(f"{self.host} answered {redact(said)[:300]}.")

    def __call__(self, instructions: str, parts: list, schema: type[BaseModel]):
        """(text, usage), see "The two callables". Raises Problem when the endpoint gives up."""
        content = [piece for part in parts for piece in self.encode(part)]
        body: dict = {
            "model": self.vlm, "extra_body": self.request_extra,
            "messages": [{"role": "system", "content": instructions},
                         {"role": "user", "content": content}],
            "response_format": {"type": "json_schema", "json_schema": {
                "name": schema.__name__, "schema": json_schema(schema), "strict": True}}}
        if self.temperature is not None:
            body["temperature"] = self.temperature

        def send(client):
            try:
                return client.chat.completions.create(**body)
            except json.JSONDecodeError:  # status 200, but no JSON: to be asked for again
                return None

        reply = self.request(send)
        choice = (getattr(reply, "choices", None) or [None])[0]
        if not getattr(choice, "message", None):
            return "", {"fault": "the endpoint sent no message"}
        usage, used = {"model": reply.model}, reply.usage
        if used:
            usage["tokens_in"] = used.prompt_tokens or 0
            # thoughts are billed, but not every endpoint counts them as completion
            usage["tokens_out"] = max(used.completion_tokens or 0,
                                      (used.total_tokens or 0) - usage["tokens_in"])
            text = len(instructions) + sum(len(x.get("text", "")) for x in content)
            pictures = sum(x["type"] != "text" for x in content)
            if usage["tokens_in"] < text / 5 + 20 * pictures:  # English: 4 to 5 characters a token
                log.warning("    only %d tokens for %d characters and %d pictures: does %s drop "
                            "the media?", usage["tokens_in"], text, pictures, self.host)
        if choice.message.refusal or choice.finish_reason not in ("stop", None):
            usage["fault"] = choice.message.refusal or f"finish_reason {choice.finish_reason}"
        text = choice.message.content
        return text if isinstance(text, str) else "", usage

    def encode(self, part) -> list[dict]:
        """A part as content: text, a JPEG, or a clip as sampled frames or as an MP4.

        [D12] Paper: Gemini gets the raw video. Here: sampled frames, as any other VLM; `video` is
        an option. Because: OpenAI-compatible endpoints do not document how to send one."""
        if isinstance(part, str):
            return [{"type": "text", "text": part}]
        if isinstance(part, Clip) and self.video_input == "frames":
            return [piece for i in sample(part, self.verify_fps) for x in (
                f"Frame at {i / part.fps:.2f} s:", part.frames[i]) for piece in self.encode(x)]
        kind, mime, data = "image_url", "image/jpeg", part
        if isinstance(part, Clip):  # Google is said to take videos as image_url
            kind, mime = kind if "googleapis" in self.host else "video_url", "video/mp4"
        data = encode_video(part) if isinstance(part, Clip) else encode_jpeg(part)
        url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        return [{"type": kind, kind: {"url": url}}]


def web_address(url: str) -> str:
    """The URL, if it is one and holds no secret. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError("must look like http://HOST:PORT/v1")
    if "@" in parts.netloc or parts.query:
        raise ValueError("must be without user, password and query: a key is for OPENAI_API_KEY")
    return url


def redact(text: str) -> str:
    """The text without what the environment says is a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|TOKEN|SECRET|PASSW", name.upper()):
            text = text.replace(value, "***")
    return text


def sample(clip: Clip, per_second: float) -> list[int]:
    """Frame numbers at about that rate, evenly spread, the first and the last among them (A.1)."""
    last = len(clip.frames) - 1
    steps = max(1, min(last, round(clip.seconds * per_second)))
    return [round(i * last / steps) for i in range(steps + 1)]


# ===================================================================================== VGM


@settings(config=finite, eq=False)
class Wan:
    """Any Wan image-to-video checkpoint of diffusers as `vgm`, two experts or one. At most 832x480
    pixels of area, aspect ratio kept, never upscaled (App. A.1)."""

    vgm: str = Field(
        default="Video-Reason/VBVR-Wan2.2",
        description="hub id, diffusers folder or FILE.py:NAME for a callable of your own (A.1)")
    offload: Literal["auto", "none", "model", "group"] = Field(
        default="auto", description="weights that wait in main memory")
    fps: int = Field(default=16, ge=1, le=240, description="frames per second (App. A.1)")
    sampling_steps: int = Field(default=20, ge=1, description="denoising steps (App. A.1)")
    guidance_scale: float = Field(default=5.0, ge=0, description="CFG, of both experts (App. A.1)")

    @property
    def identity(self) -> dict:
        names = ("vgm", "fps", "sampling_steps", "guidance_scale")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def weights(self) -> dict[str, float]:
        """GB of safetensors in each component, of the folder or on the hub. Raises Problem."""
        import huggingface_hub as hub

        folder, files = Path(self.vgm), []
        with contextlib.suppress(OSError, ValueError):  # what was downloaded before
            if not folder.is_dir():
                folder = Path(hub.snapshot_download(self.vgm, local_files_only=True))
        if folder.is_dir():
            files = [(p.parent.name, p.stat().st_size) for p in folder.glob("*/*.safetensors")]
        else:
            try:
                info = hub.HfApi().model_info(self.vgm, files_metadata=True)
            except Exception as error:  # noqa: BLE001 - of the HTTP library beneath, too
                raise Problem(f"{self.vgm} is no folder here and not to be had from the hub "
                              f"({first_line(error)}); offline there is {OFFLINE}") from None
            files = [(s.rfilename.split("/")[0], s.size) for s in info.siblings
                     if re.fullmatch(r"[^/]+/[^/]+\.safetensors", s.rfilename)]
        if not files:
            raise Problem(f"{self.vgm} is no diffusers checkpoint with weights in safetensors.")
        return {name: sum(n for part, n in files if part == name) / 1e9 for name, _ in files}

    def place(self) -> str:
        """Where the weights go: cpu, none (all on the GPU), model or group offload. Raises Problem
        if there is no place. It takes 12 GB for the work on one 480p clip, an estimate."""
        import psutil
        import torch

        cuda = torch.cuda.is_available()
        if not cuda and not Path(self.vgm).is_dir():
            raise Problem(f"{self.vgm} is no folder here, and a checkpoint from the hub needs a "
                          f"CUDA GPU, of which there is none; there is {OFFLINE}")
        need, largest = sum(self.weights.values()), max(self.weights.values())
        ram = psutil.virtual_memory().available / 1e9
        gpu = torch.cuda.mem_get_info()[0] / 1e9 if cuda else 0.0
        choice = self.offload if cuda else "cpu"
        if choice == "auto":
            choice = "none" if need + 12 < gpu else "model" if largest + 12 < gpu else "group"
        log.info("weights %.2f GB; free: GPU %.1f GB, memory %.1f GB; offload: %s",
                 need, gpu, ram, choice)
        if choice != "none" and need > min(ram, math.inf if cuda else 2):
            raise Problem(f"{self.vgm} is too large for this machine: {need:.0f} GB of weights; "
                          f"free are {gpu:.0f} GB of GPU memory and {ram:.0f} GB of memory.")
        return choice

    @functools.cached_property
    def pipe(self):
        """The diffusers pipeline, loaded when first needed."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it misses a part Wan needs not
        import torch
        from diffusers import WanImageToVideoPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        choice, watched = self.place(), sys.stderr.isatty()
        if not watched:  # progress bars are for eyes, not for files
            diffusers_logging.disable_progress_bar()
            transformers_logging.disable_progress_bar()
        dtype = {"default": torch.bfloat16, "vae": torch.float32}
        try:
            pipe = WanImageToVideoPipeline.from_pretrained(
                self.vgm, dtype=dtype, use_safetensors=True)
            if choice == "model":
                pipe.enable_model_cpu_offload()
            elif choice == "group":
                pipe.enable_group_offload(
                    torch.device("cuda"), offload_type="leaf_level", use_stream=True)
            else:
                pipe.to("cpu" if choice == "cpu" else "cuda")
        except Exception as error:  # a damaged file, no memory, a class that diffusers lacks
            raise Problem(f"{self.vgm} cannot be loaded ({first_line(error)}).") from error
        pipe.set_progress_bar_config(desc="    denoising", leave=False, disable=not watched)
        return pipe

    @functools.lru_cache(16)  # noqa: B019 - a run has one
    def embed(self, prompt: str):
        """The text encoder's output, computed once per prompt."""
        length = min(512, self.pipe.tokenizer.model_max_length)
        return self.pipe.encode_prompt(prompt, None, False, max_sequence_length=length)[0]

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip. Raises ValueError if it is not finite, and whatever diffusers raises.

        [D9] Paper: 96 frames for 6 s, 48 for 3 s. Here: 97 and 49. Because: Wan makes 4k + 1, of
        which the first is the conditioning frame."""
        import numpy as np
        import torch
        from PIL import Image

        patch = (self.pipe.transformer or self.pipe.transformer_2).config.patch_size[1]
        size = fit(frame.shape[1], frame.shape[0], self.pipe.vae_scale_factor_spatial * patch)
        image = Image.fromarray(frame)
        with torch.no_grad():
            video = self.pipe(
                image=image.resize(size, Image.Resampling.LANCZOS),  # a copy if it fits already
                width=size[0], height=size[1],
                num_frames=4 * int(seconds * self.fps / 4 + 1e-6) + 1,
                prompt_embeds=self.embed(prompt), negative_prompt_embeds=self.embed(""),
                num_inference_steps=self.sampling_steps, guidance_scale=self.guidance_scale,
                generator=torch.Generator().manual_seed(seed), output_type="np").frames[0]
        if not np.isfinite(video).all():
            raise ValueError("the clip holds values that are not finite")
        return Clip((video * 255).round().astype(np.uint8), self.fps)


def fit(width: int, height: int, multiple: int) -> tuple[int, int]:
    """The largest size of about this shape in 832x480 pixels of area, never larger than given."""
    scale = min(1.0, math.sqrt(832 * 480 / (width * height)))
    w, h = (max(1, int(x * scale / multiple + 1e-6)) * multiple for x in (width, height))
    return w, h


# ================================================================================= Journal


class Journal:
    """Nothing that was paid for is lost: the outcome of each call, under a hash of its request.

    Without a folder it keeps nothing. `prepare` is called before a call that it cannot answer."""

    def __init__(self, folder: Path | None = None, prepare=lambda: None):
        self.folder, self.prepare = folder, prepare
        self.seen: Counter[tuple[str, str]] = Counter()
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def key(self, role: str, *request) -> str:
        """The role and a hash of the request and of how many equal ones came before it."""
        sha = hashlib.sha256()

        def feed(x):
            if isinstance(x, Clip):
                x = [x.frames, x.fps]
            if isinstance(x, (list, tuple)):
                sha.update(f"{len(x)} parts".encode())
                for y in x:
                    feed(y)
                return
            data = x if hasattr(x, "shape") else json.dumps(x, sort_keys=True).encode()
            sha.update(f"{getattr(x, 'shape', type(x))} {len(data)} ".encode())
            sha.update(in_a_row(data))

        feed(request)
        self.seen[role, sha.hexdigest()] += 1
        feed(self.seen[role, sha.hexdigest()])
        return f"{role}-{sha.hexdigest()[:20]}"

    def clip_name(self, key: str) -> str | None:
        return f"{self.folder.name}/{key}.avi" if self.folder else None

    def write(self, key: str, entry: dict, clip: Clip | None = None) -> None:
        """The clip first, then the entry that vouches for it: alone it counts as missing. Raises
        OSError."""
        if not self.folder:
            return
        if clip:
            put(self.folder / f"{key}.avi", encode_video(clip, lossless=True))
            entry |= {"fps": clip.fps, "sha256": sha256(clip.frames)}
        body = json.dumps(entry).encode()
        write_file(self.folder / f"{key}.json", f"{sha256(body)}\n".encode() + body)

    def read(self, key: str) -> tuple[dict, Clip | None] | None:
        """The entry and its clip. A damaged one counts as missing, with a warning."""
        path = self.folder and self.folder / f"{key}.json"
        if not path or not path.exists():
            return None
        check, _, body = path.read_bytes().partition(b"\n")
        if check.decode(errors="replace") != sha256(body):
            log.warning("    %s is damaged: its call will be made again", path.name)
            return None
        entry = json.loads(body)
        if "sha256" not in entry:
            return entry, None
        import av
        import imageio.v3 as iio

        try:
            frames = iio.imread(path.with_suffix(".avi"), plugin="pyav")
        except (OSError, av.FFmpegError):
            frames = b""
        if sha256(frames) == entry.pop("sha256"):
            return entry, Clip(frames, entry["fps"])
        log.warning("    %s.avi is damaged: it will be generated again", key)
        return entry, None


def sha256(data) -> str:
    return hashlib.sha256(in_a_row(data)).hexdigest()


def in_a_row(data) -> memoryview | bytes:
    """The bytes of a buffer, copied only if they have gaps."""
    view = memoryview(data)
    return view if view.c_contiguous else view.tobytes()


# ======================================================================== Pictures and video


def load_image(path: str):
    """A picture as uint8 RGB (H, W, 3): turned as EXIF says, alpha on white, 16 bits to 8.

    Raises Problem if it is missing, no picture, below 16 pixels a side or over 50 million."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if min(image.size) < 16 or math.prod(image.size) > 50e6:
                raise Problem(f"{path} has {image.size[0]} x {image.size[1]} pixels; it takes 16 a "
                              "side at least and 50 million in all at most.")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                wide = np.asarray(image).clip(0, 65535)
                image = Image.fromarray((wide / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Problem(f"{path} cannot be read as a picture ({first_line(error)}).") from None


def ssim(a, b) -> float:
    """Structural similarity (Wang et al. 2004) of two pictures, uint8 RGB, brought to the size of
    the second: of their grey values, the mean over windows of 8 x 8 pixels."""
    import numpy as np
    from PIL import Image

    rows, columns = (max(n // 8, 1) for n in b.shape[:2])

    def windows(image):  # (k, 64)
        grey = Image.fromarray(image).convert("L").resize((columns * 8, rows * 8))
        grey = np.asarray(grey, float).reshape(rows, 8, columns, 8)
        return grey.swapaxes(1, 2).reshape(-1, 64)

    x, y = windows(a), windows(b)
    mx, my, c1, c2 = x.mean(1), y.mean(1), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = (x * y).mean(1) - mx * my
    alike = (2 * mx * my + c1) * (2 * covariance + c2)
    return float((alike / ((mx**2 + my**2 + c1) * (x.var(1) + y.var(1) + c2))).mean())


def encode_jpeg(frame) -> bytes:
    """A picture as the VLM gets it: JPEG, at most 1024 pixels a side."""
    from PIL import Image

    image, out = Image.fromarray(frame), io.BytesIO()
    image.thumbnail((1024, 1024))
    image.save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


def encode_video(clip: Clip, lossless: bool = False) -> bytes:
    """H.264 in MP4 that plays anywhere (sides made even), or bit for bit in AVI: FFV1, and below
    8 MB raw, where a codec would take more time than disk."""
    import av
    import numpy as np

    container, codec, pixels = "mp4", "libx264", "yuv420p"
    options = {"crf": "18", "x264-params": "mbtree=0"}  # mbtree: not the same bits every time
    frames, out = clip.frames, io.BytesIO()
    if lossless:
        small = frames.nbytes < 2**23
        container, options = "avi", {}
        codec, pixels = ("rawvideo", "bgr24") if small else ("ffv1", "bgr0")
    else:
        odd = [(0, n % 2) for n in frames.shape[1:3]]
        frames = np.pad(frames, [(0, 0), *odd, (0, 0)], "edge")
    with av.open(out, "w", container) as file:
        rate = Fraction(clip.fps).limit_denominator(1001)
        stream = file.add_stream(codec, rate, options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    return out.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """All of it or nothing, also if the power goes. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    put(temporary, data)
    temporary.replace(path)
    if os.name == "posix":  # the rename too
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def put(path: Path, data: bytes) -> None:
    """The data on the disk, not only in its cache. Raises OSError."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# ============================================================================ Command line

OFFLINE = "the offline example: python examples/maze/run.py"
PARTS = (Config, OpenAIVLM, Wan)


def parse(argv) -> argparse.Namespace:
    """The options of main, and one for every field of Config, OpenAIVLM and Wan."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise Problem(f"{message[:1].upper()}{message[1:]}; --help lists the options.")

    parser = Parser("collabvr.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--image", required=True, help="the input image I0")
    parser.add_argument("--task", required=True, help="the task prompt q")
    parser.add_argument("--out", type=Path, help="run folder, which resumes (runs/IMAGE-HASH)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, generate nothing")
    parser.add_argument("--vgm-arg", action="append", default=[], metavar="NAME=VALUE",
                        help="what the class in --vgm FILE.py:NAME is built with")
    for name, f in (item for part in PARTS for item in options(part).items()):
        values = "|".join(get_args(f.annotation)) if get_origin(f.annotation) is Literal else "X"
        default = "" if f.default_factory else f" [{'none' if f.default is None else f.default}]"
        parser.add_argument(flag(name), dest=name, metavar=values, help=f.description + default)
    return parser.parse_args(argv)


def options(part: Any) -> dict:
    """The fields of Config, OpenAIVLM or Wan by name."""
    return part.__pydantic_fields__


def flag(name: str) -> str:
    return "--attempts" if name == "M" else "--" + name.replace("_", "-").lower()


def build(part, typed: dict):
    """Config, OpenAIVLM or Wan from what was typed or came with the checkpoint. Raises Problem."""
    mine = {k: None if v == "none" and k != "offload" else v for k, v in typed.items()
            if k in options(part)}
    try:
        return part(**mine)
    except ValidationError as error:
        e = error.errors()[0]
        said = "" if e["loc"] == ("vlm_url",) else f" {e['input']}"  # it may hold a password
        raise Problem(f"{flag(str(e['loc'][0]))}{said}: {e['msg']}.") from None


def carried(path: Path) -> dict:
    """The options that a checkpoint folder brings along. Raises Problem."""
    if not path.is_file():
        return {}
    try:
        brought = json.loads(path.read_text())
        if unknown := set(brought) - {name for part in PARTS for name in options(part)}:
            raise ValueError(f"no such option: {', '.join(map(str, unknown))}")
        return dict(brought)
    except (ValueError, TypeError) as error:
        raise Problem(f"{path} holds no options ({first_line(error)}).") from None


def load_callable(name: str, arguments: list[str]):
    """A generator from FILE.py:NAME: a class is built with the arguments. Raises Problem."""
    file, _, attribute = name.rpartition(":")
    sys.modules.setdefault("collabvr", sys.modules[__name__])  # the file may import us
    try:
        spec = importlib.util.spec_from_file_location(f"vgm_{Path(file).stem}", file)
        assert spec and spec.loader  # as for any .py
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        made = getattr(module, attribute)
        if isinstance(made, type):
            made = made(**dict(a.split("=", 1) for a in arguments))
        with contextlib.suppress(AttributeError):  # slots
            vars(made).setdefault("identity", {"vgm": name, "vgm_arg": arguments})
        return made
    except Exception as error:  # it is the user's code, whatever it raises
        raise Problem(f"--vgm {name} cannot be loaded ({first_line(error)}).") from error


def claim(out: Path, identity: dict):
    """Takes the run folder's lock. Raises Problem if it is in use or another run's."""
    import filelock

    (out / "journal").mkdir(parents=True, exist_ok=True)
    path, mine = out / "journal" / "run.json", json.dumps(identity).encode()
    if path.exists() and path.read_bytes() != mine:
        raise Problem(f"{out} belongs to a run with another image or task: choose another --out.")
    lock = filelock.FileLock(out / "journal" / "lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise Problem(f"Another process is at work in {out}: choose another --out.") from None
    write_file(path, mine)
    return lock


def printable(text: str) -> str:
    """The text without what could steer a terminal: models and files wrote some of it."""
    return "".join(x if x.isprintable() else "\N{REPLACEMENT CHARACTER}" for x in text)


class Plain(logging.Formatter):
    def format(self, record):
        return printable(super().format(record))


def main(argv=None) -> int:
    """The command line. Returns 0: a video was made; 2: something was wrong before any model was
    called; 1: something failed later; 130: interrupted."""
    screen = logging.StreamHandler()
    screen.setFormatter(Plain("%(message)s"))
    logging.basicConfig(handlers=[screen])
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    run = lock = None
    out: Path | None = None
    called: list[bool] = []
    try:
        args = parse(argv)
        typed = {k: v for part in PARTS for k in options(part)
                 if (v := getattr(args, k)) is not None}
        I0, q = load_image(args.image), args.task.strip()
        if not q.encode(errors="ignore").strip() or q != q.encode(errors="replace").decode():
            raise Problem("The task is empty or no text: say what the video should show.")
        name = typed.get("vgm", options(Wan)["vgm"].default)
        typed = carried(Path(name, "collabvr.json")) | typed
        config, vlm = build(Config, typed), build(OpenAIVLM, typed)
        vgm = load_callable(name, args.vgm_arg) if ".py:" in name else build(Wan, typed)
        pixels = sha256(repr(I0.shape).encode() + I0.tobytes())
        stem = re.sub(r"[^-\w]", "_", Path(args.image).stem)[:60]
        out = args.out or Path("runs", f"{stem}-{sha256((pixels + q).encode())[:8]}")
        chosen = asdict(config) | vlm.identity | {"vlm_host": vlm.host}
        chosen |= getattr(vgm, "identity", {})
        chosen |= {"vgm": name, "vgm_arg": [a.split("=")[0] for a in args.vgm_arg]}  # no secrets

        @functools.cache
        def prepare():  # before the first call that the journal cannot answer
            clips, seconds = config.worst_case()
            vlm.check()
            if isinstance(vgm, Wan):  # loaded now: a checkpoint that fails should cost no VLM call
                if vgm.fps * min(config.seconds_first, config.seconds_next) < 4:
                    raise Problem("A clip of Wan has five frames at least: raise --seconds-first, "
                                  "--seconds-next or --fps.")
                _ = vgm.place() if args.dry_run else vgm.pipe
            disk = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
            area = min(I0.shape[0] * I0.shape[1], 832 * 480)
            need = seconds * getattr(vgm, "fps", 24) * area * 3  # bytes before compression
            if shutil.disk_usage(disk).free < need:
                raise Problem(f"{disk} lacks the {need / 1e9:.1f} GB that the clips may take.")
            log.info("%s will see the pictures. At worst: %d clips, %.1f s of generated video.",
                     vlm.host, clips, seconds)
            called.append(not args.dry_run)

        if args.dry_run:
            prepare()
            print(json.dumps(chosen, indent=2))
            print("All checks passed; nothing was generated.")
            return 0
        lock = claim(out, {"image": pixels, "task": q})
        run = CollabVR(vgm, vlm, config, Journal(out / "journal", prepare))
        result = run.run(I0, q)
        write_file(out / "video.mp4", encode_video(result.video))
        trace = {"status": result.status, "unverified_steps": result.unverified_steps,
                 "image": args.image, "task": q, "config": chosen, "steps": result.steps,
                 "cost": asdict(result.cost), "models": result.models}
        text = json.dumps(trace, indent=2, ensure_ascii=False)
        write_file(out / "trace.json", text.encode(errors="backslashreplace"))  # odd file names
        (out / "partial.mp4").unlink(missing_ok=True)
        doubt = f", not verified: {result.unverified_steps}" * bool(result.unverified_steps)
        video = printable(str(out / "video.mp4"))
        print(f"status     {result.status}{doubt}\n{result.cost}\nvideo      {video}")
        return 0
    except KeyboardInterrupt:
        status, said = 130, "Interrupted."
    except (Problem, json.JSONDecodeError) as error:
        status, said = 1 if any(called) else 2, str(error)
    except OSError as error:
        status = 1 if any(called) else 2
        said = f"{error.strerror or error}: {error.filename or out}."
    finally:
        if lock:
            lock.release()
    print(f"collabvr: {printable(' '.join(said.split()))}", file=sys.stderr)
    if run and out and status != 2:
        if run.H:
            with contextlib.suppress(OSError):  # a full disk may be what ended the run
                write_file(out / "partial.mp4", encode_video(concat(run.H)))
                print(f"What was accepted so far is in {out / 'partial.mp4'}.", file=sys.stderr)
        print("Nothing paid for is lost: the same command goes on from here.", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
