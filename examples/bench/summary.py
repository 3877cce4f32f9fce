"""The paper's statistics (A.4, C.1 to C.3) from the run folders of a benchmark alone.

    python -m examples.bench.summary results            text; summary.csv and summary.md in results
    python -m examples.bench.summary results other      and how they differ, sample by sample
    python -m examples.bench.summary results --price-in 1.25 --price-out 10 --price-second 0.15
    python -m examples.bench.summary results --fidelity     SSIM of inputs and first frames (A.4)

All samples count. One without a video has score 0, no steps, no clips, no calls, and so has one
whose place --fill-failed gave to a still picture. Scores are whoever judged the videos: a file
results/scores.json, {"sample id": score}, if there is one. VLM calls are those of the paper's
Table 10: plans and verifications whose reply was used. What our router adds stands beside them.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tyro
from PIL import Image
from pydantic import FiniteFloat, TypeAdapter

from collabvr import Call, Problem, explained, write_file
from examples.cli import command, needed
from examples.runs import Run, load_run, read_lines, verdicts
from examples.stats import Table, paired

MEASURES = {  # of a sample, and what they are called
    "still": "still",  # shares are 0 or 1
    "missing": "missing",
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
        tables = [categories(rows), *distributions(rows), *accepts(rows), self.calls(rows)]
        if self.fidelity:
            tables.append(fidelity(rows))
        if self.other:
            tables.append(deltas(rows, self.read(self.other)))
        print("\n".join(table.text() for table in tables), end="")
        write_file(self.results / "summary.csv", spreadsheet(tables).encode())
        markdown = "\n".join(table.markdown() for table in tables)
        write_file(self.results / "summary.md", markdown.encode())
        return 0

    def read(self, folder: Path) -> list[dict]:
        """A row for every sample: MEASURES, its run, its category. Raises Problem."""
        rows = []
        with explained(f"{folder} holds no results of examples.bench.run", OSError, LookupError):
            for _, sample in read_lines(folder / "samples.jsonl"):
                rows.append(self.row(folder, sample))
        if not rows:
            raise Problem(f"{folder} holds no samples.")
        join_scores(folder, rows)
        for kind in ("still", "missing"):
            ids = [row["id"] for row in rows if row[kind]]
            if ids:
                print(f"{folder}: {len(ids)} of {len(rows)} samples are {kind}: "
                      f"{', '.join(ids[:9])}{', ..' * (len(ids) > 9)}.", file=sys.stderr)
        return rows

    def row(self, folder: Path, sample: dict) -> dict:
        place = folder / "runs" / sample["id"]
        run = load_run(place)
        made = run.video() is not None
        if not made:  # what an unfinished one has cost so far is no result
            run = Run(place, "", [], [], {})
        filled = not made and (place / "still.mp4").exists()
        cost = run.cost()
        roles = [call.role for call in run.calls if call.reply]
        return cost | {
            "id": sample["id"],
            "category": sample["category"],
            "run": run,
            "made": made,
            "still": float(filled or made and not cost["clips"]),
            "missing": float(not made and not filled),
            "complete": float(run.status == "complete"),
            "score": None,
            "vlm_calls": roles.count("planner") + roles.count("verifier"),
            "router_calls": roles.count("router"),
            "other_calls": sum(x not in ("planner", "verifier", "router") for x in roles),
            "vlm_tokens": sum(call.tokens_in + call.tokens_out for call in run.calls),
            "dollars": self.dollars(run.calls),
        }

    def dollars(self, calls: list[Call]) -> float | None:
        """What calls cost, as far as prices are given; None if there are none."""
        prices = {"tokens_in": self.price_in, "tokens_out": self.price_out,
                  "seconds": self.price_second}
        given = {name: price for name, price in prices.items() if price is not None}
        units = {"seconds": 1.0}  # and a million tokens
        return None if not given else sum(
            price * (getattr(call, name) or 0) / units.get(name, 1e6)
            for call in calls for name, price in given.items())

    def calls(self, rows: list[dict]) -> Table:
        """Tables 15 to 17. Failed calls count; tokens are means of the calls that tell them."""
        every = [call for row in rows for call in row["run"].calls]
        groups = {"all": every, "VLM": [call for call in every if call.role != "vgm"]}
        for role in dict.fromkeys(call.role for call in every):
            groups[role] = [call for call in every if call.role == role]
        n, whole = len(rows), sum(call.wall_seconds for call in every)
        table = Table("Calls (Tables 15 to 17)", [
            "role", "calls/sample", "tokens in/call", "tokens out/call", "s/call", "s/sample",
            "share of wall time", "$/sample"], [])
        for name, group in groups.items():
            wall = sum(call.wall_seconds for call in group)
            dollars = self.dollars(group)
            table.rows.append([
                name,
                len(group) / n,
                mean(call.tokens_in for call in group if call.tokens_in),
                mean(call.tokens_out for call in group if call.tokens_out),
                mean(call.wall_seconds for call in group),
                wall / n,
                wall / whole if whole else None,
                None if dollars is None else dollars / n,
            ])
        return table


def join_scores(folder: Path, rows: list[dict]) -> None:
    """Puts the scores into the rows, if there are any. Raises Problem."""
    path = folder / "scores.json"
    if not path.exists():
        return
    with explained(f"{path} is no object of sample ids and numbers", ValueError):
        scores = SCORES.validate_json(path.read_bytes())
    unknown = scores.keys() - {row["id"] for row in rows}
    missing = {row["id"] for row in rows if row["made"]} - scores.keys()
    if unknown:
        raise Problem(f"{path} names {min(unknown)}, which is no sample of {folder}.")
    if missing:
        raise Problem(f"{path} lacks {min(missing)}, which has a video.")
    for row in rows:
        row["score"] = scores[row["id"]] if row["made"] else 0.0


def spreadsheet(tables: list[Table]) -> str:
    """All tables as CSV, a line for each number."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["table", "row", "column", "value"])
    for table in tables:
        for name, *values in table.rows:
            for column, value in zip(table.head[1:], values, strict=True):
                writer.writerow([table.title, name, column, value])
    return out.getvalue()


# ------------------------------------------------------------------------------
# The tables


def mean(values: Iterable[float | None]) -> float | None:
    """None if there are none, or one is unknown."""
    values = list(values)
    return None if not values or None in values else float(np.mean(values))  # type: ignore


def deviation(values) -> float | None:
    """The standard deviation of a sample (n - 1)."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def categories(rows: list[dict]) -> Table:
    groups = {"all": rows}
    names = sorted({row["category"] for row in rows})
    if len(names) > 1:
        groups |= {name: [row for row in rows if row["category"] == name] for name in names}
    table = Table("Means of all samples (one without a video counts as 0)",
                  ["category", "samples", *MEASURES.values()], [])
    for name, group in groups.items():
        means = [mean(row[key] for row in group) for key in MEASURES]
        table.rows.append([name, len(group), *means])
    return table


def distributions(rows: list[dict]) -> list[Table]:
    """Tables 10 to 12."""
    names = {
        "steps": "steps",
        "regenerations": "re-generations",
        "clips": "clips",
        "vlm_calls": "VLM calls: plans and verifications used",
        "vgm_seconds": "VGM seconds",
        "router_calls": "router calls, not in the paper's count",
        "other_calls": "calls of other roles, not in the paper's count",
    }
    head = ["", "mean", "std", "median", "least", "most"]
    statistics = Table("Run statistics (Table 10)", head, [])
    for key, name in names.items():
        x = np.array([row[key] for row in rows])
        statistics.rows.append([name, float(x.mean()), deviation(x), float(np.median(x)),
                                x.min().item(), x.max().item()])
    tables = [statistics]
    for key, name in {"steps": "steps (Table 11)", "regenerations": "re-generations (Table 12)",
                      "clips": "clips", "vlm_calls": "VLM calls"}.items():
        x = np.array([row[key] for row in rows])
        table = Table(f"Samples by number of {name}", ["number", "samples", "share"], [])
        for value in np.unique(x):
            table.rows.append([str(value), int((x == value).sum()), float((x == value).mean())])
        tables.append(table)
    return tables


def accepts(rows: list[dict]) -> list[Table]:
    """Tables 13 and 14. A step's last verdict is the final one, for an accept ends the step."""
    steps: dict[tuple, list[bool]] = {}  # (sample, t): was it accepted, clip by clip
    for row in rows:
        for verdict in verdicts(row["run"].calls):
            steps.setdefault((row["id"], verdict.t), []).append(verdict.accepted)
    groups = {
        "steps, at the first attempt": [tries[0] for tries in steps.values()],
        "steps, in the end": [tries[-1] for tries in steps.values()],
        "verified clips": [x for tries in steps.values() for x in tries],
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


def fidelity(rows: list[dict]) -> Table:
    """App. A.4: SSIM of the input picture and frame 0 of the first clip."""
    found = []
    for row in rows:
        run = row["run"]
        clip = next((call.clip for call in run.calls if call.clip), None)
        if clip is not None:
            with explained(f"{run.folder / clip} cannot be read", Exception):
                frame = iio.imread(run.folder / clip, plugin="pyav", index=0)
            found.append(ssim(run.picture(), frame))
    return Table("First-frame fidelity (A.4)", ["", "clips", "mean", "std"],
                 [["SSIM", len(found), mean(found), deviation(found)]])


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
    other = {row["id"]: row for row in two}
    if {row["id"] for row in one} != other.keys():
        raise Problem("The two folders hold different samples, so they cannot be paired.")
    table = Table("The second folder minus the first, paired by sample",
                  ["", "first", "second", "difference", "95 % from", "to"], [])
    for key, name in MEASURES.items():
        first = [row[key] for row in one]
        second = [other[row["id"]][key] for row in one]
        if None not in first and None not in second:
            table.rows.append([name, mean(first), mean(second), *paired(first, second)])
    return table


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after one sentence on stderr."""
    return command(__doc__, Summary, argv)


if __name__ == "__main__":
    sys.exit(main())
