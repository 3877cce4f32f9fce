"""Every method of the paper on the same held-out mazes: score, seconds of video, calls.

    python -m examples.maze.compare
    python -m examples.maze.compare --methods single collabvr --mazes 10
    python -m examples.maze.compare --methods collabvr gemini qwen27b qwen9b
    python -m examples.maze.compare --segments foreign --mazes 100 --methods route1 backtrack1
    python -m examples.maze.compare --vlm-url URL --vlm NAME --methods single collabvr

The last one asks a VLM in place of the oracle, and says how well it supervises. Its table ends
with the floor, still, and the ceiling, which is CollabVR by the oracle.

still .. collabvr are the methods of examples/baselines.py, best and replan CollabVR without its
router. gemini, qwen27b and qwen9b are CollabVR by an oracle that errs at those VLMs' rates (the
paper's Table 6). steps1 .. have other N_max; attempts1 .. are M2 with other M. route1, best1,
replan1, backtrack1, and gemini-route1 .., have M = 1, so that what follows a rejection shows.

The mazes come from seeds that training never used. Foreign ones are made and drawn by another
program, in other palettes, and get as many steps as their path has segments, three at least. The
score comes from a rule, never from the VLM that steered. Each run has its folder in --out, and
the same command goes on from there.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

from collabvr import Call, CollabVR, Config, Problem, RecordedModels
from examples import baselines, cli, runs, stats
from examples.maze import figures, foreign, rule, world
from examples.maze.oracle import Oracle
from examples.maze.run import SECONDS, TinyWan, supervisor

READERS = {  # the paper's Table 6: accept recall, reject recall, plan depth; and a seed
    "gemini": Oracle(0.848, 0.656, 0.680, 1),
    "qwen27b": Oracle(0.824, 0.448, 0.587, 2),
    "qwen9b": Oracle(0.776, 0.408, 0.564, 3),
}


@dataclass(frozen=True)
class Method:
    """What is compared."""

    kind: type[CollabVR]
    changes: dict = field(default_factory=dict)  # of Config
    reader: Oracle | None = None  # None: the oracle or the VLM that the options name


def methods() -> dict[str, Method]:
    found = {name: Method(kind) for name, kind in baselines.METHODS.items()}
    for policy in ("best", "replan"):
        found[policy] = Method(CollabVR, {"on_exhausted": policy})
    for k in range(1, 6):
        found[f"steps{k}"] = Method(CollabVR, {"N_max": k})
        found[f"attempts{k}"] = Method(baselines.M2, {"M": k})  # as in Fig. 13
    for policy in ("route", "best", "replan"):
        found[f"{policy}1"] = Method(CollabVR, {"on_exhausted": policy, "M": 1})
    found["backtrack1"] = Method(baselines.Backtrack, {"M": 1})
    for name, reader in READERS.items():
        found[name] = Method(CollabVR, reader=reader)
        for policy in ("route1", "best1", "replan1"):
            found[f"{name}-{policy}"] = replace(found[policy], reader=reader)
    found["ceiling"] = Method(CollabVR, reader=Oracle())
    return found


METHODS = methods()
Name: Any = Literal[tuple(METHODS)]
HEADLINE = ["single", "pass4", "videotpo", "preplan", "m1", "m2", "collabvr"]
NUMBERS = ["steps", "regenerations", "clips", "vlm_calls", "vgm_seconds"]


# ------------------------------------------------------------------------------
# One method on one maze, in a process of its own


@functools.cache
def generator(vgm: Path) -> TinyWan:
    """Loaded once a process, which has one thread."""
    import torch

    torch.set_num_threads(1)
    return TinyWan(vgm=str(vgm))


@dataclass
class Job:
    """A method on the i-th maze of that many segments."""

    method: str
    segments: str
    i: int
    seed: int
    vgm: Path
    vlm: Any
    out: Path

    def maze(self) -> tuple[world.Maze, np.ndarray, int]:
        """With its picture, and how many steps it may take at least."""
        if self.segments != "foreign":
            maze = foreign.held_out(int(self.segments), self.i, self.seed)
            return maze, world.draw(maze), 3
        maze, picture = foreign.foreign(self.i, self.seed)
        return maze, picture, max(3, len(world.segments(maze.path())))

    def run(self) -> dict:
        """A flat row. A run that ends because no reply can be used has a score of 0."""
        method = METHODS[self.method]
        maze, picture, N_max = self.maze()
        config = Config(**{
            "N_max": N_max, "seconds_first": SECONDS, "seconds_next": SECONDS, **method.changes})
        folder = self.out / self.method / f"{self.segments}-{self.i}"
        models = RecordedModels(
            generator(self.vgm), method.reader or self.vlm, folder, seed=1000 * self.i)
        try:
            result = method.kind(models, config).run(picture, world.task(maze))
        except Problem:
            if not (models.calls and models.calls[-1].fault):
                raise  # the model itself cannot go on
            row = {"status": "failed", "solved": 0.0, "score": 0.0}
        else:
            score = rule.score(result.video.frames, maze)
            models.save(result, method=self.method, score=score.value,
                        by_rule=rule.verdict(score))
            row = {"status": result.status, "solved": float(score.solved), "score": score.value}
        finally:
            models.lock.release()
        cost = models.cost()
        row["exhausted"] = exhausted(models.calls, config)
        row["vlm_calls"] = sum(call.role != "vgm" for call in models.calls)
        return row | {name: cost[name] for name in NUMBERS if name in cost}


def exhausted(calls: list[Call], config: Config) -> list[tuple[str, bool | None]]:
    """Of each step with M rejections what was then decided, and what came of it.

    That is whether the next clip that was verified (of regen, the joined one) was accepted; None
    if there was none.
    """
    verdicts = runs.verdicts(calls)
    routes = {}
    for call in calls:
        if call.role == "router" and call.reply:
            routes[call.t] = call.reply["action"]
    found = []
    for verdict, following in zip_longest(verdicts, verdicts[1:]):
        if verdict.j == config.M and not verdict.accepted:
            decision = routes.get(verdict.t, config.on_exhausted)
            found.append((decision, following.accepted if following else None))
    return found


# ------------------------------------------------------------------------------
# All of them

VLM = TypeVar("VLM")


@settings
class Compare(Generic[VLM]):
    vlm: VLM  # a dataclass
    out: Path = Path("runs/compare")  # results folder: the same one goes on
    methods: list[Name] = field(default_factory=lambda: list(HEADLINE))  # what is compared
    # straight pieces of the shortest path, or foreign
    segments: list[Literal["1", "2", "3", "4", "foreign"]] = field(
        default_factory=lambda: ["1", "2", "3"])
    mazes: Annotated[int, Field(ge=1)] = 20  # for each number of segments
    seed: Annotated[int, Field(ge=0)] = 0  # of the mazes
    vgm: Path = Path(TinyWan.vgm)  # a checkpoint like tiny-wan
    workers: Annotated[int, Field(ge=1)] = 2  # processes, one thread each

    def run(self) -> int:
        """Compares, prints tables, draws figures. Raises Problem before anything is run."""
        # of the VLM a copy, because its client cannot be sent to other processes
        for model in (TinyWan(vgm=str(self.vgm)), replace(self.vlm)):  # type: ignore[type-var]
            if hasattr(model, "check"):
                model.check()
        if not isinstance(self.vlm, Oracle):
            self.methods = [*self.methods, "still", "ceiling"]
        rows = self.rows()
        for table in (self.solved(rows), self.statistics(rows), self.exhaustion(rows)):
            print(table.markdown())
        try:
            figures.draw(rows, self.out)
        except Problem as problem:
            print(f"No figures: {problem}")
        return 0

    def rows(self) -> dict[str, list[dict]]:
        """Of each method the rows of all its runs."""
        jobs = [
            Job(method, segments, i, self.seed, self.vgm, self.vlm, self.out)
            for i in range(self.mazes)
            for segments in self.segments
            for method in self.methods
        ]
        rows: dict[str, list[dict]] = {method: [] for method in self.methods}
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, spawn) as pool:
            done = tqdm(pool.map(Job.run, jobs), total=len(jobs), unit="run")
            for job, row in zip(jobs, done, strict=True):
                rows[job.method].append({"segments": job.segments, **row})
        return rows

    def solved(self, rows) -> stats.Table:
        """Cost and solved share by number of segments, as the paper's Tables 1 and 3."""
        heads = [
            "foreign" if k == "foreign" else f"{k} segment{'' if k == '1' else 's'}"
            for k in self.segments
        ]
        head = ["method", "VGM s", *(f"solved, {name}" for name in [*heads, "all"]), "score"]
        lines = []
        for method, mine in rows.items():
            line = [method, stats.estimate(np.mean, column(mine, "vgm_seconds"), digits=1)]
            for k in self.segments:
                line.append(stats.percent(row["solved"] for row in mine if row["segments"] == k))
            line.append(stats.percent(column(mine, "solved")))
            line.append(stats.estimate(np.mean, column(mine, "score")))
            lines.append(line)
        return stats.Table("", head, lines)

    def statistics(self, rows) -> stats.Table:
        """mean / standard deviation / median / range of what a run took: Table 10."""
        lines = []
        for method, mine in rows.items():
            line = [method]
            for name in NUMBERS:
                values = np.array(column(mine, name))
                spread = f"{values.mean():.2f} / {values.std():.2f} / {np.median(values):g}"
                line.append(f"{spread} / {values.min():g}-{values.max():g}")
            lines.append(line)
        return stats.Table("", ["method", *NUMBERS], lines)

    def exhaustion(self, rows) -> stats.Table:
        """What became of steps with M rejections, and the differences from the first method."""
        first = self.methods[0]
        head = ["method", "such mazes", "solved of them", "route: next clip accepted",
                f"solved, minus {first}", f"VGM s, minus {first}"]
        lines = []
        for method, mine in rows.items():
            met = [row for row in mine if row["exhausted"]]
            decisions = [decision for row in met for decision in row["exhausted"]]
            accepted = []
            for route in sorted({route for route, _ in decisions}):
                times = sum(each == route for each, _ in decisions)
                accepted.append(f"{route} {decisions.count((route, True))} of {times}")
            line = [method, len(met), f"{sum(column(met, 'solved')):.0f}", ", ".join(accepted)]
            for name in ("solved", "vgm_seconds"):
                mean, low, high = stats.paired(column(rows[first], name), column(mine, name))
                line.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
            lines.append(line)
        return stats.Table("", head, lines)


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return cli.command(__doc__, Compare[supervisor(argv)], argv)  # type: ignore


if __name__ == "__main__":
    sys.exit(main())
