"""What the paper compares CollabVR with (Sec. 4, Fig. 4, App. A.1), over the same two callables.

Each method is a function of (run, I0, q), where `run` is a `collabvr.CollabVR`: that brings the
counting, the journal and the asking again. All of them return a `Result`; every clip counts, and a
result says `unverified`, because none of these methods checks what it returns. examples/maze/
compare.py runs them all.

    run = CollabVR(vgm, vlm, Config())
    result = METHODS["pass4"](run, I0, q)
"""
from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from pydantic import Field, ValidationInfo, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from collabvr import Clip, CollabVR, Reply, Result, concat


def begin(run: CollabVR, role: str | None, instruction: str) -> float:
    """A fresh state with one step in it, and the VLM's role; returns the clips' length (s)."""
    run.begin()
    for table in (run.cost.vlm_calls, run.cost.tokens_in, run.cost.tokens_out,
                  run.cost.vlm_wall_seconds):
        table.clear()
        table.update({role: 0} if role else {})
    step(run, 1, instruction)
    return run.config.seconds_first


def step(run: CollabVR, t: int, instruction: str) -> None:
    """What is generated from now on belongs to step t."""
    run.steps.append({"t": t, "instruction": instruction, "attempts": [], "route": None})


def end(run: CollabVR, clips: list[Clip]) -> Result:
    return Result(concat(clips), "unverified", [s["t"] for s in run.steps], run.cost, run.steps,
                  run.models)


# ---------------------------------------------------------------------------- Single inference


def single(run: CollabVR, I0, q: str) -> Result:
    """One clip of step-1 length with the task as its prompt; no VLM."""
    seconds = begin(run, None, q)
    return end(run, [run.generate(I0, q, seconds)])


# -------------------------------------------------------------------------------------- Pass@k


class Pick(Reply):
    """The picker's reply. Context: k, the number of candidates."""

    reason: str
    best: int = Field(ge=1)

    @model_validator(mode="after")
    def _exists(self, info: ValidationInfo):
        if self.best > info.context["k"]:
            raise ValueError(f"best must be from 1 to {info.context['k']}")
        return self


PICKER = """\
You choose between videos that an image-to-video generator made for one and the same task. You get
the task prompt, the input image and all candidates, numbered from 1.

- What counts is whether the task is done at the end, by a way that the task allows.
- If several do it, take the one with the fewest faults on the way. If none does, take the one that
  comes closest.

Reply with one JSON object with the fields reason, best (the number of the candidate).
"""


def pass_at_k(run: CollabVR, I0, q: str, k: int) -> Result:
    """k clips with the seeds 1..k; one call sees all of them and picks."""
    seconds = begin(run, "picker", q)
    clips = [run.generate(I0, q, seconds, seed) for seed in range(1, k + 1)]
    parts = [x for i, clip in enumerate(clips, 1) for x in (f"Candidate {i}:", clip)]
    pick = run.ask("picker", PICKER, [f"Task prompt: {q}", "Input image:", I0, *parts], Pick, k=k)
    made = [a for a in run.steps[-1]["attempts"] if a["status"] == "unverified"]
    made[pick.best - 1] |= {"reason": pick.reason, "picked": True}
    return end(run, [clips[pick.best - 1]])


# ------------------------------------------------------------------------------------ VideoTPO


class Critique(Reply):
    """The critic's reply."""

    critiques: list[str] = Field(min_length=1)
    prompt: str = Field(min_length=1)


CRITIC = """\
You improve the prompt of an image-to-video generator by looking at what it made of it. You get the
task prompt, the input image, the current prompt and the videos that were made with it, whole.

- critiques says of each video, in order, what is right and what goes wrong, and when.
- prompt is the new prompt: it keeps the task, keeps what worked, and says exactly and visibly what
  has to be different. One paragraph, for a generator that knows nothing but the image and it.

Reply with one JSON object with the fields critiques, prompt.
"""


def video_tpo(run: CollabVR, I0, q: str, rounds: int = 2, seeds: int = 2) -> Result:
    """Test-time prompt optimisation: two rounds of two clips (seeds 1, 2) and a rewritten prompt
    each, then one clip with seed 1. Five clips; nothing is selected."""
    seconds, prompt = begin(run, "critic", q), q
    for _ in range(rounds):
        clips = [run.generate(I0, prompt, seconds, seed) for seed in range(1, seeds + 1)]
        parts = [x for i, clip in enumerate(clips, 1) for x in (f"Candidate {i}:", clip)]
        parts = [f"Task prompt: {q}", "Input image:", I0, f"Current prompt: {prompt}", *parts]
        prompt = run.ask("critic", CRITIC, parts, Critique).prompt
    return end(run, [run.generate(I0, prompt, seconds, 1)])


# -------------------------------------------------------------------------------- Pre-planning


class Milestone(Reply):
    instruction: str = Field(min_length=1)
    target_state: str


class Milestones(Reply):
    """The pre-planner's reply. Context: N, how many there may be."""

    observation: str
    milestones: list[Milestone] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self, info: ValidationInfo):
        if len(self.milestones) > info.context["N"]:
            raise ValueError(f"{info.context['N']} milestones at most")
        return self


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


def preplan(run: CollabVR, I0, q: str) -> Result:
    """All milestones first, at most N_max; then one clip each, from the last frame of the one
    before (Fig. 4)."""
    seconds, N = begin(run, "planner", q), run.config.N_max
    parts = [f"Task prompt: {q}", "Input image:", I0, f"Clips: at most {N}"]
    plan = run.ask("planner", PREPLANNER, parts, Milestones, N=N)
    H, f, run.steps[:] = [], I0, []
    for t, milestone in enumerate(plan.milestones, 1):
        step(run, t, milestone.instruction)
        H.append(run.generate(f, milestone.instruction, seconds))
        f, seconds = H[-1].frames[-1], run.config.seconds_next
    return end(run, H)


METHODS = {"single": single, "pass2": partial(pass_at_k, k=2), "pass4": partial(pass_at_k, k=4),
           "videotpo": video_tpo, "preplan": preplan}
