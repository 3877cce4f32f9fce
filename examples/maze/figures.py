"""The figures of compare.py. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from examples import cli, stats
from examples.baselines import METHODS


def draw(rows: dict[str, list[dict]], out: Path) -> None:
    """Score against cost (Fig. 2); and of what was run, the budgets (Fig. 13), the supervisors."""
    cli.needed("matplotlib").use("Agg")
    points(rows, METHODS, "Score and cost", out / "score-cost.png")
    points(rows, ["collabvr", "gemini", "qwen27b", "qwen9b"], "Supervisors",
           out / "supervisors.png")
    sweep(rows, "attempts", "attempts M, M2 alone", out / "attempts.png")
    sweep(rows, "steps", "planning steps N_max", out / "steps.png")


def estimate(rows: list[dict], name: str) -> tuple[float, list[list[float]]]:
    """A mean, and how far its interval goes below and above, as matplotlib wants it."""
    values = [row[name] for row in rows]
    mean = float(np.mean(values))
    low, high = stats.bootstrap(np.mean, values)
    return mean, [[mean - low], [high - mean]]


def points(rows: dict, names, title: str, path: Path) -> None:
    """A point a method: score against seconds of video."""
    from matplotlib import pyplot

    names = [name for name in names if name in rows]
    if len(names) < 2:
        return
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for marker, name in zip("osD^v<>PX", names, strict=False):
        seconds, seconds_error = estimate(rows[name], "vgm_seconds")
        score, score_error = estimate(rows[name], "score")
        axes.errorbar(seconds, score, score_error, seconds_error, marker, capsize=2, label=name)
    axes.legend(loc="lower right", ncols=2)
    axes.set_title(f"{title} ({len(rows[names[0]])} mazes each, 95 % intervals)")
    axes.set_xlabel("VGM seconds a maze")
    axes.set_ylabel("score by rule")
    axes.set_xlim(0, None)
    axes.set_ylim(0, 1.1)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def sweep(rows: dict, stem: str, title: str, path: Path) -> None:
    """Score and cost for budgets of 1 to 5: the methods steps1, steps2, .."""
    from matplotlib import pyplot

    budgets = [k for k in range(1, 6) if f"{stem}{k}" in rows]
    if len(budgets) < 2:
        return
    figure, both = pyplot.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    labels = {"score": "score by rule", "vgm_seconds": "VGM seconds a maze"}
    for axes, (name, label) in zip(both, labels.items(), strict=True):
        means, errors = zip(*(estimate(rows[f"{stem}{k}"], name) for k in budgets))
        axes.errorbar(budgets, means, np.concatenate(errors, 1), fmt="o-", capsize=2)
        axes.set_xlabel(title)
        axes.set_xticks(budgets)
        axes.set_ylabel(label)
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{len(rows[f'{stem}{budgets[0]}'])} mazes each, 95 % intervals")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
