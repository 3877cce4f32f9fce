"""The paper's statistics (A.4, C.1 to C.3) from the run folders of a benchmark alone.

    python -m examples.bench.summary results            text; summary.csv and summary.md in results
    python -m examples.bench.summary results other      and how they differ, sample by sample
    python -m examples.bench.summary results --price-in 1.25 --price-out 10 --price-second 0.15
    python -m examples.bench.summary results --fidelity     SSIM of inputs and first frames (A.4)

All samples count: one without a video has score 0, no steps, no clips, no calls, and so has one
that --fill-failed filled with a still picture. Scores are whoever judged the videos: a file
results/scores.json, {"sample id": score}, if there is one. VLM calls are those of the paper's
Table 10: plans and verifications whose reply was used. What our router adds stands beside them.
"""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import tyro
from PIL import Image
from pydantic import FiniteFloat, TypeAdapter

import collabvr
from collabvr import Problem, explained, write_file
from examples.cli import command, needed
from examples.runs import Run, inside, load_run, read_lines
from examples.stats import Table, paired

MEASURES = {  # of a sample, and what they are called
    "video": "video",  # shares are 0 or 1
    "complete": "complete",
    "score": "score",
    "vgm_seconds": "VGM seconds",
    "steps": "steps",
    "regenerations": "re-generations",
    "clips": "clips",
    "vlm_calls": "VLM calls",
    "router_calls": "router calls",
    "vlm_tokens": "VLM tokens",
    "dollars": "dollars",
}
SCORES = TypeAdapter(dict[str, FiniteFloat])  # what scores.json holds


@dataclass
class Summary:
    results: tyro.conf.Positional[Path]  # results folder of examples.bench.run
    # another one with the same samples: how it differs from the first
    other: tyro.conf.Positional[Path | None] = None
    price_in: float | None = None  # dollars per million tokens that the VLM reads (paper: 1.25)
    price_out: float | None = None  # and per million that it writes (paper: 10)
    price_second: float | None = None  # dollars per second of generated video (paper: Veo 0.15)
    fidelity: bool = False  # SSIM of inputs and first frames; up to 0.2 s a sample

    def run(self) -> int:
        """Prints the tables and writes them. Raises Problem."""
        rows = self.read(self.results)
        tables = [
            categories(rows), *distributions(rows), *verdicts(rows), calls(rows, self.prices()),
        ]
        if self.fidelity:
            tables.append(fidelity(rows))
        if self.other:
            tables.append(deltas(rows, self.read(self.other)))
        print("\n".join(x.text() for x in tables), end="")
        write_file(self.results / "summary.csv", spreadsheet(tables).encode())
        write_file(self.results / "summary.md", "\n".join(x.markdown() for x in tables).encode())
        return 0

    def prices(self) -> dict[str, float]:
        """Dollars per token and per second, as far as they are known."""
        given = {
            "tokens_in": (self.price_in, 1e6),
            "tokens_out": (self.price_out, 1e6),
            "seconds": (self.price_second, 1),
        }
        return {k: price / unit for k, (price, unit) in given.items() if price is not None}

    def read(self, folder: Path) -> list[dict]:
        """A row for every sample: MEASURES, its run, its category. Raises Problem."""
        rows = []
        with explained(f"{folder} holds no results of examples.bench.run", OSError, LookupError,
                       TypeError):
            for _, line in read_lines(folder / "samples.jsonl"):
                rows.append(self.row(folder, line))
        if not rows:
            raise Problem(f"{folder} holds no samples.")
        join_scores(folder, rows)
        filled = [x["id"] for x in rows if x["filled"]]
        if filled:
            some = ", ".join(filled[:9]) + (", .." if len(filled) > 9 else "")
            print(f"{folder}: {len(filled)} of {len(rows)} samples failed and were filled with a "
                  f"still picture; they count as not made: {some}.", file=sys.stderr)
        made_by = {str(x["made_by"]) for x in rows if x["video"]}
        if len(made_by) > 1:
            print(f"{folder} holds runs of {len(made_by)} different settings.", file=sys.stderr)
        return rows

    def row(self, folder: Path, line: dict) -> dict:
        place = folder / "runs" / line["id"]
        run = load_run(place, folder)
        made = run.video() is not None
        if not made:  # what an unfinished one has cost so far is no result
            run = Run(place, "", [], [], {})
        prices = self.prices()
        replies = [c for c in run.calls if c.reply]
        return run.cost() | {
            "id": line["id"],
            "category": line["category"],
            "run": run,
            "made_by": run.facts.get("made_by"),  # a hash of the settings
            "filled": not made and inside(place / "still.mp4", folder) is not None,
            "video": float(made),
            "complete": float(run.status == "complete"),
            "score": None,
            "vlm_calls": sum(c.role in ("planner", "verifier") for c in replies),
            "router_calls": sum(c.role == "router" for c in replies),
            "other_calls": sum(c.role not in ("planner", "verifier", "router") for c in replies),
            "router_clips": router_clips(run.calls),
            "vlm_tokens": sum((c.tokens_in or 0) + (c.tokens_out or 0) for c in run.calls),
            "dollars": dollars(run.calls, prices) if prices else None,
        }


def router_clips(calls: list) -> int:
    """Clips that the router ordered: its partial re-generations and its fallbacks."""
    count, ordered = 0, False
    for c in calls:
        if c.role == "router" and c.reply:
            ordered = c.reply.get("action") in ("regen", "fallback")
        elif ordered and c.clip:
            count, ordered = count + 1, False
    return count


def dollars(calls: list, prices: dict[str, float]) -> float:
    return sum(price * (getattr(c, k) or 0) for c in calls for k, price in prices.items())


def join_scores(folder: Path, rows: list[dict]) -> None:
    """Puts the scores into the rows, if there are any. Raises Problem."""
    path = folder / "scores.json"
    if not path.exists():
        return
    try:
        scores = SCORES.validate_json(path.read_bytes())
    except ValueError as error:
        raise Problem(f"{path} is no object of sample ids and numbers "
                      f"({collabvr.every_fault(error)}).") from error
    unknown = scores.keys() - {x["id"] for x in rows}
    missing = {x["id"] for x in rows if x["video"]} - scores.keys()
    if unknown:
        raise Problem(f"{path} names {min(unknown)}, which is no sample of {folder}.")
    if missing:
        raise Problem(f"{path} lacks {min(missing)}, which has a video.")
    for x in rows:
        x["score"] = x["video"] * scores.get(x["id"], 0)


def spreadsheet(tables: list[Table]) -> str:
    """All tables as CSV. What a spreadsheet would take for a formula is quoted: '=1+1."""
    def plain(cell):
        risky = isinstance(cell, str) and cell.lstrip()[:1] in ("=", "+", "-", "@")
        return f"'{cell}" if risky or isinstance(cell, str) and cell[:1] in "\t\r\n" else cell

    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["table", "row", "column", "value"])
    for table in tables:
        for name, *values in table.rows:
            for column, value in zip(table.head[1:], values, strict=True):
                writer.writerow([plain(x) for x in (table.title, name, column, value)])
    return out.getvalue()


# ------------------------------------------------------------------------------
# The tables


def mean(values) -> float | None:
    """None if there are none, or one is unknown."""
    values = list(values)
    return None if not values or None in values else float(np.mean(values))


def categories(rows: list[dict]) -> Table:
    groups = {"all": rows}
    names = sorted({x["category"] for x in rows})
    if len(names) > 1:
        groups |= {name: [x for x in rows if x["category"] == name] for name in names}
    table = Table("Means per sample (a sample without a video counts as 0)",
                  ["category", "samples", "filled with a still", *MEASURES.values()], [])
    for name, group in groups.items():
        filled = sum(x["filled"] for x in group)
        means = [mean(x[k] for x in group) for k in MEASURES]
        table.rows.append([name, len(group), filled, *means])
    return table


def distributions(rows: list[dict]) -> list[Table]:
    """Tables 10 to 12. The standard deviation is that of a sample (n - 1)."""
    names = {
        "steps": "steps",
        "regenerations": "re-generations",
        "clips": "clips",
        "vlm_calls": "VLM calls: plans and verifications used",
        "vgm_seconds": "VGM seconds",
        "router_calls": "router calls, not in the paper's count",
        "router_clips": "clips ordered by the router, among the above",
        "other_calls": "calls of other roles, not in the paper's count",
    }
    statistics = Table("Run statistics (Table 10)",
                       ["", "mean", "std", "median", "least", "most"], [])
    for key, name in names.items():
        x = np.array([row[key] for row in rows])
        std = float(x.std(ddof=1)) if len(x) > 1 else None
        statistics.rows.append(
            [name, float(x.mean()), std, float(np.median(x)), x.min().item(), x.max().item()])
    tables = [statistics]
    for key, name in {"steps": "steps (Table 11)", "regenerations": "re-generations (Table 12)",
                      "clips": "clips", "vlm_calls": "VLM calls"}.items():
        x = np.array([row[key] for row in rows])
        table = Table(f"Samples by number of {name}", ["number", "samples", "share"], [])
        for value in np.unique(x):
            table.rows.append([str(value), int((x == value).sum()), float((x == value).mean())])
        tables.append(table)
    return tables


def verdicts(rows: list[dict]) -> list[Table]:
    """Tables 13 and 14. A step's last verdict is the final one, for an accept ends the step."""
    steps: dict[tuple, list[bool]] = {}  # (sample, t): was it accepted, attempt by attempt
    for x in rows:
        for c in x["run"].calls:
            if c.role == "verifier" and c.reply:
                accepted = c.reply.get("verdict") == "accept"
                steps.setdefault((x["id"], c.t), []).append(accepted)
    groups = {
        "steps, at the first attempt": [tries[0] for tries in steps.values()],
        "steps, in the end": [tries[-1] for tries in steps.values()],
        "verified clips": [accepted for tries in steps.values() for accepted in tries],
    }
    accepted = Table("Accepted by the verifier (Table 13)",
                     ["", "verified", "accepted", "share"],
                     [[name, len(v), sum(v), mean(v)] for name, v in groups.items()])
    rejected = Table("Final reject rate per step (Table 14)",
                     ["step", "verified", "rejected", "share"], [])
    for t in sorted({t for _, t in steps}):
        finals = [not tries[-1] for (_, s), tries in steps.items() if s == t]
        rejected.rows.append([str(t), len(finals), sum(finals), mean(finals)])
    return [accepted, rejected]


def calls(rows: list[dict], prices: dict[str, float]) -> Table:
    """Tables 15 to 17. Failed calls count; tokens are means of the calls that tell them."""
    every = [c for x in rows for c in x["run"].calls]
    groups = {"all": every, "VLM": [c for c in every if c.role != "vgm"]}
    for role in dict.fromkeys(c.role for c in every):
        groups[role] = [c for c in every if c.role == role]
    n, whole = len(rows), sum(c.wall_seconds for c in every)
    table = Table("Calls (Tables 15 to 17)", [
        "role", "calls/sample", "tokens in/call", "tokens out/call", "s/call", "s/sample",
        "share of wall time", "$/sample"], [])
    for name, group in groups.items():
        wall = sum(c.wall_seconds for c in group)
        table.rows.append([
            name,
            len(group) / n,
            mean(c.tokens_in for c in group if c.tokens_in),
            mean(c.tokens_out for c in group if c.tokens_out),
            mean(c.wall_seconds for c in group),
            wall / n,
            wall / whole if whole else None,
            dollars(group, prices) / n if prices else None,
        ])
    return table


def fidelity(rows: list[dict]) -> Table:
    """App. A.4: SSIM of the input picture and frame 0 of the first clip."""
    found = []
    for x in rows:
        run = x["run"]
        first = next((c for c in run.calls if c.clip), None)
        path = run.file(first.clip) if first else None
        picture = run.picture()
        if path is not None and picture is not None:
            with (explained(f"{path} cannot be read", Exception),  # whatever it holds now
                  av.open(str(path), format="matroska") as file):
                frame = next(file.decode(video=0)).to_ndarray(format="rgb24")
            found.append(ssim(picture, frame))
    std = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return Table("First-frame fidelity (A.4)", ["", "clips", "mean", "std"],
                 [["SSIM", len(found), mean(found), std]])


def ssim(picture, frame) -> float:
    """SSIM (Wang et al. 2004) of two uint8 RGB (H, W, 3), the first one scaled to the second's
    size. Raises Problem without scikit-image."""
    structural_similarity = needed("skimage.metrics").structural_similarity
    scaled = Image.fromarray(picture).resize(frame.shape[1::-1], Image.Resampling.LANCZOS)
    return float(structural_similarity(
        np.array(scaled), frame, channel_axis=2, sigma=1.5, gaussian_weights=True,
        use_sample_covariance=False))


def deltas(one: list[dict], two: list[dict]) -> Table:
    """Two minus one, paired by sample, with bootstrap intervals. Raises Problem."""
    other = {x["id"]: x for x in two}
    if {x["id"] for x in one} != other.keys():
        raise Problem("The two folders hold different samples, so they cannot be paired.")
    table = Table("The second folder minus the first, paired by sample",
                  ["", "first", "second", "difference", "95 % from", "to"], [])
    for key, name in MEASURES.items():
        first = [x[key] for x in one]
        second = [other[x["id"]][key] for x in one]
        if None not in first and None not in second:
            table.rows.append([name, mean(first), mean(second), *paired(first, second)])
    return table


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after one sentence on stderr."""
    return command(__doc__, Summary, argv)


if __name__ == "__main__":
    sys.exit(main())
