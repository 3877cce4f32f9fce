"""What the paper compares CollabVR with (Sec. 4, Fig. 4, A.1), its two modules alone (Table 3), and
its routing of whole samples (A.5). Each method is a class, used like CollabVR:

    result = METHODS["pass4"](Models(vgm, vlm), Config()).run(I0, q)

| name     | class    | clips                                   | VLM calls                     |
|----------|----------|-----------------------------------------|-------------------------------|
| single   | Single   | 1, seed 1                               | 0                             |
| pass2, 4 | Pass2, 4 | k, seeds 1..k                           | 1 picker                      |
| videotpo | VideoTPO | 5, seeds 1 2 1 2 1                      | 2 critics                     |
| preplan  | Preplan  | 1 a milestone, at most N_max            | 1 planner                     |
| m1       | M1       | 1 a step                                | 1 planner a step              |
| m2       | M2       | M at most; the router may add one       | 1 verifier a clip, and router |
| routed   | Routed   | 1 for all; perhaps those of CollabVR    | 1 router, and CollabVR's      |
| collabvr | CollabVR | the method itself                       |                               |

Every clip counts in the cost. Where nothing is verified, the status is "unverified".
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, create_model, field_validator

import collabvr
from collabvr import (
    Attempt,
    CollabVR,
    Config,
    History,
    Models,
    Reply,
    Result,
    Word,
    concat,
)


class Single(CollabVR):
    """Single inference: one clip of step-1 length with seed 1, the task as its prompt. [D6]"""

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


class Pick(Reply):  # asked at the temperature of all roles [D15]
    reason: str
    best: int = Field(ge=1)


def pick_of(k: int) -> type[Pick]:
    """A Pick that cannot name a candidate which does not exist."""
    return create_model("Pick", __base__=Pick, best=(int, Field(ge=1, le=k)))


class Pass4(CollabVR):
    """k clips with the seeds 1..k; one call sees all of them and picks."""

    k = 4

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        seconds = self.config.seconds_first
        parts = [f"Task prompt: {q}", "Input image:", I0]
        clips = []
        for seed in range(1, self.k + 1):
            clips.append(self.models.generate(I0, q, seconds, seed=seed))
            parts += [f"Candidate {seed}:", clips[-1]]
        pick = self.models.ask("picker", PICKER, parts, pick_of(self.k))
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
    """Test-time prompt optimisation: two rounds of two clips and a rewritten prompt each, then one
    last clip. Nothing is selected."""

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
            prompt = self.models.ask("critic", CRITIC, parts, Critique).prompt
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
    milestones: list[Milestone] = Field(min_length=1)


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
        plan = self.models.ask("planner", PREPLANNER, parts, milestones_of(N_max))
        H, f = History(), I0
        for t, milestone in enumerate(plan.milestones, 1):
            c_t = self.g(f, milestone.instruction, t, 1)
            H.join(Attempt(t, milestone.instruction, c_t))
            f = c_t.frames[-1]
        return Result(concat(H.clips), "unverified", H.unverified)


# ------------------------------------------------------------------------------
# The two modules alone (Table 3)


class M1(CollabVR):
    """Progressive planning alone: every clip joins H unverified, and only the next planner call,
    which sees it, says whether the task is complete. [D14]"""

    def verify(self, *_):
        return "accept", None

    def is_complete(self, p, d) -> bool:
        return False


class M2(CollabVR):
    """Verification and evolution alone: one step, whose action is q. Nothing to split. [D14]"""

    def __init__(self, models: Models, config: Config | None = None):
        super().__init__(models, replace(config or Config(), N_max=1))

    def plan(self, I0, q: str, H: History, t: int):
        return q, collabvr.Plan(
            observation="",
            remaining_goal=q,
            task_complete=False,
            instruction=q,
            target_state="as the task prompt says",
            estimated_steps_remaining=1,
        )


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
    action: Annotated[Literal["keep", "loop"], Word]


class Routed(CollabVR):
    """One clip for the whole task; a router keeps it or goes on with Algorithm 1. [D16]

    The paper speaks of the same router as for a step. That one reads a verifier's diagnosis, which
    there is none of here, and answers with other actions: so this prompt is one of its own. The
    router's reason is not handed on: the loop begins as always. A clip that is kept was checked by
    no verifier: its status is "unverified".
    """

    def run(self, I0, q: str) -> Result:
        I0 = self.models.begin(I0, q)
        clip = self.models.generate(I0, q, self.config.seconds_first)
        parts = [f"Task prompt: {q}", "Input image:", I0, "Clip:", clip]
        r = self.models.ask("router", SAMPLE_ROUTER, parts, SampleRouting)
        if r.action == "keep":
            return Result(clip, "unverified", [1])
        return CollabVR(Begun(self.models), self.config).run(I0, q)


class Begun:
    """The models of a run that has begun: what follows in it may not begin another."""

    def __init__(self, models: Models):
        self.models = models

    def begin(self, I0, q: str):
        return I0

    def __getattr__(self, name: str):
        return getattr(self.models, name)


METHODS = {
    "single": Single, "pass2": Pass2, "pass4": Pass4, "videotpo": VideoTPO, "preplan": Preplan,
    "m1": M1, "m2": M2, "routed": Routed, "collabvr": CollabVR,
}
