"""Every method of the paper on the same held-out mazes: score, seconds of video, calls.

    python -m examples.maze.compare --out runs/compare
    python -m examples.maze.compare --out runs/compare --methods single collabvr --mazes 10
    python -m examples.maze.compare --out runs/compare --methods collabvr qwen9b qwen27b gemini
    python -m examples.maze.compare --out runs/compare --segments foreign --mazes 100
    python -m examples.maze.compare --methods route1 best1 replan1     what follows a rejection

The mazes come from seeds that training never used. `foreign` ones are made and drawn by another
program, in other palettes, and get as many steps as their path has segments, three at least. A
score comes from world.py's rule, never from the VLM that steered. Each finished run is a line in
OUT/runs.jsonl, and the same command with the same code goes on; results.json has the means.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as settings
from tqdm import tqdm

import collabvr
from collabvr import Call, CollabVR, Config, Models, OpenAIVLM, Problem, Wan
from examples import baselines, cli, stats
from examples.maze import figures, foreign, vlm, world
from examples.maze.run import CONFIG, VLM, WAN

SUPERVISORS = {  # the paper's Table 6: accept recall, reject recall, plan depth; and a seed
    "gemini": vlm.Errors(0.848, 0.656, 0.680, 1),
    "qwen27b": vlm.Errors(0.824, 0.448, 0.587, 2),
    "qwen9b": vlm.Errors(0.776, 0.408, 0.564, 3),
}
HEADLINE = [
    "single", "pass2", "pass4", "videotpo", "preplan", "m1", "m2", "collabvr", "best", "replan"]
NUMBERS = ["solved", "score", "vgm_seconds", "clips", "vlm_calls", "steps", "regenerations"]


def methods() -> dict[str, tuple[type, dict]]:
    """What can be compared, by name: a class, and what differs from run.py's CONFIG."""
    found: dict[str, tuple[type, dict]] = {}
    for name, method in baselines.METHODS.items():
        found[name] = (method, {})
    for policy in ("best", "replan"):  # in place of the router
        found[policy] = (CollabVR, {"on_exhausted": policy})
    for k in range(1, 6):
        found[f"steps{k}"] = (CollabVR, {"N_max": k})
        found[f"attempts{k}"] = (baselines.M2, {"M": k})  # as in Fig. 13
    for supervisor in SUPERVISORS:
        found[supervisor] = (CollabVR, {})
    for prefix in ("", *(f"{supervisor}-" for supervisor in SUPERVISORS)):
        for policy in ("route", "best", "replan"):
            found[f"{prefix}{policy}1"] = (CollabVR, {"on_exhausted": policy, "M": 1})
    return found


METHODS = methods()


# ------------------------------------------------------------------------------
# One method on one maze, in a process of its own

GENERATOR: Any = None
URLS: dict[str, str] = {}  # of each supervisor's endpoint; "" makes no mistakes


def start(vgm: str) -> None:
    """Once a process: one thread, the generator and an endpoint for each supervisor."""
    import torch

    global GENERATOR
    torch.set_num_threads(1)
    logging.getLogger("collabvr").setLevel(logging.ERROR)
    GENERATOR = Wan(**{**WAN, "vgm": vgm})
    for name, errors in {"": vlm.Errors(), **SUPERVISORS}.items():
        server = vlm.serve(errors=errors)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        URLS[name] = f"http://127.0.0.1:{server.server_port}/v1"


def sample(method: str, segments: int | str, i: int, seed: int) -> dict:
    """One method on one maze, as a flat row."""
    kind, changes = METHODS[method]
    config = {**CONFIG, **changes}
    if segments == "foreign":
        maze, picture = foreign.foreign(i, seed)
        way = world.segments(world.shortest_path(maze.open, maze.start, maze.goal))
        config = {"N_max": max(3, len(way)), **config}
    else:
        maze = foreign.held_out(int(segments), i, seed)
        picture = world.draw(maze)
    supervisor = method.partition("-")[0]
    url = URLS.get(supervisor, URLS[""])
    models = Models(GENERATOR, OpenAIVLM(**VLM, vlm_url=url), seed=1000 * i)
    settled = Config(**config)
    result = kind(models, settled).run(picture, world.task(maze))
    by_rule = world.score(result.video.frames, maze)
    fine = by_rule.one_circle and not by_rule.left_corridors and not by_rule.jumped
    cost = models.cost()
    return {
        "method": method,
        "segments": segments,
        "i": i,
        "seed": seed,
        "status": result.status,
        "solved": float(by_rule.solved),
        "score": by_rule.progress * fine,
        "exhausted": exhausted(models.calls, settled),
        "vlm_calls": sum(n for role, n in cost["calls"].items() if role != "vgm"),
        **{name: cost[name] for name in ("vgm_seconds", "clips", "steps", "regenerations")},
    }


def exhausted(calls: list[Call], config: Config) -> list[tuple[str, bool | None]]:
    """Of each step with M rejections: what was then decided, and whether the next clip that was
    verified (of regen, the joined one) was accepted; None if there was none."""
    replies = [call for call in calls if call.role in ("verifier", "router") and call.reply]
    found = []
    for i, call in enumerate(replies):
        tries = sum(other.t == call.t for other in replies[: i + 1])
        if tries != config.M or call.reply["verdict"] != "reject":
            continue
        decision = config.on_exhausted
        if i + 1 < len(replies) and replies[i + 1].role == "router":
            decision = replies[i + 1].reply["action"]
        later = [other for other in replies[i + 1 :] if other.role == "verifier"]
        found.append((decision, later[0].reply["verdict"] == "accept" if later else None))
    return found


# ------------------------------------------------------------------------------
# All of them


@settings
class Compare:
    out: Path = Path("runs/compare")  # results folder, which resumes
    methods: list[str] = field(default_factory=lambda: list(HEADLINE))  # names of what to compare
    # straight pieces of the shortest path, or foreign
    segments: list[Literal["1", "2", "3", "4", "foreign"]] = field(
        default_factory=lambda: ["1", "2", "3"])
    mazes: Annotated[int, Field(ge=1)] = 35  # for each number of segments
    seed: Annotated[int, Field(ge=0)] = 0  # of the mazes
    vgm: Path = Path(WAN["vgm"])  # a checkpoint like tiny-wan
    workers: Annotated[int, Field(ge=1)] = 2  # processes, one thread each

    def run(self) -> int:
        """Compares, prints tables, draws figures. Raises Problem before anything is run."""
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown:
            raise Problem(f"There is no method {unknown[0]}. There are: {', '.join(METHODS)}.")
        if not (self.vgm / "model_index.json").is_file():
            raise Problem(f"{self.vgm} is no diffusers checkpoint.")
        self.out.mkdir(parents=True, exist_ok=True)
        rows = self.collect()
        table = self.summaries(rows)
        results = {"mazes": self.mazes, "seed": self.seed, "rows": table}
        collabvr.write_file(self.out / "results.json", collabvr.to_json(results))
        for each in (self.solved(rows), self.statistics(rows), self.exhaustion(rows)):
            print(each.markdown())
        try:
            figures.draw(table, self.out)
        except Problem as problem:
            print(f"No figures: {problem}")
        return 0

    def collect(self) -> list[dict]:
        """All rows that are asked for: the same code's from the file, others from the workers."""
        path = self.out / "runs.jsonl"
        code = self.code()
        done = {}
        for row in recorded(path):
            if row.get("code") == code:
                done[row["method"], str(row["segments"]), row["i"], row["seed"]] = row
        keys = [
            (method, segments, i, self.seed)
            for i in range(self.mazes)
            for segments in self.segments
            for method in self.methods
        ]
        todo = [key for key in keys if key not in done]
        spawned = multiprocessing.get_context("spawn")
        with (
            path.open("a") as file,
            tqdm(total=len(keys), initial=len(keys) - len(todo), unit="run") as bar,
            ProcessPoolExecutor(self.workers, spawned, start, (str(self.vgm),)) as pool,
        ):
            futures = {pool.submit(sample, *key): key for key in todo}
            try:
                for future in as_completed(futures):
                    row = {**future.result(), "code": code}
                    done[futures[future]] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)  # what is finished is in the file
        return [done[key] for key in keys]

    def code(self) -> str:
        """A hash of all that a row depends on: an older row does not count."""
        modules = (collabvr, baselines, vlm, world, foreign)
        files = [Path(module.__file__ or "") for module in modules]
        files += sorted(self.vgm.glob("*/*.safetensors"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]

    def of(self, rows: list[dict], method: str, segments: str = "all") -> list[dict]:
        return [
            row for row in rows
            if row["method"] == method and segments in (str(row["segments"]), "all")
        ]

    def summaries(self, rows: list[dict]) -> list[dict]:
        """Means with intervals: per method and number of segments, and per method over all."""
        found = []
        for method in self.methods:
            for segments in (*self.segments, "all"):
                some = self.of(rows, method, segments)
                row = {"method": method, "segments": segments, "n": len(some)}
                for name in NUMBERS:
                    values = [each[name] for each in some]
                    row[name] = float(np.mean(values))
                    if name == "solved":
                        row["solved_ci"] = stats.wilson(values)
                    else:
                        row[f"{name}_ci"] = stats.bootstrap(np.mean, values)
                found.append(row)
        return found

    def solved(self, rows: list[dict]) -> stats.Table:
        """Cost and solved share by number of segments, as the paper's Tables 1 and 3."""
        heads = [
            "foreign" if k == "foreign" else f"{k} segment{'' if k == '1' else 's'}"
            for k in self.segments
        ]
        head = ["method", "VGM s", *(f"solved, {name}" for name in [*heads, "all"]), "score"]
        lines = []
        for method in self.methods:
            mine = self.of(rows, method)
            line: list = [method, f"{np.mean([row['vgm_seconds'] for row in mine]):.1f}"]
            for segments in (*self.segments, "all"):
                some = self.of(rows, method, segments)
                line.append(stats.percent(row["solved"] for row in some))
            line.append(float(np.mean([row["score"] for row in mine])))
            lines.append(line)
        return stats.Table("", head, lines)

    def statistics(self, rows: list[dict]) -> stats.Table:
        """mean / standard deviation / median / range of what a run took: Table 10."""
        names = ["steps", "regenerations", "clips", "vlm_calls", "vgm_seconds"]
        lines = []
        for method in self.methods:
            line = [method]
            for name in names:
                x = np.array([row[name] for row in self.of(rows, method)])
                spread = f"{x.mean():.2f} / {x.std():.2f} / {np.median(x):g}"
                line.append(f"{spread} / {x.min():g}-{x.max():g}")
            lines.append(line)
        return stats.Table("", ["method", *names], lines)

    def exhaustion(self, rows: list[dict]) -> stats.Table:
        """What became of steps with M rejections; and the differences from the first method."""
        first = self.methods[0]
        head = ["method", "such mazes", "solved of them", "route: next clip accepted",
                f"solved, minus {first}", f"VGM s, minus {first}"]
        lines = []
        for method in self.methods:
            mine, base = self.of(rows, method), self.of(rows, first)
            hit = [row for row in mine if row["exhausted"]]
            decisions = [tuple(each) for row in hit for each in row["exhausted"]]
            accepted = []
            for name in sorted({decision for decision, _ in decisions}):
                times = sum(decision == name for decision, _ in decisions)
                accepted.append(f"{name} {decisions.count((name, True))} of {times}")
            line = [method, len(hit), f"{sum(row['solved'] for row in hit):.0f}",
                    ", ".join(accepted)]
            for name in ("solved", "vgm_seconds"):
                mean, low, high = stats.paired(
                    [row[name] for row in base], [row[name] for row in mine])
                line.append(f"{mean:+.2f} ({low:+.2f} to {high:+.2f})")
            lines.append(line)
        return stats.Table("", head, lines)


def recorded(path: Path) -> list[dict]:
    """The rows of a file; a line that a kill cut off is left out, and run again."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def main(argv: list[str] | None = None) -> int:
    return cli.command(__doc__, Compare, argv)


if __name__ == "__main__":
    sys.exit(main())
