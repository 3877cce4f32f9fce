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
    for x in labels:
        if x.steps is None:
            continue
        p = said[x.id]
        if p is None:
            hits.append(False)
            continue
        steps = 0 if p["task_complete"] else max(1, p["estimated_steps_remaining"])  # as in line 10
        hits.append(steps == x.steps)
        truth.append(x.steps)
        told.append(steps)
    return [len(hits), percent(hits, 1), estimate(mean_absolute_error, truth, told)]


def mean_absolute_error(truth: np.ndarray, told: np.ndarray) -> float:
    return float(np.abs(truth - told).mean())


def verdicts(labels: list[Label], said: dict) -> list[tuple[str, str]]:
    """What the label says, and the reply."""
    pairs = []
    for x in labels:
        if x.verdict is not None:
            reply = said[x.id]
            pairs.append((x.verdict, reply["verdict"] if reply else "unusable"))
    return pairs


def verifier(labels: list[Label], said: dict) -> list:
    """D2. Recall: of what people accept, or reject, how much it does, too."""
    pairs = verdicts(labels, said)
    row: list = [len(pairs)]
    for kinds in (["accept"], ["reject"], ["accept", "reject"]):
        row.append(percent([a == b for a, b in pairs if a in kinds], 1))
    return [*row, estimate(kappa, [a for a, _ in pairs], [b for _, b in pairs])]


def kappa(truth: np.ndarray, told: np.ndarray) -> float:
    """Cohen's kappa; 0 if all are of one kind, for then there is nothing but chance."""
    chance = 0.0
    for kind in np.unique(truth):
        chance += (truth == kind).mean() * (told == kind).mean()
    if chance == 1:
        return 0.0
    return float(((truth == told).mean() - chance) / (1 - chance))


def suggestions(labels: list[Label], said: dict) -> list:
    """D3. Of those ratings that are of its own suggestions."""
    ratings = []
    for x in labels:
        if x.rating is not None and said[x.id] and said[x.id].get("suggestion") == x.suggestion:
            ratings.append(x.rating)
    return [len(ratings), estimate(np.mean, ratings), percent([x >= 2 for x in ratings], 1),
            percent([x == 3 for x in ratings], 1)]


def confusion(name: str, pairs: list[tuple[str, str]]) -> Table:
    kinds = ["accept", "reject", "unusable"]
    rows: list[list] = []
    for label in ("accept", "reject"):
        rows.append([label, *[pairs.count((label, kind)) for kind in kinds]])
    return Table(f"{name}: by label, what it said", ["", *kinds], rows)


def check(labels: list[Label], said: dict, labels_file: Path, replies_file: Path) -> None:
    """Raises Problem if the replies lack a point, or are of the other role."""
    for x in labels:
        if x.id not in said:
            raise Problem(f"{replies_file} has no reply to {x.id}, which {labels_file} labels.")
        other = "verdict" if x.steps is not None else "task_complete"
        if other in (said[x.id] or {}):
            raise Problem(f"{labels_file}: {x.id} has a label of the other role.")


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
            check(labels, said, self.labels, path)
            for table, measure in zip(tables, (plan_depth, verifier, suggestions), strict=True):
                table.rows.append([path.stem, *measure(labels, said)])
            confusions.append(confusion(path.stem, verdicts(labels, said)))
        print("\n".join(table.text() for table in [*tables, *confusions]), end="")
        return 0
