"""Intervals of 95 %, and tables as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def wilson(hits) -> tuple[float, float]:
    """Of a share, from its zeros and ones (Wilson's interval)."""
    hits, z = np.asarray(list(hits), float), 1.96
    n, p = len(hits), hits.mean()
    middle = p + z**2 / (2 * n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return float((middle - half) / scale), float((middle + half) / scale)


def bootstrap(statistic: Callable[..., float], *columns) -> tuple[float, float]:
    """Of any statistic of one or more columns, whose rows are drawn together 2,000 times."""
    arrays = [np.asarray(list(column)) for column in columns]
    n = len(arrays[0])
    draws = np.random.default_rng(0).integers(n, size=(2000, n))
    values = [statistic(*(column[draw] for column in arrays)) for draw in draws]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def paired(first, second) -> tuple[float, float, float]:
    """The mean of second minus first, pair by pair, and its interval."""
    differences = np.asarray(list(second), float) - np.asarray(list(first), float)
    return float(differences.mean()), *bootstrap(np.mean, differences)


def percent(hits, digits: int = 0) -> str:
    """A share with its interval: '57 % (47-66)', or '-' of nothing."""
    hits = list(hits)
    if not hits:
        return "-"
    low, high = wilson(hits)
    return f"{100 * np.mean(hits):.{digits}f} % ({100 * low:.0f}-{100 * high:.0f})"


def estimate(statistic: Callable[..., float], *columns, digits: int = 3) -> str:
    """A statistic with its interval: '0.366 (0.30-0.42)', or '-' of fewer than two rows."""
    arrays = [np.asarray(list(column)) for column in columns]
    if len(arrays[0]) < 2:
        return "-"
    low, high = bootstrap(statistic, *arrays)
    return f"{statistic(*arrays):.{digits}f} ({low:.2f}-{high:.2f})"


@dataclass
class Table:
    """Numbers and texts under a head. The first column is the name of a row."""

    title: str  # "": none is printed
    head: list[str]
    rows: list[list]

    def cells(self) -> list[list[str]]:
        """All as text, the head first."""
        return [self.head] + [[shown(value) for value in row] for row in self.rows]

    def text(self) -> str:
        """For a terminal: columns of equal width."""
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [self.title] if self.title else []
        for name, *values in cells:
            row = [name.ljust(widths[0])]
            row += [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            lines.append("  ".join(row).rstrip())
        return "\n".join([*lines, ""])

    def markdown(self) -> str:
        """For a README."""
        lines = [f"**{self.title}**", ""] if self.title else []
        for row in self.cells():
            cells = [" ".join(cell.replace("|", "\\|").split()) for cell in row]
            lines.append(f"| {' | '.join(cells)} |")
        lines.insert(len(lines) - len(self.rows), "|---|" + "---:|" * (len(self.head) - 1))
        return "\n".join([*lines, ""])


def shown(value) -> str:
    """A cell: what is unknown is a dash, a fraction has three decimals."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
