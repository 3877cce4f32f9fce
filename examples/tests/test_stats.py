"""Intervals and tables."""

import numpy as np
import pytest

from examples import stats


def test_wilson_is_the_published_interval():
    """Newcombe 1998, Table I: 81 of 263, and 0 of 20."""
    assert stats.wilson([1] * 81 + [0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert stats.wilson([0] * 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_the_bootstrap_covers_a_mean_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [stats.bootstrap(np.mean, rng.normal(3, 1, 50)) for _ in range(40)]
    assert 34 <= sum(low < 3 < high for low, high in found) < 40


def test_the_bootstrap_draws_rows_whole():
    """A statistic of two columns sees pairs: the second is twice the first in every draw."""
    x = np.arange(10)
    assert stats.bootstrap(lambda a, b: float(np.abs(2 * a - b).max()), x, 2 * x) == (0, 0)


def test_a_paired_difference_has_the_pairs_spread_only():
    base = np.random.default_rng(1).normal(0, 100, 50)
    mean, low, high = stats.paired(base, base + 1)
    assert mean == low == high == pytest.approx(1)


def test_texts_of_shares_and_estimates():
    assert stats.percent([1, 1, 0]) == "67 % (21-94)" and stats.percent([]) == "-"
    assert stats.percent([1, 1, 0], digits=1).startswith("66.7 %")
    assert stats.estimate(np.mean, [1, 1, 1]) == "1.000 (1.00-1.00)"
    assert stats.estimate(np.mean, [1]) == stats.estimate(np.mean, []) == "-"


def test_a_table_is_text_and_markdown():
    table = stats.Table("T", ["", "n", "share"], [["a|b", 1200, 0.5], ["c\nd", None, "x"]])
    assert table.text().split("\n")[:3] == ["T", "         n  share", "a|b  1,200  0.500"]
    assert "| a\\|b | 1,200 | 0.500 |\n| c d | - | x |" in table.markdown()
    assert table.markdown().split("\n")[3] == "|---|---:|---:|"
