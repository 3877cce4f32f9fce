"""The paper's statistics (App. A.4, C.1 to C.3) from the run folders of benchmark.py alone.

    python examples/benchmark.py summary results               text; summary.csv, summary.md in it
    python examples/benchmark.py summary results other         and how they differ, sample by sample
    python examples/benchmark.py summary results --price-in 1.25 --price-out 10 --price-second 0.15

All samples count: one without a video has score 0, no steps, no clips, no calls. Scores are whoever
judged the videos: a file results/scores.json, {"sample id": score}, if there is one.
"""
from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import tyro
from PIL import Image
from pydantic import FiniteFloat, TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from collabvr import Models, Problem, explained, write_file

MEASURES = ["video", "complete", "score", "vgm_seconds", "steps", "regenerations", "clips",
            "vlm_calls", "vlm_tokens", "dollars"]  # of a sample; shares are 0 or 1
SCORES = TypeAdapter(dict[str, FiniteFloat])  # what scores.json holds


@dataclass
class Table:
    title: str
    head: list[str]
    rows: list[list]

    def cells(self) -> list[list[str]]:
        """All as text, the head first; what is unknown is a dash."""
        return [self.head] + [["-" if x is None else x if isinstance(x, str) else f"{x:,}" if
                isinstance(x, int) else f"{x:,.3f}" for x in row] for row in self.rows]

    def text(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(
            row[1:], widths[1:]))]).rstrip() for row in cells]
        return "\n".join([self.title, *lines, ""])

    def markdown(self) -> str:
        head, *rows = [" | ".join(x.replace("|", "\\|") for x in row) for row in self.cells()]
        rule = "|".join(["---"] + ["---:"] * (len(self.head) - 1))
        return "\n".join([f"**{self.title}**", "", f"| {head} |", f"|{rule}|",
                          *(f"| {x} |" for x in rows), ""])


@dataclass
class Summary:
    results: tyro.conf.Positional[Path]  # results folder of benchmark.py
    # another one with the same samples: how it differs from the first
    other: tyro.conf.Positional[Path | None] = None
    price_in: float | None = None  # dollars per million tokens that the VLM reads (paper: 1.25)
    price_out: float | None = None  # and per million that it writes (paper: 10)
    price_second: float | None = None  # dollars per second of generated video (paper: Veo 0.15)

    def run(self) -> int:
        """Prints the tables and writes them. Raises Problem."""
        rows = self.read(self.results)
        tables = [categories(rows), *distributions(rows), *verdicts(rows),
                  calls(rows, self.prices()), fidelity(rows, self.results)]
        if self.other:
            tables.append(deltas(rows, self.read(self.other)))
        print("\n".join(x.text() for x in tables), end="")
        out = io.StringIO()
        csv.writer(out).writerows([["table", "row", "column", "value"], *(
            [x.title, row[0], name, value] for x in tables for row in x.rows
            for name, value in zip(x.head[1:], row[1:]))])
        write_file(self.results / "summary.csv", out.getvalue().encode())
        write_file(self.results / "summary.md", "\n".join(x.markdown() for x in tables).encode())
        return 0

    def prices(self) -> dict[str, float]:
        """Dollars per token and per second, as far as they are known."""
        given = {"tokens_in": (self.price_in, 1e6), "tokens_out": (self.price_out, 1e6),
                 "seconds": (self.price_second, 1)}
        return {k: price / unit for k, (price, unit) in given.items() if price is not None}

    def read(self, folder: Path) -> list[dict]:
        """A row for every sample: MEASURES, calls, category. Raises Problem."""
        rows, scores, made = [], {}, set()
        with explained(f"{folder} holds no results of benchmark.py", OSError, ValueError, KeyError):
            for x in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
                trace, run = {"calls": [], "status": ""}, folder / "runs" / x["id"]
                if (run / "video.mp4").exists() and (run / "trace.json").exists():
                    trace = json.loads((run / "trace.json").read_bytes())
                    own = ("seconds_first", "seconds_next") if trace.get("seconds") else ()
                    made.add(json.dumps({k: v for k, v in trace.get("settings", {}).items()
                                         if k not in own}))  # the sample's own are no difference
                rows.append(x | {"calls": trace["calls"], "video": float(trace["status"] != ""),
                                 "complete": float(trace["status"] == "complete")})
            if (folder / "scores.json").exists():
                scores = SCORES.validate_json((folder / "scores.json").read_bytes())
        if scores.keys() - {x["id"] for x in rows}:
            raise Problem(f"{folder}/scores.json names samples that {folder} has not.")
        if scores and (missing := {x["id"] for x in rows if x["video"]} - scores.keys()):
            raise Problem(f"{folder}/scores.json lacks {min(missing)}, which has a video.")
        if len(made) > 1:
            print(f"{folder} holds runs of {len(made)} different settings.", file=sys.stderr)
        for x in rows:
            said, prices = x["calls"], self.prices()
            only: Any = types.SimpleNamespace(calls=said)  # all that the cost needs
            x |= Models.cost(only) | {"calls": said}
            x["vlm_calls"] = sum(c["role"] != "vgm" for c in said)
            x["vlm_tokens"] = sum(c.get(k) or 0 for c in said for k in ("tokens_in", "tokens_out"))
            x["dollars"] = sum((c.get(k) or 0) * p for c in said for k, p in prices.items()
                               ) if prices else None
            x["score"] = x["video"] * scores.get(x["id"], 0) if scores else None
        if not rows:
            raise Problem(f"{folder} holds no samples.")
        return rows


def mean(values) -> float | None:
    """None if there are none, or one is unknown."""
    values = list(values)
    return None if not values or None in values else float(np.mean(values))


def categories(rows: list[dict]) -> Table:
    groups = {k: [x for x in rows if x["category"] == k] for k in sorted(
        {x["category"] for x in rows})}
    groups = {"all": rows} | (groups if len(groups) > 1 else {})
    return Table("Means per sample (a sample without a video counts as 0)", ["category", "samples",
                 *MEASURES], [[name, len(group), *(mean(x[k] for x in group) for k in MEASURES)]
                              for name, group in groups.items()])


def distributions(rows: list[dict]) -> list[Table]:
    """Tables 10 to 12; the standard deviation is that of a sample (n - 1)."""
    names = {"steps": "steps", "regenerations": "re-generations", "clips": "clips",
             "vlm_calls": "VLM calls", "vgm_seconds": "VGM seconds"}
    values = {name: np.array([x[k] for x in rows]) for k, name in names.items()}
    tables = [Table("Run statistics (Table 10)", ["", "mean", "std", "median", "least", "most"], [
        [name, float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else None, float(np.median(x)),
         x.min().item(), x.max().item()] for name, x in values.items()])]
    for name, table in {"steps": " (Table 11)", "re-generations": " (Table 12)", "clips": "",
                        "VLM calls": ""}.items():
        x = values[name]
        tables.append(Table(f"Samples by number of {name}{table}", [name, "samples", "share"], [
            [str(k), int((x == k).sum()), float((x == k).mean())] for k in np.unique(x)]))
    return tables


def verdicts(rows: list[dict]) -> list[Table]:
    """Tables 13 and 14. A step's last verdict is the final one, for an accept ends the step."""
    steps: dict[tuple, list[bool]] = {}  # (sample, t): was it accepted, attempt by attempt
    for x in rows:
        for c in x["calls"]:
            if c["role"] == "verifier" and "reply" in c:
                steps.setdefault((x["id"], c["t"]), []).append(c["reply"]["verdict"] == "accept")
    first, final = [v[0] for v in steps.values()], [v[-1] for v in steps.values()]
    every = [a for v in steps.values() for a in v]
    accepted = [[name, len(v), sum(v), mean(v)] for name, v in (
        ("steps, at the first attempt", first), ("steps, in the end", final),
        ("verified clips", every))]
    groups = {t: [v[-1] for (_, s), v in steps.items() if s == t] for t in sorted(
        {t for _, t in steps})}
    return [Table("Accepted by the verifier (Table 13)", ["", "verified", "accepted", "share"],
                  accepted),
            Table("Final reject rate per step (Table 14)", [
                "step", "verified", "rejected", "share"], [
                [str(t), len(v), len(v) - sum(v), 1 - np.mean(v).item()]
                for t, v in groups.items()])]


def calls(rows: list[dict], prices: dict[str, float]) -> Table:
    """Tables 15 to 17. Failed calls count; tokens are means of the calls that tell them."""
    said = [c for x in rows for c in x["calls"]]
    roles = list(dict.fromkeys(c["role"] for c in said))
    groups = {"all": said, "VLM": [c for c in said if c["role"] != "vgm"],
              **{role: [c for c in said if c["role"] == role] for role in roles}}
    n, whole = len(rows), sum(c["wall_seconds"] for c in said)
    table = Table("Calls (Tables 15 to 17)", ["role", "calls/sample", "tokens in/call",
                  "tokens out/call", "s/call", "s/sample", "share of wall time", "$/sample"], [])
    for name, group in groups.items():
        walls = [c["wall_seconds"] for c in group]
        money = sum((c.get(k) or 0) * p for c in group for k, p in prices.items()) / n
        table.rows.append([name, len(group) / n, *(mean(c[k] for c in group if c.get(k)) for k in (
            "tokens_in", "tokens_out")), mean(walls), sum(walls) / n,
            sum(walls) / whole if whole else None, money if prices else None])
    return table


def fidelity(rows: list[dict], folder: Path) -> Table:
    """App. A.4: SSIM of the input picture and frame 0 of the first clip."""
    table = Table("First-frame fidelity (A.4)", ["", "clips", "mean", "std"], [])
    with contextlib.suppress(ImportError):
        import skimage.metrics  # noqa: F401  for ssim
        found = []
        for x in rows:
            run = folder / "runs" / x["id"]
            for clip in [c for c in x["calls"] if "clip" in c][:1]:
                with explained(f"{run} cannot be read", Exception):  # whatever it holds now
                    frame = iio.imread(run / clip["clip"], plugin="pyav")[0]
                    found.append(ssim(np.array(Image.open(run / "input.png")), frame))
        std = float(np.std(found, ddof=1)) if len(found) > 1 else None
        table.rows.append(["SSIM", len(found), mean(found), std])
        return table
    table.rows.append(["SSIM needs scikit-image: see examples/requirements.txt", None, None, None])
    return table


def ssim(picture, frame) -> float:
    """SSIM (Wang et al. 2004) of two uint8 RGB (H, W, 3), the first one scaled to the second's
    size. Raises ImportError without scikit-image."""
    from skimage.metrics import structural_similarity
    scaled = Image.fromarray(picture).resize(frame.shape[1::-1], Image.Resampling.LANCZOS)
    return float(structural_similarity(np.array(scaled), frame, channel_axis=2, sigma=1.5,
                                       gaussian_weights=True, use_sample_covariance=False))


def deltas(one: list[dict], two: list[dict]) -> Table:
    """Two minus one, sample by sample; 95 % intervals by a bootstrap of the pairs. Problem if they
    hold different samples."""
    other = {x["id"]: x for x in two}
    if {x["id"] for x in one} != other.keys():
        raise Problem("The two folders hold different samples, so they cannot be paired.")
    picks = np.random.default_rng(0).integers(len(one), size=(10_000, len(one)))
    table = Table("The second folder minus the first, paired by sample", ["", "first", "second",
                  "difference", "95 % from", "to"], [])
    for k in MEASURES:
        pairs = [(x[k], other[x["id"]][k]) for x in one]
        if not any(None in pair for pair in pairs):
            a, b = np.array(pairs, float).T
            low, high = np.percentile((b - a)[picks].mean(1), [2.5, 97.5])
            table.rows.append([k, *(float(x) for x in (
                a.mean(), b.mean(), (b - a).mean(), low, high))])
    return table
