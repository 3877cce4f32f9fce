"""What CollabVR is compared with: the paper's baselines, its parts alone, and two of our own.

    result = METHODS["pass4"](Models(vgm, vlm), Config()).run(I0, q)

| name       | paper   | clips                                | VLM calls                         |
|------------|---------|--------------------------------------|-----------------------------------|
| still      |         | 0: the video is the input picture    | 0                                 |
| single     | Sec. 4  | 1, seed 1                            | 0                                 |
| pass2, 4   | A.1     | k, seeds 1..k                        | 1 picker                          |
| videotpo   | A.1     | 5, seeds 1 2 1 2 1                   | 2 critics                         |
| preplan    | Fig. 4  | 1 a milestone, at most N_max         | 1 planner                         |
| m1         | Table 3 | 1 a step                             | 1 planner a step                  |
| m2         | Table 3 | at most M; the router may add one    | 1 verifier a clip; the router     |
| routed     | A.5     | 1, then perhaps those of collabvr    | 1 router, then those of collabvr  |
| backtrack  |         | at most N_max * M + N_max            | 1 verifier a clip; planners       |
| collabvr   | Alg. 1  | the method itself                    |                                   |

All clips count in the cost. Where nothing is verified, the status is "unverified".

Departures from the paper, or choices where it is silent:

- Picker and critic are asked at the temperature of all roles.
- M1: only the next plan, which sees the clip, can say that the task is complete. That ends the run.
- M2: the action is the task prompt. Nobody plans, so the router may not choose split.
- Routed: A.5 has the same router as for a step. That one reads a verifier's diagnosis, and here is
  none. So this one has a prompt of its own, answers keep or loop, and its reason is not handed on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, create_model, field_validator

from collabvr import (
    Attempt,
    Clip,
    CollabVR,
    Config,
    History,
    Models,
    Plan,
    Reply,
    Result,
    concat,
)


class Still(CollabVR):
    """The input picture as a film: the floor beside every score. No model is asked."""

    fps = 8

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        frames = 1 + round(self.fps * self.config.seconds_first)
        return Result(Clip(np.repeat(I0[None], frames, 0), self.fps), "unverified", [1])


class Single(CollabVR):
    """Single inference: one clip of step-1 length with seed 1, the task as its prompt."""

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        clip = self.models.generate(I0, q, self.config.seconds_first, seed=1)
        return Result(clip, "unverified", [1])


# ------------------------------------------------------------------------------
# Pass@k (A.1)


PICKER = """\
You choose between videos that an image-to-video generator made for one and the same task. You get
the task prompt, the input image and all candidates, numbered from 1.

- What counts is whether the task is done at the end, by a way that the task allows.
- If several do it, take the one with the fewest faults on the way. If none does, take the one that
  comes closest.

Reply with one JSON object with the fields reason, best (the number of the candidate).
"""


class Pick(Reply):
    reason: str
    best: int


def pick_of(k: int) -> type[Pick]:
    """A Pick that cannot name a candidate which does not exist."""
    return create_model("Pick", __base__=Pick, best=(int, Field(ge=1, le=k)))


class Pass4(CollabVR):
    """k clips with the seeds 1..k. One call sees all of them and picks."""

    k = 4

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        seconds = self.config.seconds_first
        parts = [f"Task prompt: {q}", "Input image:", I0]
        clips = []
        for seed in range(1, self.k + 1):
            clips.append(self.models.generate(I0, q, seconds, seed=seed))
            parts += [f"Candidate {seed}:", clips[-1]]
        pick = self.ask("picker", PICKER, parts, pick_of(self.k), 1)
        return Result(clips[pick.best - 1], "unverified", [1])


class Pass2(Pass4):
    k = 2


# ------------------------------------------------------------------------------
# VideoTPO (A.1)


CRITIC = """\
You improve the prompt of an image-to-video generator by looking at what it made of it. You get the
task prompt, the input image, the current prompt and the videos that were made with it, whole.

- critiques says of each video, in order, what is right and what goes wrong, and when.
- prompt is the new prompt: it keeps the task, keeps what worked, and says exactly and visibly what
  has to be different. One paragraph, for a generator that knows nothing but the image and it.

Reply with one JSON object with the fields critiques, prompt.
"""


def not_blank(text: str) -> str:
    """Checked here: engines turn a schema's minLength into a grammar that spoils texts."""
    if not text.strip():
        raise ValueError("must not be blank")
    return text


class Critique(Reply):
    critiques: list[str] = Field(min_length=1)
    prompt: str

    check = field_validator("prompt")(not_blank)


class VideoTPO(CollabVR):
    """Two rounds of two clips and a new prompt each, then one last clip. Nothing is picked."""

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        prompt, seconds = q, self.config.seconds_first
        for _ in range(2):
            one = self.models.generate(I0, prompt, seconds, seed=1)
            two = self.models.generate(I0, prompt, seconds, seed=2)
            parts = [
                f"Task prompt: {q}", "Input image:", I0,
                f"Current prompt: {prompt}",
                "Candidate 1:", one, "Candidate 2:", two,
            ]
            prompt = self.ask("critic", CRITIC, parts, Critique, 1).prompt
        return Result(self.models.generate(I0, prompt, seconds, seed=1), "unverified", [1])


# ------------------------------------------------------------------------------
# Pre-planning (Fig. 4)


PREPLANNER = """\
You plan for an image-to-video generator that works on a visual task in short clips. Every clip
starts from the last frame of the one before. You get the task prompt and the input image, and you
plan all clips now: nobody will look at what is generated before the end.

- observation says what the input image shows.
- milestones are the clips in order, as few as will do and never more than allowed. For each,
  instruction is one visible action that one short clip can show, and target_state what its last
  frame must show. The last milestone finishes the task.

Reply with one JSON object with the fields observation, milestones (a list of objects with the
fields instruction, target_state).
"""


class Milestone(Reply):
    instruction: str
    target_state: str

    check = field_validator("instruction")(not_blank)


class Milestones(Reply):
    observation: str
    milestones: list[Milestone]


def milestones_of(N_max: int) -> type[Milestones]:
    """Milestones that cannot be more than allowed."""
    allowed = Field(min_length=1, max_length=N_max)
    return create_model("Milestones", __base__=Milestones, milestones=(list[Milestone], allowed))


class Preplan(CollabVR):
    """All milestones first; then one clip each, from the last frame of the one before."""

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        N_max = self.config.N_max
        parts = [f"Task prompt: {q}", "Input image:", I0, f"Clips: at most {N_max}"]
        plan = self.ask("planner", PREPLANNER, parts, milestones_of(N_max), 1)
        H, f = History(), I0
        for t, milestone in enumerate(plan.milestones, 1):
            c_t = self.g(f, milestone.instruction, t, 1)
            H.join(Attempt(t, milestone.instruction, c_t))
            f = c_t.frames[-1]
        return Result(concat(H.clips), "unverified", H.unverified)


# ------------------------------------------------------------------------------
# The two modules alone (Table 3)


class M1(CollabVR):
    """Progressive planning alone: every clip joins H, and nobody verifies it."""

    def verify(self, *_):
        return "accept", None

    def is_complete(self, p, d) -> bool:
        return False


def whole_task(q: str, complete: bool) -> Plan:
    """A plan of one step, the task, without a planner."""
    return Plan(
        observation="",
        remaining_goal=q,
        task_complete=complete,
        instruction=q,
        target_state="as the task prompt says",
        estimated_steps_remaining=1,
    )


class M2(CollabVR):
    """Verification and evolution alone: one step, whose action is the task prompt."""

    def __init__(self, models: Models, config: Config | None = None):
        super().__init__(models, replace(config or Config(), N_max=1))

    def plan(self, I0, q: str, H: History, t: int):
        return q, whole_task(q, complete=False)


# ------------------------------------------------------------------------------
# The router asked once a sample (A.5, for Veo 3.1)


SAMPLE_ROUTER = """\
An image-to-video generator made one clip for a whole task. You decide, once, how to go on. You get
the task prompt, the input image and the clip.

- keep: the clip does what was asked for, or falls short in details only, and what a new one would
  gain is not worth what it may spoil.
- loop: the clip fails the task, or the task needs several actions or states in between. It is
  planned and generated anew, step by step, from the input image on.

Reply with one JSON object with the fields reason, action (keep or loop).
"""


class SampleRouting(Reply):
    reason: str
    action: Literal["keep", "loop"]


class Routed(CollabVR):
    """One clip for the whole task. A router keeps it, or goes on with Algorithm 1."""

    def plan(self, I0, q: str, H: History, t: int):
        """Before the first plan comes the clip, and the router's word."""
        if t == 1:
            clip = self.models.generate(I0, q, self.config.seconds_first)
            parts = [f"Task prompt: {q}", "Input image:", I0, "Clip:", clip]
            r = self.ask("router", SAMPLE_ROUTER, parts, SampleRouting, t)
            if r.action == "keep":
                H.join(Attempt(t, q, clip))
                return q, whole_task(q, complete=True)
        return super().plan(I0, q, H, t)

    def run(self, I0, q: str) -> Result:
        result = super().run(I0, q)
        planned = any(call.role == "planner" for call in self.models.calls)
        return result if planned else replace(result, status="unverified")


# ------------------------------------------------------------------------------
# Going back in time


class Backtrack(CollabVR):
    """After Temporal Backtracking Search (arXiv 2606.13861): generate, verify, go back, go on.

    The good part of a rejected clip joins H, and the step is planned again from its last frame.
    When that has failed twice, the last accepted clip and what followed it leave H. A run has
    N_max clips for this, as many as the router may order. The original searches a tree, with a
    generator that goes on from several frames.
    """

    def run(self, I0, q: str) -> Result:
        self.spare = self.config.N_max  # clips
        result = super().run(I0, q)
        steps = sorted(set(result.unverified_steps))  # a step may have several parts
        return replace(result, unverified_steps=steps)

    def exhausted(self, I0, q: str, H: History, f, p, best: Attempt):
        t, failures = best.t, 1
        f = self.go_back(I0, H, best, failures)
        while self.spare > 0:
            a_t, p = self.plan(I0, q, H, t)
            if p.task_complete:
                return f, Result(concat(H.clips), "complete", H.unverified)
            self.spare -= 1
            c_t = self.g(f, a_t, t, self.config.M + failures)
            v, d = self.verify(I0, q, H, c_t, a_t, p, t)
            attempt = Attempt(t, a_t, c_t, d)
            if v == "accept":
                H.join(attempt)
                done = self.is_complete(p, d)
                result = Result(concat(H.clips), "complete", H.unverified) if done else None
                return c_t.frames[-1], result
            failures += 1
            f = self.go_back(I0, H, attempt, failures)
        return f, None

    def go_back(self, I0, H: History, rejected: Attempt, failures: int):
        """The frame to go on from: the last good one or, each third time, one of a step before."""
        reason = rejected.d.reason
        if failures % 3 == 0:
            H.tell(rejected, f"rejected, and the last accepted clip is dropped: {reason}")
            while H.joined and not H.joined.pop().accepted:
                pass  # a part after it
        else:
            frames, fps = rejected.c_t.frames, rejected.c_t.fps
            k = math.floor(rejected.d.good_fraction * (len(frames) - 1) + 1e-6)  # last good frame
            good = Clip(frames[: k + 1], fps)
            H.tell(rejected, f"rejected, the first {good.seconds:g} s are kept: {reason}")
            if k > 0:
                H.joined.append(replace(rejected, c_t=good))
        return H.clips[-1].frames[-1] if H.joined else I0


METHODS = {
    "still": Still, "single": Single, "pass2": Pass2, "pass4": Pass4, "videotpo": VideoTPO,
    "preplan": Preplan, "m1": M1, "m2": M2, "routed": Routed, "backtrack": Backtrack,
    "collabvr": CollabVR,
}

if __name__ == "__main__":
    raise SystemExit("This is no program: python -m examples.bench.run --method NAME runs one.")
