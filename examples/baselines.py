"""What the paper compares CollabVR with (Sec. 4, Fig. 4, App. A.1), and its two modules alone
(Table 3): each is a class that, like CollabVR, is made of models and settings and has a `run`.

    result = METHODS["pass4"](Models(vgm, vlm), Config()).run(I0, q)

Counting, the journal and the asking again come with `Models`, and every clip counts. The status is
"unverified" for the methods that check nothing. examples/maze/compare.py runs them all.
"""
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pydantic import Field

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from collabvr import Attempt, CollabVR, Config, History, Models, Reply, Result


class Single(CollabVR):
    """Single inference: one clip of step-1 length with seed 1, the task as its prompt; no VLM."""

    def run(self, I0, q: str) -> Result:
        clip = self.models.generate(I0, q, self.config.seconds_first, seed=1)
        return Result(clip, "unverified", [1])


class Pass4(CollabVR):
    """Pass@k: k clips with the seeds 1..k; one call sees all of them and picks. Its reply is in the
    trace, the candidates being numbered as the clips are."""

    k = 4
    PICKER = """\
You choose between videos that an image-to-video generator made for one and the same task. You get
the task prompt, the input image and all candidates, numbered from 1.

- What counts is whether the task is done at the end, by a way that the task allows.
- If several do it, take the one with the fewest faults on the way. If none does, take the one that
  comes closest.

Reply with one JSON object with the fields reason, best (the number of the candidate).
"""

    def run(self, I0, q: str) -> Result:
        class Pick(Reply):
            reason: str
            best: int = Field(ge=1, le=self.k)

        clips = [self.models.generate(I0, q, self.config.seconds_first, seed=seed)
                 for seed in range(1, self.k + 1)]
        pick = self.models.ask("picker", self.PICKER, [
            f"Task prompt: {q}", "Input image:", I0,
            *(part for i, clip in enumerate(clips, 1) for part in (f"Candidate {i}:", clip))], Pick)
        return Result(clips[pick.best - 1], "unverified", [1])


class Pass2(Pass4):
    k = 2


class VideoTPO(CollabVR):
    """Test-time prompt optimisation: two rounds of two clips (seeds 1, 2) and a rewritten prompt
    each, then one clip with seed 1. Five clips; nothing is selected."""

    CRITIC = """\
You improve the prompt of an image-to-video generator by looking at what it made of it. You get the
task prompt, the input image, the current prompt and the videos that were made with it, whole.

- critiques says of each video, in order, what is right and what goes wrong, and when.
- prompt is the new prompt: it keeps the task, keeps what worked, and says exactly and visibly what
  has to be different. One paragraph, for a generator that knows nothing but the image and it.

Reply with one JSON object with the fields critiques, prompt.
"""

    class Critique(Reply):
        critiques: list[str] = Field(min_length=1)
        prompt: str = Field(min_length=1)

    def run(self, I0, q: str) -> Result:
        prompt, seconds = q, self.config.seconds_first
        for _ in range(2):
            one, two = (self.models.generate(I0, prompt, seconds, seed=seed) for seed in (1, 2))
            prompt = self.models.ask("critic", self.CRITIC, [
                f"Task prompt: {q}", "Input image:", I0, f"Current prompt: {prompt}",
                "Candidate 1:", one, "Candidate 2:", two], self.Critique).prompt
        return Result(self.models.generate(I0, prompt, seconds, seed=1), "unverified", [1])


class Preplan(CollabVR):
    """Pre-planning: all milestones first, at most N_max; then one clip each, from the last frame of
    the one before (Fig. 4)."""

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
        instruction: str = Field(min_length=1)
        target_state: str

    def run(self, I0, q: str) -> Result:
        class Milestones(Reply):
            observation: str
            milestones: list[Preplan.Milestone] = Field(min_length=1, max_length=self.config.N_max)

        plan = self.models.ask("planner", self.PREPLANNER, [
            f"Task prompt: {q}", "Input image:", I0, f"Clips: at most {self.config.N_max}"],
            Milestones)
        H, f = History(), I0
        for t, milestone in enumerate(plan.milestones, 1):
            H.join(Attempt(t, milestone.instruction, self.g(f, milestone.instruction, t)))
            f = H.joined[-1].c_t.frames[-1]
        return H.result("unverified")


class M1(CollabVR):
    """Progressive planning alone: every clip joins H unverified, and only the next planner call,
    which sees it, says whether the task is complete."""

    def verify(self, *_):
        return "accept", None

    def is_complete(self, p, d) -> bool:
        return False


class M2(CollabVR):
    """Verification and evolution alone: one step, whose action is q. So no router can split it."""

    def __init__(self, models: Models, config: Config | None = None):
        super().__init__(models, replace(config or Config(), N_max=1))

    def plan(self, I0, q: str, H: History, t: int):
        return q, self.Plan(observation="", remaining_goal=q, task_complete=False,
                            instruction=q, target_state="as the task prompt says",
                            estimated_steps_remaining=1)


METHODS = {"single": Single, "pass2": Pass2, "pass4": Pass4, "videotpo": VideoTPO,
           "preplan": Preplan, "m1": M1, "m2": M2, "collabvr": CollabVR}
