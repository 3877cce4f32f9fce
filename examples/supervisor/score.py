"""How good is a VLM as planner and verifier, measured against people (the paper's Table 6)?

    python examples/supervisor.py export runs --out points        questions and answers of runs
    python examples/supervisor.py ask points --vlm-url http://localhost:8000/v1 --vlm Qwen3.5-9B
    python examples/supervisor.py score labels.jsonl points/replies/*.jsonl

export writes points/points.jsonl (every question to a planner or verifier, word for word, with its
pictures and clips in points/media) and what was answered, points/replies/run.jsonl; ask puts the
same questions to another VLM. Both make points/label.html, a page with buttons that saves
labels.jsonl. Its lines, which may come from anywhere, are of three kinds:

    {"id": "..", "steps": 2}                       D1: steps from here, 0 if nothing is left to do
    {"id": "..", "verdict": "accept"}              D2: or "reject"
    {"id": "..", "suggestion": "..", "rating": 3}  D3: of a VLM's suggestion: 1 harms, 3 helps

score prints Table 6. Its intervals are of 95 % and take the points for independent of each other,
which those of one run are not quite.
"""
from __future__ import annotations

import functools
import json
import re
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
import commands
import points as files
from commands import needed
from summary import Table

import collabvr
from collabvr import Clip, CollabVR, Config, Models, OpenAIVLM, Problem, explained

PAPER = {  # Table 6, as published: D1, D2 (kappa on Gen-ViRe only) and D3
    "paper: Gemini 2.5 Pro": (["68.0%", ".366"], ["84.8%", "65.6%", "75.2%", ".676"],
                              ["2.61", "93.8%", "67.5%"]),
    "paper: Qwen3.5-27B": (["58.7%", ".491"], ["82.4%", "44.8%", "63.6%", ".432"],
                           ["2.55", "95.0%", "60.0%"]),
    "paper: Qwen3.5-9B": (["56.4%", ".484"], ["77.6%", "40.8%", "59.2%", ".304"],
                          ["2.35", "86.3%", "48.8%"])}


# =========================================================================== The decision points
class Replay(Models):
    """A finished run once more, every call answered by its trace. `asked` are its questions."""

    def __init__(self, folder: Path, calls: list[dict], vlm: OpenAIVLM):
        self.folder, self.vlm, self.seed = folder, vlm, 0
        self.told, self.calls, self.asked = iter(calls), [], []

    def call(self, role: str, t: int, request: list, make) -> tuple[dict, Clip | None, bool]:
        line = next(self.told, {"role": "", "request": ""})
        clip = collabvr.read_clip(self.folder, line) if "clip" in line else None
        key = line["request"] if role == "vgm" else collabvr.digest(
            role, request, self.vlm.identity)  # of a generator's nothing is known here
        if line["role"] != role or line["request"] != key or "clip" in line and not clip:
            raise Problem(f"{self.folder} cannot be replayed: a clip is missing, or it was made by "
                          "another version of collabvr.py.")
        self.calls.append(line)
        return line, clip, False

    def ask(self, role: str, instructions: str, parts: list, schema, t: int = 1):
        reply = super().ask(role, instructions, parts, schema, t)
        if schema.__qualname__ in SCHEMAS:  # not those of the router and of other methods
            self.asked.append((role, t, schema.__qualname__, instructions, parts, reply))
        return reply


SCHEMAS = {x.__qualname__: x for x in (CollabVR.Plan, CollabVR.FirstPlan, CollabVR.Verification)}


def seen(vlm: OpenAIVLM) -> dict:
    """How a VLM sees clips, by the names of the options."""
    return {"video_input": vlm.video_input, "verify_fps": vlm.verify_fps}


@dataclass
class Export:
    """Keeps what finished runs asked their planner and verifier, and what they were told."""
    runs: tyro.conf.Positional[Path]  # a run folder, or a folder with runs below it
    out: Path = Path("points")

    def run(self) -> int:
        points, replies = [], []
        for trace in tqdm(sorted(self.runs.rglob("trace.json")), unit="run", disable=None):
            folder, name = trace.parent, trace.parent.relative_to(self.runs).as_posix()
            with explained(f"{folder} holds no run with its settings", KeyError, ValueError):
                facts = json.loads(trace.read_bytes())
                given = facts["settings"]
                config = Config(**{k: given[k] for k in asdict(Config())})
                vlm = OpenAIVLM(**{k: given[k] for k in asdict(OpenAIVLM())} | {
                    "request_extra": json.dumps(given["request_extra"])})
                task, models = facts["task"], Replay(folder, facts["calls"], vlm)
            method = commands.method(facts.get("method", "collabvr"))
            method(models, config).run(collabvr.load_image(folder / "input.png"), task)
            for i, (role, t, schema, instructions, parts, reply) in enumerate(models.asked):
                points.append({"id": f"{name}/{i:02}-{role}", "role": role, "t": t,
                               "schema": schema, "instructions": instructions, "seen": seen(vlm),
                               "parts": [files.store(self.out, x) for x in parts]})
                replies.append({"id": points[-1]["id"], "reply": reply.model_dump()})
        if not points:
            raise Problem(f"{self.runs} holds no finished run that asked a planner or verifier.")
        files.write_lines(self.out / "points.jsonl", points)
        files.write_lines(self.out / "replies" / "run.jsonl", replies)
        print(f"{len(points)} decision points. To label: {files.write_page(self.out, points)}")
        return 0


@dataclass
class Ask:
    """Puts the questions to a VLM. The same command goes on where it stopped; a question without a
    usable reply is asked once more by each start."""
    points: tyro.conf.Positional[Path]  # what export wrote
    vlm: OpenAIVLM
    name: str = ""  # of its file in replies/ (default: the VLM's)

    def run(self) -> int:
        points, replies = files.lines(self.points / "points.jsonl"), []
        name = re.sub(r"[^-.\w]", "_", self.name or self.vlm.vlm)
        if others := [x["seen"] for x in points if x["seen"] != seen(self.vlm)]:
            print(f"In the runs the VLM saw clips with {others[0]}, now {seen(self.vlm)}.",
                  file=sys.stderr)
        self.vlm.check()
        models = Models(None, self.vlm, self.points / "asked" / name)
        for x in tqdm(points, unit="point", disable=None):
            before, parts = len(models.calls), [files.restore(self.points, y) for y in x["parts"]]
            try:
                answer = {"reply": models.ask(x["role"], x["instructions"], parts,
                                              SCHEMAS[x["schema"]], x["t"]).model_dump()}
            except Problem:
                faults = [c["fault"] for c in models.calls[before:]]
                if len(faults) < 3:
                    raise  # it was the endpoint that gave up
                answer = {"fault": faults[-1]}  # a wrong answer, of a kind of its own
            replies.append({"id": x["id"]} | answer)
        files.write_lines(path := self.points / "replies" / f"{name}.jsonl", replies)
        print(f"{path}\nTo label: {files.write_page(self.points, points)}")
        return 0


# ================================================================================== The measures
def share(hits: list[bool]) -> str:
    """A percentage with Wilson's interval."""
    if not hits:
        return "-"
    exact = needed("scipy.stats").binomtest(sum(hits), len(hits))
    low, high = exact.proportion_ci(method="wilson")
    return f"{np.mean(hits):.1%} ({100 * low:.0f}-{100 * high:.0f})"


def estimate(statistic, *columns: list) -> str:
    """A statistic of one or more columns, with a bootstrap's interval."""
    if len(columns[0]) < 2:
        return "-"
    arrays = [np.array(x) for x in columns]
    with warnings.catch_warnings():  # that a resample holds one kind of verdict only
        warnings.simplefilter("ignore")
        low, high = needed("scipy.stats").bootstrap(
            arrays, statistic, paired=True, vectorized=False, n_resamples=2000,
            method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return f"{statistic(*arrays):.3f} ({low:.2f}-{high:.2f})"


def plan_depth(labels: list, said: dict) -> list:
    """D1. Steps from here, the planned one included; an unusable plan is no match."""
    pairs = []
    for x in [x for x in labels if x.steps is not None]:
        p = said[x.id]
        pairs.append((x.steps, p and (
            0 if p["task_complete"] else max(1, p["estimated_steps_remaining"]))))  # as in line 10
    usable = [pair for pair in pairs if pair[1] is not None]
    return [len(pairs), share([a == b for a, b in pairs]),
            estimate(needed("sklearn.metrics").mean_absolute_error, *columns(usable))]


def verdicts(labels: list, said: dict) -> list[tuple[str, str]]:
    """What the label says, and the reply."""
    return [(x.verdict, (said[x.id] or {"verdict": "unusable"})["verdict"])
            for x in labels if x.verdict]


def verifier(labels: list, said: dict) -> list:
    """D2. Recall: of what people accept, or reject, how much it does too."""
    pairs = verdicts(labels, said)
    recalls = [share([a == b for a, b in pairs if a in kinds])
               for kinds in (["accept"], ["reject"], ["accept", "reject"])]
    kappa = functools.partial(needed("sklearn.metrics").cohen_kappa_score,
                              replace_undefined_by=0.0)  # all of one kind: nothing but chance
    return [len(pairs), *recalls, estimate(kappa, *columns(pairs))]


def suggestions(labels: list, said: dict) -> list:
    """D3. Of those ratings that are of its own suggestions."""
    rated = [x.rating for x in labels
             if x.rating and x.suggestion == (said[x.id] or {}).get("suggestion")]
    return [len(rated), estimate(np.mean, rated), share([x >= 2 for x in rated]),
            share([x == 3 for x in rated])]


def columns(pairs: list[tuple]) -> list[list]:
    return [list(x) for x in zip(*pairs)] or [[], []]


@dataclass
class Score:
    """Prints D1, D2 and D3 of replies, with 95 % intervals."""
    labels: tyro.conf.Positional[Path]
    replies: tyro.conf.Positional[tuple[Path, ...]]  # files that export and ask wrote

    def run(self) -> int:
        labels, confusions = files.read_labels(self.labels), []
        if not self.replies:
            raise Problem("Name at least one file of replies.")
        tables = [Table(title, ["", "n", *heads], [[name, "", *x[i]] for name, x in PAPER.items()])
                  for i, (title, heads) in enumerate({
                      "D1, plan depth": ["exact match", "MAE"],
                      "D2, verdicts": ["accept recall", "reject recall", "overall", "kappa"],
                      "D3, suggestions (1 to 3)": ["mean", ">= 2", "= 3"]}.items())]
        for path in self.replies:
            said = files.read_replies(path)
            if missing := [x.id for x in labels if x.id not in said]:
                raise Problem(f"{path} has no reply to {missing[0]}, which {self.labels} labels.")
            for x in labels:
                wrong = "verdict" if x.steps is not None else "task_complete"
                if wrong in (said[x.id] or {}):
                    raise Problem(f"{self.labels}: {x.id} has a label of the other role.")
            for table, measure in zip(tables, (plan_depth, verifier, suggestions), strict=True):
                table.rows.append([path.stem, *measure(labels, said)])
            pairs = verdicts(labels, said)
            confusions.append(Table(f"{path.stem}: by label, what it said", [
                "", "accept", "reject", "unusable"], [[a, *(pairs.count((a, b)) for b in (
                    "accept", "reject", "unusable"))] for a in ("accept", "reject")]))
        print("\n".join(x.text() for x in (*tables, *confusions)), end="")
        return 0


def main(argv=None) -> int:
    """0, or 2 after one sentence on stderr."""
    return commands.run("supervisor.py", __doc__, {"export": Export, "ask": Ask, "score": Score},
                        argv)


if __name__ == "__main__":
    sys.exit(main())
