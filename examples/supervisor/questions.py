"""The questions to planner and verifier: taken from finished runs, and put to another VLM."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import tyro
from tqdm import tqdm

import collabvr
from collabvr import (
    Call,
    Clip,
    CollabVR,
    Config,
    Models,
    OpenAIVLM,
    Problem,
    RecordedModels,
)
from examples import runs
from examples.baselines import METHODS
from examples.runs import Run
from examples.supervisor import points as files
from examples.supervisor.label import write_page

SCHEMAS = {
    "Plan": collabvr.Plan,
    "FirstPlan": collabvr.FirstPlan,
    "Verification": collabvr.Verification,
}
VLM = TypeVar("VLM")


def seen(vlm) -> dict:
    """How a VLM sees clips, by the names of the options."""
    return {name: getattr(vlm, name, None) for name in ("video_input", "verify_fps")}


# ------------------------------------------------------------------------------
# export


class Replay(Models):
    """A finished run once more: its trace answers every call, and no model is there.

    `asked` are the questions to its planner and verifier. Raises Problem if a question is not word
    for word the one that was asked then.
    """

    def __init__(self, run: Run, vlm):
        super().__init__(None, vlm)
        self.run = run
        self.left = iter(run.calls)
        self.asked: list[dict] = []

    def call_vgm(self, t: int, j: int, frame, prompt: str, seconds: float, seed: int):
        call = self.next("vgm")
        clip = self.run.clip(call)
        if call.prompt != prompt or clip is None and not call.error:
            raise self.differs()
        return call, clip

    def call_vlm(self, role: str, t: int, instructions: str, parts: list, schema) -> Call:
        call = self.next(role)
        request = collabvr.digest(role, collabvr.identity(self.vlm), instructions, parts, schema)
        if call.request.rpartition("-")[0] != request:
            raise self.differs()
        return call

    def ask(self, role: str, instructions: str, parts: list, schema, t: int = 1):
        reply = super().ask(role, instructions, parts, schema, t)
        if schema in SCHEMAS.values():  # and not the router's, or another method's
            self.asked.append({"role": role, "t": t, "schema": schema.__name__,
                               "instructions": instructions, "parts": parts, "reply": reply})
        return reply

    def next(self, role: str) -> Call:
        call = next(self.left, None)
        if call is None or call.role != role:
            raise self.differs()
        return call

    def differs(self) -> Problem:
        return Problem(f"{self.run.folder} cannot be replayed: a clip is missing, or it was made "
                       "with other code than this.")


@dataclass
class Export:
    """Keeps what finished runs asked their planner and verifier, and what they were told."""

    methods: ClassVar[dict[str, type[CollabVR]]] = METHODS  # what a trace may name
    vlm_type: ClassVar[type] = OpenAIVLM

    runs: tyro.conf.Positional[Path]  # a run folder, or a folder with runs below it
    out: Path = Path("points")  # folder for the points

    def run(self) -> int:
        points, replies = [], []
        for trace in tqdm(sorted(self.runs.rglob("trace.json")), unit="run", disable=None):
            name = trace.parent.relative_to(self.runs).as_posix()
            for i, question in enumerate(self.replay(trace.parent)):
                id = f"{name}/{i:02}-{question['role']}"
                reply = question.pop("reply")
                question["parts"] = [files.store(self.out, part) for part in question["parts"]]
                points.append({"id": id, **question})
                replies.append({"id": id, "reply": reply.model_dump()})
        if not points:
            raise Problem(f"{self.runs} holds no finished run that asked a planner or verifier.")
        runs.write_lines(self.out / "points.jsonl", points)
        runs.write_lines(self.out / "replies" / "run.jsonl", replies)
        print(f"{len(points)} decision points. To label: {write_page(self.out, points)}")
        return 0

    def replay(self, folder: Path) -> list[dict]:
        """What a run asked. A method's name is looked up, never imported. Raises Problem."""
        run = runs.load_run(folder)
        name = str(run.facts.get("method", "collabvr"))
        if name not in self.methods:
            raise Problem(f"{folder} is a run of the method {name!r:.99}. Known are "
                          f"{', '.join(self.methods)}; one of your own is given to main.")
        picture, settings = run.picture(), run.facts.get("settings")
        if picture is None or not isinstance(settings, dict):
            raise Problem(f"{folder} has no input.png or no settings.")
        with collabvr.explained(f"{folder} holds no run with its settings", Exception):
            config = Config(**of(Config, settings))
            vlm = self.vlm_type(**of(self.vlm_type, settings))
            task = run.facts["task"]
        models = Replay(run, vlm)
        self.methods[name](models, config).run(picture, task)
        return [{**question, "seen": seen(vlm)} for question in models.asked]


def of(kind: type, settings: dict) -> dict:
    """Those settings that are fields of a class. Raises KeyError if one is missing."""
    if not is_dataclass(kind):
        return {}
    return {field.name: settings[field.name] for field in fields(kind)}


# ------------------------------------------------------------------------------
# ask


@dataclass
class Ask(Generic[VLM]):
    """Puts the questions to a VLM. The same command goes on where it stopped. A question without a
    usable reply counts as answered wrongly."""

    points: tyro.conf.Positional[Path]  # the folder that export wrote
    vlm: VLM
    name: str = ""  # of its file in replies/ (default: the VLM's)

    def run(self) -> int:
        points = files.read_objects(self.points / "points.jsonl")
        name = self.name or getattr(self.vlm, "vlm", type(self.vlm).__name__)
        name = re.sub(r"[^-.\w]", "_", name)
        for point in points:
            if point.get("seen") != seen(self.vlm):
                print(f"In the runs the VLM saw clips with {point.get('seen')}, now "
                      f"{seen(self.vlm)}.", file=sys.stderr)
                break
        models = RecordedModels(None, self.vlm, self.points / "asked" / name)
        replies = []
        for point in tqdm(points, unit="point", disable=None):
            replies.append({"id": point["id"], **self.answer(models, point)})
        models.lock.release()
        path = self.points / "replies" / f"{name}.jsonl"
        runs.write_lines(path, replies)
        print(f"{path}\nTo label: {write_page(self.points, points)}")
        return 0

    def answer(self, models: RecordedModels, point: dict) -> dict:
        """A reply, or the fault of the last of three. Raises Problem if the endpoint gave up."""
        parts: list[str | Clip] = [files.restore(self.points, part) for part in point["parts"]]
        before = len(models.calls)
        with collabvr.explained(f"{self.points}/points.jsonl: {point['id']} is no question",
                                KeyError, TypeError):
            role, instructions, t = point["role"], point["instructions"], point["t"]
            schema = SCHEMAS[point["schema"]]
        try:
            return {"reply": models.ask(role, instructions, parts, schema, t).model_dump()}
        except Problem:
            faults = [call.fault for call in models.calls[before:]]
            if len(faults) < 3:
                raise
            return {"fault": faults[-1]}
