"""The measures of the paper's Table 6: D1 of plans, D2 of verdicts, D3 of suggestions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from collabvr import Problem
from examples.stats import Table, estimate, percent
from examples.supervisor import points as files
from examples.supervisor.points import Label

HEADS = {
    "D1, plan depth": ["exact match", "MAE"],
    "D2, verdicts": ["accept recall", "reject recall", "overall", "kappa"],
    "D3, suggestions (1 to 3)": ["mean", ">= 2", "= 3"],
}
PAPER = {  # Table 6, as published: D1, D2 (kappa on Gen-ViRe only) and D3
    "paper: Gemini 2.5 Pro": [
        ["68.0 %", ".366"], ["84.8 %", "65.6 %", "75.2 %", ".676"], ["2.61", "93.8 %", "67.5 %"]],
    "paper: Qwen3.5-27B": [
        ["58.7 %", ".491"], ["82.4 %", "44.8 %", "63.6 %", ".432"], ["2.55", "95.0 %", "60.0 %"]],
    "paper: Qwen3.5-9B": [
        ["56.4 %", ".484"], ["77.6 %", "40.8 %", "59.2 %", ".304"], ["2.35", "86.3 %", "48.8 %"]],
}


def plan_depth(labels: list[Label], said: dict) -> list:
    """D1. Steps from here, the planned one included; an unusable plan is no match."""
    hits, truth, told = [], [], []
    for label in labels:
        if label.steps is None:
            continue
        p = said[label.id]
        if p is None:
            hits.append(False)
            continue
        steps = 0 if p["task_complete"] else max(1, p["estimated_steps_remaining"])  # as in line 10
        hits.append(steps == label.steps)
        truth.append(label.steps)
        told.append(steps)
    return [len(hits), percent(hits, 1), estimate(mean_absolute_error, truth, told)]


def mean_absolute_error(truth: np.ndarray, told: np.ndarray) -> float:
    return float(np.abs(truth - told).mean())


def verdicts(labels: list[Label], said: dict) -> list[tuple[str, str]]:
    """What the label says, and the reply."""
    pairs: list[tuple[str, str]] = []
    for label in labels:
        if label.verdict is not None:
            reply = said[label.id]
            pairs.append((label.verdict, reply["verdict"] if reply else "unusable"))
    return pairs


def verifier(labels: list[Label], said: dict) -> list:
    """D2. Recall: of what people accept, or reject, how much it does, too."""
    pairs = verdicts(labels, said)
    row: list = [len(pairs)]
    for kinds in (["accept"], ["reject"], ["accept", "reject"]):
        row.append(percent([truth == told for truth, told in pairs if truth in kinds], 1))
    return [*row, estimate(kappa, [truth for truth, _ in pairs], [told for _, told in pairs])]


def kappa(truth: np.ndarray, told: np.ndarray) -> float:
    """Cohen's kappa; 0 if all are of one kind, for then there is nothing but chance."""
    chance = sum((truth == kind).mean() * (told == kind).mean() for kind in np.unique(truth))
    if chance == 1:
        return 0.0
    return float(((truth == told).mean() - chance) / (1 - chance))


def suggestions(labels: list[Label], said: dict) -> list:
    """D3. Of those ratings that are of its own suggestions."""
    ratings = []
    for label in labels:
        reply = said[label.id] or {}
        if label.rating is not None and reply.get("suggestion") == label.suggestion:
            ratings.append(label.rating)
    return [
        len(ratings), estimate(np.mean, ratings),
        percent([rating >= 2 for rating in ratings], 1),
        percent([rating == 3 for rating in ratings], 1),
    ]


def confusion(name: str, pairs: list[tuple[str, str]]) -> Table:
    kinds = ["accept", "reject", "unusable"]
    rows: list[list] = []
    for label in ("accept", "reject"):
        rows.append([label, *[pairs.count((label, kind)) for kind in kinds]])
    return Table(f"{name}: by label, what it said", ["", *kinds], rows)


@dataclass
class Score:
    """Prints D1, D2 and D3 of replies, with intervals of 95 %, beside the paper's Table 6."""

    labels: tyro.conf.Positional[Path]  # labels.jsonl
    replies: tyro.conf.Positional[tuple[Path, ...]]  # files that export and ask wrote

    def run(self) -> int:
        labels = files.read_labels(self.labels)
        if not self.replies:
            raise Problem("Name at least one file of replies.")
        tables = []
        for i, (title, heads) in enumerate(HEADS.items()):
            published: list[list] = [[name, "", *rows[i]] for name, rows in PAPER.items()]
            tables.append(Table(title, ["", "n", *heads], published))
        confusions = []
        for path in self.replies:
            said = files.read_replies(path)
            self.check(labels, said, path)
            for table, measure in zip(tables, (plan_depth, verifier, suggestions), strict=True):
                table.rows.append([path.stem, *measure(labels, said)])
            confusions.append(confusion(path.stem, verdicts(labels, said)))
        print("\n".join(table.text() for table in [*tables, *confusions]), end="")
        return 0

    def check(self, labels: list[Label], said: dict, path: Path) -> None:
        """Raises Problem if the replies lack a point, or are of the other role."""
        for label in labels:
            if label.id not in said:
                raise Problem(f"{path} has no reply to {label.id}, which {self.labels} labels.")
            other = "verdict" if label.steps is not None else "task_complete"
            if other in (said[label.id] or {}):
                raise Problem(f"{self.labels}: {label.id} has a label of the other role.")
