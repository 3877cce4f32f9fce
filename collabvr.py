#!/usr/bin/env python3
"""CollabVR (arXiv 2605.08735v1): a VLM plans, checks and repairs what a video generator shows.

    python collabvr.py --image x.png --task "Move the circle to the square."  # Gemini and one GPU
    python collabvr.py .. --vlm-url http://localhost:8000/v1 --vlm Qwen/Qwen3.5-9B  # a VLM of yours
    python examples/maze/run.py                              # no GPU, no key, no network: a maze
    CollabVR(Models(vgm, vlm), Config(N_max=3, M=3)).run(I0, q)       # with any two callables

Paper                                             here, from the top
Sec. 3.1  problem and symbols                     Config, Clip, concat, History, Result
Alg. 1    the loop                                CollabVR.run
Sec. 3.2  M1, progressive planning (A.2)          CollabVR: PLANNER, Plan, plan
Sec. 3.3  M2, verification and evolution (A.2)    CollabVR: VERIFIER, Verification, verify, evolve
App. A.5  failure router (D.5: regen)             CollabVR: ROUTER, Routing, exhausted
App. A.1  settings                                defaults of Config, OpenAIVLM and Wan
Sec. 4    cost                                    Models.cost

[Dn] marks a departure from the paper; the table in README.md says what and why.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import filelock
import jiter
import numpy as np
from PIL import Image, ImageOps
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass as settings  # checks its fields

log = logging.getLogger("collabvr")
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)  # in the name of a variable
checked: Any = {"extra": "forbid", "allow_inf_nan": False, "validate_default": True}  # of pydantic


class Problem(Exception):
    """One sentence for the user: what is wrong and what to do."""


# ============================================================== Sec. 3.1 Problem formulation
@settings(frozen=True, config=checked)
class Config:
    """Settings of the method. Seconds are seconds of video."""
    N_max: Annotated[int, Field(ge=1, le=1000)] = 3  # planning steps at most (App. A.1)
    M: Annotated[int, Field(ge=1, le=1000)] = 3  # attempts per step (App. A.1)
    # after M rejections: a router (App. A.5), Algorithm 1 to the letter, or the best attempt (C.2)
    on_exhausted: Literal["route", "replan", "best"] = "route"
    seconds_first: Annotated[float, Field(gt=0, le=600)] = 6.0  # clips of step 1, s (A.1, Gen-ViRe)
    seconds_next: Annotated[float, Field(gt=0, le=600)] = 3.0  # clips of later steps, s (A.1)

    def seconds(self, t: int) -> float:
        """How long every clip of step t is, re-generations included. [D8]"""
        return self.seconds_first if t == 1 else self.seconds_next

    def worst_case(self) -> tuple[int, float, int]:
        """(clips, seconds of video, VLM calls) if every clip is rejected and no call fails."""
        N, M, routed = self.N_max, self.M, int(self.on_exhausted == "route")
        steps = self.seconds_first + (N - 1) * self.seconds_next
        extra = steps + max(self.seconds_first - self.seconds(N), 0)  # regens, at last a fallback
        return N * (M + routed), steps * M + extra * routed, N * (1 + M + 2 * routed)


@dataclass(frozen=True, eq=False)
class Clip:
    """A video. frames: uint8 RGB (T, H, W, 3), of which frame 0 is the conditioning frame."""
    frames: np.ndarray
    fps: float

    @property
    def seconds(self) -> float:
        """Seconds of new video: frame 0 was there before."""
        return (len(self.frames) - 1) / self.fps


def concat(clips: list[Clip]) -> Clip:
    """c_1 ⊕ .. ⊕ c_t. A later clip's frame 0 repeats the frame before it and is dropped. [D8]"""
    return Clip(np.concatenate([clips[0].frames, *(c.frames[1:] for c in clips[1:])]), clips[0].fps)


@dataclass(frozen=True)
class Attempt:
    """A clip c_t of step t, its prompt a_t as it stood, and the diagnosis."""
    t: int
    a_t: str
    c_t: Clip
    d: Any = None  # a CollabVR.Verification; None: not verified


@dataclass
class History:
    """H: attempts whose clips joined; those rejected since; what came of each step, in words."""
    joined: list[Attempt] = field(default_factory=list)
    rejected: list[Attempt] = field(default_factory=list)
    outcomes: list[str] = field(default_factory=list)

    def join(self, x: Attempt) -> None:
        """Its clip joins; what was not accepted is not called so."""
        words = ("not verified" if not x.d else f"accepted, progress {x.d.progress}"
                 if x.d.verdict == "accept" else f"rejected, kept as the best one: {x.d.reason}")
        self.joined.append(x)
        self.rejected.clear()
        self.outcomes.append(f"Step {x.t}: {x.a_t} Outcome: {words}")

    def best(self, t: int | None = None) -> Attempt:
        """Of those rejected, or step t's of them, the latest with the most good seconds. [D3]"""
        return max((x for x in reversed(self.rejected) if t is None or x.t == t),
                   key=lambda x: x.d.good_fraction * x.c_t.seconds)

    def told(self) -> list:
        """What the roles get to know of H: every outcome, the newest eight last frames. [D7]"""
        frames = [(f"Last frame of step {x.t}:", x.c_t.frames[-1]) for x in self.joined[-8:]]
        return ["Steps so far:", *(self.outcomes or ["none"]), *sum(frames, ())]

    def result(self, status: str) -> Result:
        """What a run returns: all of H, or if it is empty the best attempt, marked so. [D4]"""
        if not self.joined:
            return History([self.best()]).result("best_attempt")
        unverified = [x.t for x in self.joined if not x.d or x.d.verdict == "reject"]
        return Result(concat([x.c_t for x in self.joined]), status, unverified)


@dataclass(frozen=True)
class Result:
    """V, and how it came about. status: complete, step_cap, fallback or best_attempt."""
    video: Clip
    status: str
    unverified_steps: list[int]  # steps whose clip is in the video without an accept


class Reply(BaseModel):
    """A role's reply, reasons before verdicts. A schema offers only what is allowed just then."""
    model_config = checked | {"strict": True}


# =============================================================================== Algorithm 1
@dataclass
class CollabVR:
    """Both models, behind one seam, and the settings. What a run knows stands in `run`."""
    models: Models
    config: Config = field(default_factory=Config)

    def run(self, I0, q: str) -> Result:
        """"Algorithm 1". I0: uint8 RGB (H, W, 3); q: task prompt. Raises Problem."""
        N_max, M = self.config.N_max, self.config.M                             # require
        H, f = History(), I0                                                    # line 1
        for t in range(1, N_max + 1):                                           # line 2
            a_t, p = self.plan(I0, q, H, t)                                     # line 3
            if p.task_complete:                                                 # [D1]
                return H.result("complete")
            for _ in range(M):                                                  # line 4
                c_t = self.g(f, a_t, t)                                         # line 5
                v, d = self.verify(I0, q, H, c_t, a_t, p, t)                    # line 6
                if v == "accept":                                               # line 7
                    H.join(Attempt(t, a_t, c_t, d))                             # line 8
                    f = c_t.frames[-1]                                          # line 9
                    if self.is_complete(p, d):                                  # line 10
                        return H.result("complete")                             # line 11
                    break                                                       # line 13
                H.rejected.append(Attempt(t, a_t, c_t, d))                      # line 14
                a_t = self.evolve(a_t, d)                                       # line 15
            else:
                H, f, status = self.exhausted(I0, q, H, f, p, t)                # [D3]
                if status:
                    return H.result(status)
        return H.result("step_cap")                                             # line 19

    def g(self, f, a_t: str, t: int) -> Clip:
        """Line 5: c_t = g(f, a_t)."""
        return self.models.generate(f, a_t, self.config.seconds(t), t)

    def is_complete(self, p: Plan, d: Verification) -> bool:
        """Line 10: the plan called step t its last one, and the clip shows it done. [D2]"""
        return p.estimated_steps_remaining <= 1 and d.progress == "complete"

    # ------------------------------------------------------- Sec. 3.2 Progressive planning (M1)
    PLANNER = """\
You plan for an image-to-video generator that works on a visual task in short clips, each of which
starts from the last frame of the one before. You get the task prompt, the input image and what has
really happened so far, and you plan the next action only.

- Look first: observation says what the current frame shows, not what was meant to happen.
- remaining_goal is what of the task is still to be done. If a clip was made and nothing is left to
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
        def _has_an_action(self):
            if not (self.task_complete or self.instruction.strip() and self.target_state.strip()):
                raise ValueError("an incomplete task needs an instruction and a target_state")
            return self

    class FirstPlan(Plan):
        task_complete: Literal[False]  # while H is empty

    def plan(self, I0, q: str, H: History, t: int) -> tuple[str, Plan]:
        """Line 3: a_t from π_plan(I0, q, H), and the plan that it is part of."""
        N_max = self.config.N_max
        digest(np.asarray(I0))  # a Problem if that is no picture, before anything is paid for
        p = self.models.ask("planner", self.PLANNER, [
            f"Task prompt: {q}", "Input image:", I0, *H.told(),
            f"Current frame: {'the last of these' if H.joined else 'the input image'}",
            f"Step: {t} of at most {N_max}{' (the last allowed step)' * (t == N_max)}",
            f"Clip length: {self.config.seconds(t):g} s",
        ], self.Plan if H.joined else self.FirstPlan, t)
        return p.instruction, p

    # ---------------------------------------- Sec. 3.3 Verification and prompt evolution (M2)
    VERIFIER = """\
You check one clip that an image-to-video generator made for one planned action of a longer task.
You get the task prompt, the input image, what came of the steps before, the action with its target
state, and the clip. Corrections at the action's end hold where they differ from its beginning.

- Judge the planned action only: does the right thing start to move or change, in the right way and
  direction, and does the clip end in agreement with the plan, even if short of the target state?
- Reject only for a fundamental error: wrong direction, object or action, or a scene that collapses
  or becomes another one. Partial progress, small artefacts and an unfinished task are no reasons.
- action_executed says whether the action happens, be it in part. progress is none, partial, or
  complete if the target state is reached. An accept needs both the action and some progress.
- good_fraction is how much of the clip, from its start, is right before the error: 0 to 1.
- When you reject, suggestion is one sentence for the generator: what to show instead.
Reply with one JSON object with the fields reason, action_executed, progress, good_fraction,
suggestion, confidence (low, medium or high), verdict (accept or reject).
"""

    class Verification(Reply):
        reason: str
        action_executed: bool
        progress: Literal["none", "partial", "complete"]
        good_fraction: float = Field(ge=0, le=1)
        suggestion: str
        confidence: Literal["low", "medium", "high"]
        verdict: Literal["accept", "reject"]

        @model_validator(mode="after")
        def _does_not_contradict_itself(self):
            if self.verdict == "accept" and not (self.action_executed and self.progress != "none"):
                raise ValueError("an accept needs action_executed true and progress not none")
            return self

    def verify(self, I0, q: str, H: History, c_t: Clip, a_t: str, p: Plan, t: int):
        """Line 6: (v, d) = π_verify(I0, q, H, c_t), of a_t as it stands, evolved."""
        d = self.models.ask("verifier", self.VERIFIER, [
            f"Task prompt: {q}", "Input image:", I0, *H.told(), f"Planned action: {a_t}",
            f"Target state: {p.target_state}", "Clip to check:", c_t,
        ], self.Verification, t)
        return d.verdict, d

    def evolve(self, a_t: str, d) -> str:
        """Line 15: the suggestion, else the reason, joins the prompt; no VLM call. [D5]"""
        return f"{a_t} Correction: {d.suggestion.strip() or d.reason.strip()}"

    # ------------------------------------------------------------- App. A.5 The failure router
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
        action: Literal["regen", "split", "fallback"]
        suggestion: str
        estimated_steps: int = Field(ge=0)

    class LastRouting(Routing):
        action: Literal["regen", "fallback"]  # at t = N_max no step is left to take up a split

    def exhausted(self, I0, q: str, H: History, f, p: Plan, t: int):
        """After M rejections of step t: the new (H, f), and a status if the run ends here. [D3]"""
        best, r, action = H.best(t), None, self.config.on_exhausted
        if action == "route":
            r = self.models.ask("router", self.ROUTER, [
                f"Task prompt: {q}", "Input image:", I0, *H.told(), f"Planned action: {best.a_t}",
                "Failed clip:", best.c_t, f"Reason: {best.d.reason}",
                f"Suggestion: {best.d.suggestion}", f"Good fraction: {best.d.good_fraction:.2f}",
                f"Allowed actions: regen, {'split, ' * (t < self.config.N_max)}fallback",
            ], self.Routing if t < self.config.N_max else self.LastRouting, t)
            action = r.action
        d = r if r and r.suggestion.strip() else best.d
        if action in ("replan", "split"):
            advice = r and f" Advice: {d.suggestion} Steps needed: {r.estimated_steps or '?'}."
            H.outcomes.append(f"Step {t}: {best.a_t} Outcome: rejected, nothing was kept: "
                              f"{best.d.reason}{advice or ''}")
            H.rejected[:] = [H.best()]  # all of them that may still be needed
            return H, f, None
        if action == "fallback":  # one single-shot run, N = 1: from I0, with q, not verified
            a_t = self.evolve(q, d)
            c_t = self.models.generate(I0, a_t, self.config.seconds_first, t)
            return History([Attempt(t, a_t, c_t)]), f, "fallback"
        if action == "regen":  # the good part survives (D.5), and the joined clip is verified
            k = math.floor(best.d.good_fraction * (len(best.c_t.frames) - 1))
            good, a_t = Clip(best.c_t.frames[: k + 1], best.c_t.fps), self.evolve(best.a_t, d)
            c_t = concat([good, self.g(good.frames[-1], a_t, t)])
            v, d = self.verify(I0, q, H, c_t, a_t, p, t)
            H.rejected.append(again := Attempt(t, a_t, c_t, d))
            best = again if v == "accept" else H.best(t)
        H.join(best)
        done = best.d.verdict == "accept" and self.is_complete(p, best.d)
        return H, best.c_t.frames[-1], "complete" if done else None


# ============================================================================= The two models
class Models:
    """The seam to both models, for one run: a call is counted, checked, repeated if it failed, and
    written down here, so that with the same folder nothing is paid for twice.

    vgm(frame, prompt, seconds, seed) -> Clip: frame is uint8 RGB (H, W, 3), frame 0 of the clip
        depicts it; raising anything but Problem is a failed generation.
    vlm(instructions, parts, schema) -> dict: `text` and, where known, `tokens_in`, `tokens_out`,
        `model`, `host`, and `fault` if the reply was cut off or refused. parts: strings, pictures
        and Clips in reading order; schema: the pydantic model that the reply must fit.
    Either may have `identity`, a dict of the settings that change its answers.
    folder: for calls.jsonl and clips/, by default a temporary one; locked till lock.release()."""

    def __init__(self, vgm, vlm, folder: str | Path | None = None, seed: int = 0):
        self.vgm, self.vlm, self.seed = vgm, vlm, seed
        self.temporary = tempfile.TemporaryDirectory()  # goes when self does
        self.folder = Path(folder or self.temporary.name)
        (self.folder / "clips").mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.folder / "lock")
        with explained(f"{self.folder} is in use, here or by another process", filelock.Timeout):
            self.lock.acquire(blocking=False)
        self.calls: list[dict] = []  # of this run, in order: its trace
        (path := self.folder / "calls.jsonl").touch()
        whole, newline, _ = path.read_bytes().rpartition(b"\n")  # _: torn by a power cut
        os.truncate(path, len(whole + newline))
        with explained(f"{path} is damaged: choose another folder", Exception):
            self.lines = [json.loads(x) for x in whole.splitlines()]  # of all starts
            self.unused = [x for x in self.lines if x["request"]]  # not replayed yet

    def generate(self, frame, prompt: str, seconds: float, t: int = 1, seed: int | None = None):
        """A clip for step t. A failed generation uses up no attempt and is tried once more with
        another seed; then Problem. seed: by default the run's plus clips tried so far. [D6]"""
        frame, failures, tries = np.asarray(frame), 0, 0
        while failures < 2:
            number = sum(x["role"] == "vgm" for x in self.calls)
            s = self.seed + number if seed is None else seed + 1000 * tries  # no other candidate's
            line, clip, new = self.call("vgm", t, [frame, prompt, seconds, s], self.film)
            if clip:
                return clip
            failures, tries = failures + new, tries + 1
        raise Problem(f"The generator failed twice in a row ({line['error']}).")

    def film(self, frame, prompt: str, seconds: float, seed: int) -> tuple[dict, Clip | None]:
        """Calls the generator. A clip is on the disk before the line that vouches for it."""
        line, began = {"prompt": prompt, "seed": seed}, time.monotonic()
        try:
            clip = self.vgm(np.array(frame), prompt, seconds, seed)  # a copy, theirs to write into
            line["wall_seconds"] = round(time.monotonic() - began, 3)
            x: Any = getattr(clip, "frames", None)
            if np.ndim(x) != 4 or x.dtype != np.uint8 or x.shape[3] != 3 or not x[1:].size:
                raise ValueError("a generator returns a Clip of uint8 frames (T > 1, H, W, 3), not "
                                 f"{type(clip).__name__} of {getattr(x, 'dtype', x)} {np.shape(x)}")
            clip = Clip(np.array(x), float(clip.fps))  # a copy: theirs may be a buffer
            size = [*x.shape[1:3], clip.fps]
            first = next((x["size"] for x in self.calls if "clip" in x), size)
            if size != first or not 0 < clip.fps < math.inf:
                raise ValueError(f"(H, W, fps) {size} does not go with the first clip's {first}")
        except Problem:
            raise
        except Exception as error:  # whatever it raises, the generation failed
            log.warning("the generation failed", exc_info=True)
            return line | {"error": f"{type(error).__name__}: {error}"[:400]}, None
        name = f"clips/{1 + sum('clip' in x for x in self.lines):03}.mkv"
        write_file(self.folder / name, encode_video(clip, lossless=True))
        return line | {"seconds": clip.seconds, "size": size, "clip": name}, clip

    def ask(self, role: str, instructions: str, parts: list, schema: type[Reply], t: int = 1):
        """A role's reply as `schema`. Asked for again, twice at most, if unfit; or Problem. [D9]"""
        fault, failures = "", 0
        while failures < 3:
            again = f"Your last reply could not be used: {fault}. Reply with the JSON object only."
            asked = [*parts, again] if fault else parts
            line, _, new = self.call(role, t, [instructions, asked, schema], self.answer)
            if "reply" in line:
                return schema.model_validate(line["reply"])
            fault, failures = line["fault"], failures + new
        raise Problem(f"The {role} gave no usable reply ({fault}): {line.get('text')!r:.300}")

    def answer(self, instructions: str, parts: list, schema: type[Reply]) -> tuple[dict, None]:
        """Asks; adds `reply`, from the first { to the last } after any </think>, or a `fault`."""
        answer = {k: v for k, v in self.vlm(instructions, parts, schema).items() if k != "reply"}
        text = str(answer.get("text") or "").rpartition("</think>")[2][:100_000]
        head = text.partition("{")[0]
        if answer.get("fault") or re.search(r"<think>|^\s*(```\w*)?\s*\[|\[\s*$", head):  # [ a list
            return answer | {"fault": answer.get("fault") or "no JSON object"}, None
        try:
            value = jiter.from_json(text[len(head) : text.rfind("}") + 1].encode(),
                                    catch_duplicate_keys=True, allow_inf_nan=False)
            return answer | {"reply": schema.model_validate(value).model_dump()}, None
        except ValueError as error:
            return answer | {"fault": first_line(error)}, None

    def call(self, role: str, t: int, request: list, make) -> tuple[dict, Clip | None, bool]:
        """The request's line, an earlier start's or new and synced; its clip; whether it is new."""
        model = self.vgm if role == "vgm" else self.vlm
        key = digest(role, request, getattr(model, "identity", {}))
        clip = None
        line = next((x for x in self.unused if x["request"] == key and (
            "clip" not in x or (clip := read_clip(self.folder, x)))), None)
        if new := line is None:
            log.info("step %d: %s: waiting", t, role)
            began = time.monotonic()
            made, clip = make(*request)
            line = {**made, "t": t, "role": role, "request": key}
            line.setdefault("wall_seconds", round(time.monotonic() - began, 3))
            text = clean(json.dumps(line, default=lambda x: getattr(x, "item", x.__repr__)()))
            with open(self.folder / "calls.jsonl", "a") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.lines.append(line := json.loads(text))
        self.unused = [x for x in self.unused if x is not line]
        self.calls.append(line | {"t": t})
        rest = {k: v for k, v in line.items() if k not in ("t", "role", "request", "text")}
        said = "; ".join(f"{k}: {v}" for k, v in line.get("reply", rest).items())
        log.info("step %d: %s: %s", t, role, said)
        return line, clip, new

    def cost(self) -> dict:
        """What the run's calls came to, whatever became of the clips (Sec. 4)."""
        clips = [x for x in self.calls if "clip" in x]
        steps = len({x["t"] for x in clips})
        roles = {x["role"]: [y for y in self.calls if y["role"] == x["role"]] for x in self.calls}
        return {"vgm_seconds": sum(x["seconds"] for x in clips), "clips": len(clips),
                "steps": steps, "regenerations": len(clips) - steps,
                "generator_errors": sum("error" in x for x in self.calls),
                "calls": {role: len(lines) for role, lines in roles.items()}} | {
            k: {role: round(sum(x.get(k) or 0 for x in lines), 3) for role, lines in roles.items()}
            for k in ("tokens_in", "tokens_out", "wall_seconds")}


def digest(*parts) -> str:
    """A hash of what a request is made of. Raises Problem for a picture that is no array."""
    def plain(x):
        if isinstance(x, type):  # a reply's schema
            return x.model_json_schema()
        if isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.ndim > 2 and x.shape[-1] == 3:
            return [x.shape, hashlib.sha256(np.ascontiguousarray(x)).hexdigest()]
        if isinstance(x, Clip):
            return [x.frames, float(x.fps)]
        raise Problem(f"A picture is a uint8 RGB array, not {getattr(x, 'dtype', type(x))}.")
    return hashlib.sha256(json.dumps(parts, default=plain).encode()).hexdigest()


# =================================================================================== VLM, VGM
GOOGLE = "https://generativelanguage.googleapis.com/v1beta/openai/"
URL = r"^https?://([-\w.]+|\[[\da-f:]+\])(:\d+)?(/[^@?#\s]*)?$"  # without password and query


@settings(config=checked, eq=False)
class OpenAIVLM:
    """Any OpenAI-compatible endpoint as `vlm`. Keys come from the environment when needed:
    GEMINI_API_KEY or GOOGLE_API_KEY for Google's host only, OPENAI_API_KEY for any other."""
    vlm: str = "gemini-2.5-pro"  # the VLM's model name (App. A.1)
    vlm_url: Annotated[str, Field(pattern=URL)] = GOOGLE  # base URL; of vLLM http://HOST:8000/v1
    temperature: Annotated[float, Field(ge=0)] | None = 0.2  # None: not sent (App. A.1)
    video_input: Literal["frames", "video"] = "frames"  # how it sees a clip; video: as MP4 [D10]
    verify_fps: Annotated[float, Field(gt=0)] = 1.0  # frames per second that it sees (App. A.1)
    # more fields for each request, a JSON object
    request_extra: Annotated[str, AfterValidator(TypeAdapter(dict).validate_json)] = "{}"
    timeout: Annotated[float, Field(gt=0)] = 600.0  # longest wait for one answer, s

    identity = property(lambda self: asdict(self) | {"vlm_url": None, "timeout": None})
    host = property(lambda self: self.vlm_url.split("/")[2])

    @contextlib.contextmanager
    def client(self, max_retries: int = 6):
        """An OpenAI client. Its errors become a Problem that names the URL, never the key."""
        import openai
        google = self.host.split(":")[0].lower() == GOOGLE.split("/")[2]
        names = ("GEMINI_API_KEY", "GOOGLE_API_KEY") if google else ("OPENAI_API_KEY",)
        keys = (os.environ.get(name, "").strip() for name in names)
        key = next(filter(None, keys), None if google else "none")
        if not key:
            raise Problem(f"No API key for {self.host}: set {names[0]}, or try examples/maze.")
        hint = "" if "/v1" in self.vlm_url else "; a base URL usually ends in /v1"
        with explained(f"{self.vlm_url} gave no usable answer{hint}", Exception):
            yield openai.OpenAI(api_key=key, base_url=self.vlm_url, max_retries=max_retries,
                                timeout=openai.Timeout(self.timeout, connect=8))

    def check(self) -> None:
        """Raises Problem if key, endpoint or model is missing; one not listed is asked a word."""
        import openai
        with self.client(max_retries=0) as client, contextlib.suppress(openai.APIStatusError):
            if self.vlm in [x.id.removeprefix("models/") for x in client.models.list()]:
                return
        with self.client(max_retries=1) as client:  # a new one: some hang up after a failed list
            client.chat.completions.create(
                model=self.vlm, messages=[{"role": "user", "content": "Reply with the word ok."}])

    def __call__(self, instructions: str, parts: list, schema: type[BaseModel]) -> dict:
        """See Models. Raises Problem when the endpoint gives up."""
        content = [piece for part in parts for piece in self.encode(part)]
        shape = {"name": schema.__name__, "schema": schema.model_json_schema(), "strict": True}
        heat = {} if self.temperature is None else {"temperature": self.temperature}
        answer: dict[str, Any] = {"text": "", "host": self.host}
        reply: Any = None
        with self.client() as client, contextlib.suppress(json.JSONDecodeError):
            reply = client.chat.completions.create(
                model=self.vlm, extra_body=self.request_extra, **heat,
                messages=[{"role": "system", "content": instructions},
                          {"role": "user", "content": content}],
                response_format={"type": "json_schema", "json_schema": shape})
        choice = (getattr(reply, "choices", None) or [None])[0]
        if not getattr(choice, "message", None):
            return answer | {"fault": "the endpoint sent no message"}
        if choice.message.refusal or choice.finish_reason not in ("stop", None):
            answer["fault"] = choice.message.refusal or f"finish_reason {choice.finish_reason}"
        if used := reply.usage:  # thoughts are billed, but some do not count them as completion
            n, pictures = used.prompt_tokens or 0, sum(x["type"] != "text" for x in content)
            answer["tokens_in"] = n
            answer["tokens_out"] = max(used.completion_tokens or 0, (used.total_tokens or 0) - n)
            if n < 20 * pictures + len(instructions) / 5:  # English: 4 to 5 characters a token
                log.warning("%d tokens for %d pictures: does %s drop them?", n, pictures, self.host)
        text = said if isinstance(said := choice.message.content, str) else ""
        return answer | {"model": reply.model, "text": text}

    def encode(self, part) -> list[dict]:
        """A part as content: text, a JPEG of up to 1024 pixels a side, sampled frames or an MP4."""
        if isinstance(part, str):
            return [{"type": "text", "text": part}]
        if isinstance(part, Clip) and self.video_input == "frames":
            return [piece for i in sample(part, self.verify_fps) for x in (
                f"Frame at {i / part.fps:.2f} s:", part.frames[i]) for piece in self.encode(x)]
        out, kind, mime = io.BytesIO(), "image_url", "image/jpeg"
        if isinstance(part, Clip):  # Google is said to take videos as image_url
            out.write(encode_video(part))
            kind, mime = "image_url" if "googleapis" in self.host else "video_url", "video/mp4"
        else:
            image = Image.fromarray(part)
            image.thumbnail((1024, 1024))
            image.save(out, "JPEG", quality=92, subsampling=0)
        url = f"data:{mime};base64,{base64.b64encode(out.getvalue()).decode()}"
        return [{"type": kind, kind: {"url": url}}]


def sample(clip: Clip, per_second: float) -> list[int]:
    """Frame numbers at about that rate, evenly spread, the first and the last among them (A.1)."""
    n = len(clip.frames) - 1
    steps = max(1, min(n, round(clip.seconds * per_second)))
    return [round(i * n / steps) for i in range(steps + 1)]


@settings(config=checked, eq=False)
class Wan:
    """Any Wan image-to-video checkpoint as `vgm`: at most 832x480 pixels, never upscaled (A.1)."""
    vgm: str = "Video-Reason/VBVR-Wan2.2"  # hub id, diffusers folder, or FILE.py:NAME of your own
    offload: Literal["auto", "none", "model", "group"] = "auto"  # weights that wait in main memory
    fps: Annotated[int, Field(ge=1, le=240)] = 16  # frames per second (App. A.1)
    sampling_steps: Annotated[int, Field(ge=1)] = 20  # denoising steps (App. A.1)
    guidance_scale: Annotated[float, Field(ge=0)] = 5.0  # CFG, of both experts (App. A.1)

    identity = property(lambda self: {k: v for k, v in asdict(self).items() if k != "offload"})

    def check(self, seconds: float) -> None:
        """Loads the checkpoint. Raises Problem if that fails, or for clips of that length."""
        if seconds * self.fps < 4:
            raise Problem(f"{seconds:g} s at {self.fps} fps is less than Wan's least, five frames.")
        _ = self.pipe

    @functools.cached_property
    def pipe(self):
        """The diffusers pipeline, loaded when first needed. Raises Problem."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it misses a part Wan needs not
        import diffusers
        import torch
        import transformers
        size = sum(x.stat().st_size for x in Path(self.vgm).glob("*/*.safetensors")) / 1e9
        if not torch.cuda.is_available() and not 0 < size < 2:
            raise Problem(f"{self.vgm} needs a CUDA GPU, or is no folder: try examples/maze/run.py")
        if not sys.stderr.isatty():  # progress bars are for eyes, not for files
            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
        with explained(f"{self.vgm} cannot be loaded", Exception):  # whatever loaders raise
            dtype = {"default": torch.bfloat16, "vae": torch.float32}
            pipe = diffusers.WanImageToVideoPipeline.from_pretrained(
                self.vgm, use_safetensors=True, dtype=dtype)
            self.place(pipe)
        pipe.set_progress_bar_config(desc="denoising", leave=False, disable=None)  # None: for eyes
        return pipe

    def place(self, pipe) -> None:
        """Puts the weights where they fit: all on the GPU, or only the part or layer at work."""
        import torch
        if not torch.cuda.is_available():
            return
        GB = [sum(x.numel() * x.element_size() for x in part.parameters()) / 1e9
              for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        free, choice = torch.cuda.mem_get_info()[0] / 1e9 - 12, self.offload  # 12: for the work
        if choice == "auto":
            choice = "none" if sum(GB) < free else "model" if max(GB) < free else "group"
        log.info("weights %.1f GB, room on the GPU %.1f GB: offload %s", sum(GB), free, choice)
        if choice == "none":
            pipe.to("cuda")
        elif choice == "model":
            pipe.enable_model_cpu_offload()
        else:
            pipe.enable_group_offload(
                torch.device("cuda"), offload_type="leaf_level", use_stream=True)

    def __call__(self, frame, prompt: str, seconds: float, seed: int) -> Clip:
        """A clip of 4k + 1 frames: 97 for 6 s, 49 for 3 s, the conditioning frame included. [D8]"""
        import torch
        patch = (self.pipe.transformer or self.pipe.transformer_2).config.patch_size[1]
        size = fit(frame.shape[1], frame.shape[0], self.pipe.vae_scale_factor_spatial * patch)
        video = self.pipe(
            image=Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), prompt=prompt,
            width=size[0], height=size[1], num_frames=4 * int(seconds * self.fps / 4 + 1e-6) + 1,
            num_inference_steps=self.sampling_steps, guidance_scale=self.guidance_scale,
            max_sequence_length=min(512, self.pipe.tokenizer.model_max_length),
            generator=torch.Generator().manual_seed(seed), output_type="np").frames[0]
        if not np.isfinite(video).all():
            raise ValueError("the clip holds values that are not finite")
        return Clip((video * 255).round().astype(np.uint8), self.fps)


def fit(width: int, height: int, multiple: int) -> tuple[int, int]:
    """About this shape in at most 832x480 pixels, never enlarged; a multiple a side at least."""
    scale = min(1.0, math.sqrt(832 * 480 / (width * height)))
    w, h = (max(1, int(x * scale / multiple + 1e-6)) * multiple for x in (width, height))
    return w, h


def load_generator(wan: Wan, given: dict[str, str]):
    """`wan`, or FILE.py:NAME in its place; a class gets what is given; an edited one is another."""
    if not given and not re.search(r"\.py(:|$)", wan.vgm):
        return wan
    file, _, name = wan.vgm.rpartition(":")
    sys.modules.setdefault("collabvr", sys.modules[__name__])  # the file may import us
    sys.path.append(str(Path(file).resolve().parent))  # and what lies beside it
    with explained(f"--vgm {wan.vgm} cannot be loaded as FILE.py:NAME", Exception):
        made = runpy.run_path(file, run_name="vgm")[name]
        vgm: Any = functools.partial(made(**given) if given or isinstance(made, type) else made)
        code = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    vgm.check = getattr(vgm.func, "check", lambda seconds: None)
    vgm.identity = {"name": name, "code": code, "is": getattr(vgm.func, "identity", given)}
    return vgm


# ====================================================================== Pictures, video, files
def load_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 RGB (H, W, 3), turned as EXIF says, alpha on white. Raises Problem."""
    with explained(f"{path} cannot be read as a picture", Exception), Image.open(path) as image:
        if min(image.size) < 16 or math.prod(image.size) > 50e6 or image.mode[0] in "IF":
            raise Problem(f"{path} needs 8 bits and 16 pixels a side, 50e6 at most: {image.size}.")
        upright = ImageOps.exif_transpose(image).convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return np.array(Image.alpha_composite(white, upright).convert("RGB"))


def encode_video(clip: Clip, lossless: bool = False) -> bytes:
    """H.264 that plays anywhere, a side below 256 enlarged as it halves colours; or exact FFV1."""
    frames, out = clip.frames, io.BytesIO()
    kind, codec, pixels, options = ("matroska", "ffv1", "bgr0", {}) if lossless else (
        "mp4", "libx264", "yuv420p", {"crf": "18", "x264-params": "mbtree=0"})  # mbtree: varies
    if not lossless:
        side = min(frames.shape[1:3])
        factor = 1 if side >= 256 else 2 * -(-128 // side)  # even: colours of 2x2 pixels stay apart
        frames = frames.repeat(factor, 1).repeat(factor, 2)
        frames = np.pad(frames, [(0, 0), *((0, n % 2) for n in frames.shape[1:3]), (0, 0)], "edge")
    with av.open(out, "w", kind) as file:
        stream: Any = file.add_stream(codec, Fraction(clip.fps).limit_denominator(1001), options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    return out.getvalue()


def read_clip(folder: Path, line: dict) -> Clip | None:
    """The clip that a line of calls.jsonl vouches for; None if it is missing or not whole."""
    import imageio.v3 as iio
    with contextlib.suppress(OSError, av.FFmpegError):
        clip = Clip(iio.imread(folder / line["clip"], plugin="pyav"), line["size"][2])
        return clip if clip.seconds == line["seconds"] else None
    return None


def write_file(path: Path, data: bytes) -> None:
    """All of it or nothing, also if the power goes. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save(outcome: Result, models: Models, **facts) -> Path:
    """Writes trace.json and video.mp4 into models.folder (a temporary one goes with `models`)."""
    trace = {"status": outcome.status, "unverified_steps": outcome.unverified_steps, **facts,
             "cost": models.cost(), "calls": models.calls}
    write_file(models.folder / "video.mp4", encode_video(outcome.video))
    write_file(models.folder / "trace.json", clean(json.dumps(trace, indent=2)).encode())
    return models.folder / "video.mp4"


@contextlib.contextmanager
def explained(what: str, *errors: type[Exception]):
    """Turns a library's errors into one sentence; a Problem goes through as it is."""
    try:
        yield
    except errors as error:
        raise error if isinstance(error, Problem) else Problem(f"{what} ({first_line(error)}).")


def first_line(error: Any) -> str:
    """An error in one short line; of pydantic's the first one, of an endpoint its whole body."""
    text = str(error).strip() or type(error).__name__
    if hasattr(error, "errors"):
        text = ": ".join([*map(str, error.errors()[0]["loc"]), error.errors()[0]["msg"]])
    if code := getattr(error, "status_code", 0):  # str() hides Google's bodies, which are lists
        text = f"{code}; {error.body}"
    return clean(text).splitlines()[0][:400]


def clean(text: str) -> str:
    """The text without what the environment calls a secret, and without what steers a terminal."""
    for name, value in os.environ.items():
        if len(value := value.strip()) >= 8 and SECRET.search(name):
            text = text.replace(value, "***")
    return "".join(x if x.isprintable() or x == "\n" else "\N{REPLACEMENT CHARACTER}" for x in text)


# ============================================================================== Command line
@settings(config=checked)
class Command:
    """CollabVR (arXiv 2605.08735v1): a VLM plans, checks and repairs a generator's video."""
    image: str  # the input image I0
    task: str  # the task prompt q
    config: Config
    vlm: OpenAIVLM
    vgm: Wan
    out: Path | None = None  # run folder, which resumes (default: runs/IMAGE-HASH)
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0  # seed of the first clip; later ones count up
    vgm_arg: list[str] = field(default_factory=list)  # NAME=TEXT for the class in FILE.py:NAME
    dry_run: bool = False  # check everything, load the weights, generate nothing

    def run(self, running: list[Models]) -> None:
        """Checks, runs, saves, tells. `running` gets the models as soon as they may be called."""
        config, vlm, wan, q = self.config, self.vlm, self.vgm, self.task.strip()
        if not q or q != q.encode(errors="replace").decode():
            raise Problem("The task is empty or no text: say what the video should show.")
        I0, given = load_image(self.image), dict(x.partition("=")[::2] for x in self.vgm_arg)
        shown = {k: "***" if SECRET.search(k) else v for k, v in given.items()}
        chosen = asdict(config) | asdict(vlm) | asdict(wan) | {"seed": self.seed, "vgm_arg": shown}
        vgm = load_generator(wan, given)
        stem = re.sub(r"[^-\w]", "_", clean(Path(self.image).stem))[:60]
        out = self.out or Path("runs", f"{stem}-{digest(I0, q, chosen)[:8]}")
        if self.dry_run or not any(x.stat().st_size for x in out.glob("calls.jsonl")):
            vlm.check()
            vgm.check(min(config.seconds_first, config.seconds_next))
            log.info("%s will see the pictures. At worst: %d clips, %.1f s of generated video, %d "
                     "VLM calls, and what fails.", vlm.host, *config.worst_case())
        if self.dry_run:
            return print(clean(json.dumps(chosen, indent=2)), "Nothing was generated.", sep="\n")
        models, start = Models(vgm, vlm, out, self.seed), out / "start.json"
        facts = {"input": digest(I0, q), "image": self.image, "task": q, "settings": chosen}
        if start.exists() and str(facts["input"]) not in start.read_text():
            raise Problem(f"{out} is a run with another image or task: choose another --out.")
        write_file(start, clean(json.dumps(facts)).encode())
        Image.fromarray(I0).save(out / "input.png")
        running.append(models)
        result = CollabVR(models, config).run(I0, q)
        told = {"status": result.status, "unverified_steps": result.unverified_steps,
                **models.cost(), "video": clean(str(save(result, models, **facts)))}
        print(*(f"{name:17} {value}" for name, value in told.items()), sep="\n")


def parse(argv, kind=Command, prog="collabvr.py"):
    """What was typed. Raises Problem, in the words of tyro's box, and SystemExit after --help."""
    import tyro
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        return tyro.cli(kind, args=argv, prog=prog, config=(
            tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction))
    told = said.getvalue() or sys.exit(0)  # nothing was wrong: it was --help
    text = re.split("[─-]{3,}", told)[1]  # what stands between the box's first two rules
    text = re.sub(r"(?s)[╮╰│]|\d+ validation errors? for \w+|\[type=.*", "", text)
    raise Problem(f"{' '.join(text.split())}; --help lists the options.")


def main(argv=None) -> int:
    """Returns 0: a video was made; 2: bad input, no model was called; 1: a fault; 130: Ctrl-C."""
    logging.basicConfig(handlers=[screen := logging.StreamHandler()])
    screen.format = lambda record: clean(logging.Formatter().format(record))  # type: ignore
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    running: list[Models] = []
    try:
        parse(argv).run(running)
        return 0
    except KeyboardInterrupt:
        status, said = 130, "Interrupted."
    except (Problem, OSError) as error:
        status, said = 1 if running else 2, " ".join(str(error).split())
    if running and running[0].lines:
        said += " What was paid for is kept: the same command goes on from here."
    print(f"collabvr: {clean(said)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
