"""The oracle: a supervisor of the maze world that reads pixels by rule. It is no VLM.

It answers the roles of collabvr.py and of examples/baselines.py, and sees what a VLM would see:
the texts, the pictures and the clips of a call. It can be told to be wrong at given rates, to see
what a supervisor's mistakes cost.
"""

from __future__ import annotations

import json
import math
import re
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings

from collabvr import Clip, Picture, Problem, digest
from examples.maze import moves, pixels, rule, world
from examples.maze.pixels import Reading
from examples.maze.world import Cell, Place

Rate = Annotated[float, Field(ge=0, le=1)]


@settings
class Oracle:
    """Reads pixels by rule. The rates are those of the paper's Table 6: 1 is always right."""

    accept_recall: Rate = 1.0  # of the clips to accept, how many the oracle accepts
    reject_recall: Rate = 1.0  # of the clips to reject, how many the oracle rejects
    depth_match: Rate = 1.0  # how often its number of steps is right, and not off by one
    error_seed: int = 0  # another one makes other mistakes

    def __call__(self, instructions: str, parts: list, schema) -> dict:
        """See collabvr.Models. Raises Problem for a role that it does not know."""
        for name, role in ROLES.items():
            if name in schema.model_fields:
                scene = Scene(parts)
                reply = self.with_errors(role(scene), scene)
                return {"text": json.dumps(reply), "model": "oracle"}
        raise Problem(f"The maze's oracle knows no role that replies with a {schema.__name__}.")

    def with_errors(self, reply: dict, scene: Scene) -> dict:
        """The reply, made wrong by chance. The same call always gets the same reply."""
        chance = np.random.default_rng(int(digest(self.error_seed, scene.parts)[:16], 16))
        luck = chance.random()
        verdict = reply.get("verdict")
        steps = reply.get("estimated_steps_remaining")
        if verdict == "accept" and luck > self.accept_recall:
            order = scene.said("Planned action").partition(" Correction: ")[0]
            return verification(
                "The circle does not do what was planned.", "none", round(chance.random(), 2),
                f"{order.removesuffix('.')}{moves.INSIDE}.")
        if verdict == "reject" and luck > self.reject_recall:
            return verification("The circle does what was planned.", "complete", 1.0)
        if steps and luck > self.depth_match:
            off = int(chance.choice([-1, 1])) if steps > 1 else 1
            return {**reply, "estimated_steps_remaining": steps + off}
        return reply


class Scene:
    """What a call says and shows, and words for it."""

    def __init__(self, parts: list):
        self.parts = parts
        pictures = [part for part in parts if isinstance(part, np.ndarray)]  # I0 is the first
        self.clips = [part for part in parts if isinstance(part, Clip)]
        self.first = pixels.read(pictures[0])
        self.goal = self.first.goal
        self.has_clips = len(pictures) > 1  # last frames of H's
        self.start = self.cell(self.first.circle)
        self.now = self.cell(self.read(pictures[-1]).circle or self.start)
        self.circle = f"the {moves.colour_word(self.first.look.circle)} circle"
        self.square = f"the {moves.colour_word(self.first.look.goal)} square"

    def said(self, label: str) -> str:
        """What follows the label in the last text that starts with it; "" if none does."""
        found = ""
        for part in self.parts:
            if isinstance(part, str) and part.startswith(f"{label}: "):
                found = part.removeprefix(f"{label}: ")
        return found

    def read(self, frame: Picture) -> Reading:
        return pixels.read(frame, like=self.first)

    def cell(self, place) -> Cell:
        """The corridor cell that is nearest to a place."""
        return world.nearest_corridor(self.first.corridors, place)

    def path(self, begin, end) -> list[Cell]:
        return world.shortest_path(self.first.corridors, self.cell(begin), self.cell(end))

    def move(self, direction: str, count: int) -> str:
        return moves.move(self.circle, f"{direction} {moves.cells(count)}")

    def move_to_goal(self) -> str:
        return moves.move(self.circle, f"to {self.square}")


def name(cell: Cell) -> str:
    """What plans call a cell. `named` reads it."""
    return f"row {cell[0] + 1}, column {cell[1] + 1}"


def named(text: str) -> Cell | None:
    found = re.search(r"row (\d+), column (\d+)", text)
    return (int(found[1]) - 1, int(found[2]) - 1) if found else None


# ------------------------------------------------------------------------------
# The roles of collabvr.py


def planner(scene: Scene) -> dict:
    """One straight segment a step; on the last allowed step all that remains."""
    t, N_max = map(int, re.findall(r"\d+", scene.said("Step"))[:2])
    left = world.segments(scene.path(scene.now, scene.goal))
    if not left:
        return nothing_left(scene)
    direction, count = left[0]
    steps = len(left)
    before = [part for part in scene.parts if str(part).startswith(f"Step {t - 1}:")]
    rejected = "Outcome: rejected" in "".join(before)
    if rejected and count > 1 and steps < N_max - t + 1:  # a shorter move, as long as steps last
        count = math.ceil(count / 2)
        steps += 1
    instruction = scene.move(direction, count)
    target = tuple(np.add(scene.now, np.multiply(world.MOVES[direction], count)).tolist())
    if t == N_max and len(left) > 1:
        instruction, target, steps = scene.move_to_goal(), scene.goal, 1
    return {
        "observation": f"{scene.circle} is in {name(scene.now)}, {scene.square} in "
                       f"{name(scene.goal)}.",
        "remaining_goal": ", then ".join(f"{k} {direction}" for direction, k in left),
        "task_complete": False,
        "instruction": f"{instruction}.",
        "target_state": f"{scene.circle} is in {name(target)}, counted from 1 at the top left.",
        "estimated_steps_remaining": steps,
    }


def nothing_left(scene: Scene) -> dict:
    """The plan of a task that is done. As long as H is empty, it must have an action."""
    done = scene.has_clips
    return {
        "observation": f"{scene.circle} is in {name(scene.goal)}, like {scene.square}.",
        "remaining_goal": "nothing",
        "task_complete": done,
        "instruction": "" if done else f"Keep {scene.circle} where it is.",
        "target_state": "" if done else f"{scene.circle} is in {name(scene.goal)}",
        "estimated_steps_remaining": 0 if done else 1,
    }


def verifier(scene: Scene) -> dict:
    """Judges the clip by the plan's target state, or else by the goal."""
    target = named(scene.said("Target state")) or scene.goal
    return judge(scene, scene.clips[-1], target)


def verification(reason: str, progress: str, good_fraction: float, suggestion="") -> dict:
    """A reply of the verifier. A suggestion makes it a reject."""
    return {
        "reason": reason,
        "action_executed": not suggestion,
        "progress": progress,
        "good_fraction": good_fraction,
        "suggestion": suggestion,
        "confidence": "high",
        "verdict": "reject" if suggestion else "accept",
    }


def judge(scene: Scene, clip: Clip, target: Cell) -> dict:
    """Follows the circle: one of it, in the corridors, towards the target and not past it."""
    readings = [scene.read(frame) for frame in clip.frames]
    begin = readings[0].circle or scene.start
    path = scene.path(begin, target)
    fault = first_fault(scene, readings, path)
    if fault:
        i, reason, suggestion = fault
        right = max(0, i - 2)  # the last frame that is surely free of the error
        return verification(reason, "none", round(right / (len(readings) - 1), 3), suggestion)
    end = scene.cell(readings[-1].circle)
    if end == target:
        return verification(f"The circle ends in {name(end)}, as planned.", "complete", 1.0)
    if end == scene.cell(begin):
        suggestion = f"{order(scene, path)}{moves.but_not(0)}."
        return verification("The circle does not reach the next cell.", "none", 0.0, suggestion)
    far = len(scene.path(begin, end)) - 1
    reason = f"The circle goes the right way, {far} of {len(path) - 1} cells."
    return verification(reason, "partial", 1.0)


def order(scene: Scene, path: list[Cell]) -> str:
    """What a clip along that path was told to do."""
    plan = world.segments(path)
    return scene.move(*plan[0]) if len(plan) == 1 else scene.move_to_goal()


def first_fault(scene: Scene, readings: list[Reading], path) -> tuple[int, str, str] | None:
    """The frame of the first fault, what it is, and what would be right; None if all is well."""
    right = order(scene, path)
    before: Place = readings[0].circle or scene.start
    for i, reading in enumerate(readings):
        here = reading.circle
        if here is None or reading.circles != 1:
            if i + 1 < len(readings) and readings[i + 1].circles == 1:
                continue  # one frame that flickers
            reason = f"From frame {i} on there are {reading.circles} circles."
            return i, reason, f"{right}{moves.WHOLE}."
        if np.abs(np.subtract(here, before)).max() > rule.JUMP:
            return i, f"The circle jumps in frame {i}.", f"{right}{moves.NO_JUMP}."
        if np.abs(np.subtract(here, scene.cell(here))).max() > 0.7:
            return i, f"The circle leaves the corridor in frame {i}.", f"{right}{moves.INSIDE}."
        if np.abs(np.subtract(path, here)).sum(1).min() > 0.75:
            return i, *astray(scene, readings, path, i)
        before = here
    return None


def astray(scene: Scene, readings: list[Reading], path, i: int) -> tuple[str, str]:
    """What is wrong with a circle that is off its path in frame i, and what would be right."""
    here = readings[i].circle
    planned, gone = world.segments(path), world.segments(scene.path(path[0], here))
    if planned and gone and gone[0][0] != planned[0][0]:
        wrong = gone[0][0]
        suggestion = f"{scene.move(*planned[0])}{moves.but_not(wrong)}."
        return f"The circle goes {wrong} in frame {i}.", suggestion
    far = len(scene.path(path[0], readings[-1].circle or here)) - 1
    suggestion = f"{order(scene, path)}{moves.but_not(far)}."
    return f"The circle goes past {name(path[-1])} in frame {i}.", suggestion


def router(scene: Scene) -> dict:
    """regen if some of the clip is right; else split, or fallback if the whole way is short."""
    right = float(scene.said("Good fraction"))
    whole_way = world.segments(scene.path(scene.start, scene.goal))
    if right < 0.2 and "split" in scene.said("Allowed actions"):
        return routing("split", "Hardly anything of the clip is right.",
                       "Move the circle in shorter pieces.", 2)
    if right < 0.2 and len(whole_way) <= 2:
        return routing("fallback", "The whole way is short.", "All of it in one clip.")
    return routing("regen", f"The first {right:.0%} of the clip is right.",
                   remaining(scene, right))


def routing(action: str, reason: str, suggestion: str, steps: int = 0) -> dict:
    return {"reason": reason, "action": action, "suggestion": suggestion,
            "estimated_steps": steps}


def remaining(scene: Scene, right: float) -> str:
    """The verifier's suggestion, less the cells that the good part of the clip has gone."""
    suggestion = scene.said("Suggestion")
    asked = re.search(r"(up|down|left|right) (\d+) cells?", suggestion)
    if asked is None:
        return suggestion
    frames = scene.clips[-1].frames
    begin = scene.read(frames[0]).circle or scene.start
    kept = scene.read(frames[math.floor(right * (len(frames) - 1))]).circle or begin
    gone = len(scene.path(begin, kept)) - 1
    way = f"{asked[1]} {moves.cells(max(1, int(asked[2]) - gone))}"
    return moves.rest(scene.circle, way)


# ------------------------------------------------------------------------------
# The roles of examples/baselines.py


def sample_router(scene: Scene) -> dict:
    """Keeps a clip that solves the whole task."""
    seen = judge(scene, scene.clips[-1], scene.goal)
    action = "keep" if seen["progress"] == "complete" else "loop"
    return {"reason": seen["reason"], "action": action}


def worth(scene: Scene) -> list[tuple[float, str]]:
    """Of each candidate how good it is for the whole task, and the correction."""
    found = []
    way = scene.path(scene.start, scene.goal)
    for clip in scene.clips:
        seen = judge(scene, clip, scene.goal)
        end = scene.read(clip.frames[-1]).circle
        left = len(scene.path(end, scene.goal)) - 1 if end else len(way)
        short = moves.move(scene.circle, f"all the way to {scene.square}.") if left else ""
        accepted = seen["verdict"] == "accept"
        found.append((2 * accepted - left / len(way), seen["suggestion"] or short))
    return found


def picker(scene: Scene) -> dict:
    """The candidate without faults that ends nearest to the goal."""
    best = int(np.argmax([good for good, _ in worth(scene)])) + 1
    return {"reason": f"Candidate {best} comes closest to the goal.", "best": best}


def critic(scene: Scene) -> dict:
    """The task with the correction of the better candidate."""
    found = worth(scene)
    _, correction = max(found)
    prompt = scene.said("Task prompt")
    if correction:
        prompt += f" Correction: {correction}"
    critiques = [wrong or "It does what the task wants." for _, wrong in found]
    return {"critiques": critiques, "prompt": prompt}


def preplanner(scene: Scene) -> dict:
    """One straight segment a milestone. The last one takes all that is left."""
    N_max = int(re.findall(r"\d+", scene.said("Clips"))[0])
    way = world.segments(scene.path(scene.start, scene.goal))
    here = scene.start
    milestones = []
    for direction, count in way[:N_max]:
        here = tuple(np.add(here, np.multiply(world.MOVES[direction], count)).tolist())
        milestones.append((scene.move(direction, count), here))
    if len(way) > N_max or not way:
        milestones[N_max - 1 :] = [(scene.move_to_goal(), scene.goal)]
    return {
        "observation": f"{scene.circle} is in {name(scene.start)}.",
        "milestones": [
            {"instruction": f"{action}.", "target_state": f"{scene.circle} is in {name(cell)}"}
            for action, cell in milestones
        ],
    }


ROLES = {  # by a field that only the role's reply has
    "milestones": preplanner,
    "critiques": critic,
    "best": picker,
    "estimated_steps_remaining": planner,
    "verdict": verifier,
    "estimated_steps": router,
    "action": sample_router,  # of a reply with no estimated_steps
}
