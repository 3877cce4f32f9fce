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
from collabvr import CollabVR, Config, OpenAIVLM, Problem, RecordedModels, Reply, explained
from examples import runs
from examples.baselines import METHODS
from examples.supervisor import points as files
from examples.supervisor.label import write_page

SCHEMAS: dict[str, type[Reply]] = {
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


class Replay(RecordedModels):
    """A finished run once more: its record answers every call, and no model is there.

    `asked` are the questions to its planner and verifier. Raises ValueError if a question is not
    word for word the one that was asked then, IndexError if the record ends first.
    """

    def __init__(self, vlm, folder: Path):
        super().__init__(None, vlm, folder)
        self.asked: list[dict] = []

    def next_recorded(self, request):
        call = self.recorded[len(self.calls)]
        if call.request != request:
            raise ValueError(f"the {call.role} was asked something else")
        return call

    def call_vgm(self, *_):
        """The recorded clip. The next question, which shows it, tells if it is the right one."""
        call = self.recorded[len(self.calls)]
        return call, self.read_clip(call)

    def ask(self, role, instructions, parts, schema, t=1):
        reply = super().ask(role, instructions, parts, schema, t)
        if schema in SCHEMAS.values():  # and not the router's, or another method's
            self.asked.append({
                "role": role, "t": t, "schema": schema.__name__, "instructions": instructions,
                "parts": parts, "reply": reply.model_dump(), "seen": seen(self.vlm),
            })
        return reply


@dataclass
class Export:
    """Keeps what finished runs asked their planner and verifier, and what they were told.

    A run that cannot be replayed is named, and left out.
    """

    methods: ClassVar[dict[str, type[CollabVR]]] = METHODS  # what a trace may name
    vlm_type: ClassVar[type] = OpenAIVLM

    runs: tyro.conf.Positional[Path]  # a run folder, or a folder with runs below it
    out: Path = Path("points")  # folder for the points

    def run(self) -> int:
        points, replies = [], []
        for trace in tqdm(sorted(self.runs.rglob("trace.json")), unit="run", disable=None):
            name = trace.parent.relative_to(self.runs).as_posix()
            try:
                asked = self.replay(trace.parent)
            except Problem as problem:
                print(f"Left out: {problem}", file=sys.stderr)
                continue
            for i, question in enumerate(asked):
                id = f"{name}/{i:02}-{question['role']}"
                replies.append({"id": id, "reply": question.pop("reply")})
                question["parts"] = [files.store(self.out, part) for part in question["parts"]]
                points.append({"id": id, **question})
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
        if run.facts.get("status") is None:
            raise Problem(f"{folder}: the run is not over.")
        if name not in self.methods:
            raise Problem(f"{folder}: the method {name!r:.99} is not known. One of your own is "
                          "given to main.")
        with explained(f"{folder}: cannot be replayed with this code", Exception):
            settings = run.facts["settings"]
            models = Replay(self.vlm_type(**of(self.vlm_type, settings)), folder)
            try:
                I0 = collabvr.load_image(folder / "input.png")
                method = self.methods[name](models, Config(**of(Config, settings)))
                method.run(I0, run.facts["task"])
            finally:
                models.lock.release()
        return models.asked


def of(kind: type, settings: dict) -> dict:
    """Those settings that are fields of a class. Raises KeyError if one is missing."""
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    return {name: settings[name] for name in names}


# ------------------------------------------------------------------------------
# ask


@dataclass
class Ask(Generic[VLM]):
    """Puts the questions to a VLM. The same command goes on where it stopped.

    A question without a usable reply counts as answered wrongly.
    """

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
        asked = collabvr.digest(collabvr.identity(self.vlm), points)[:8]
        models = RecordedModels(None, self.vlm, self.points / "asked" / f"{name}-{asked}")
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
        before = len(models.calls)
        with explained(f"{self.points}/points.jsonl: {point['id']} is no question",
                       KeyError, TypeError):
            parts = [files.restore(self.points, part) for part in point["parts"]]
            role, instructions, t = point["role"], point["instructions"], point["t"]
            schema = SCHEMAS[point["schema"]]
        try:
            return {"reply": models.ask(role, instructions, parts, schema, t).model_dump()}
        except Problem:
            faults = [call.fault for call in models.calls[before:]]
            if len(faults) < 3:
                raise
            return {"fault": faults[-1]}
