from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import average_precision_score

from taprobe_core.evaluation.summary import chance_levels, chance_pr_auc, normalised_skill


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (5, 2), (7, 1), (7, 3), (8, 7)])
def test_chance_is_the_mean_over_every_ranking(n, k):
    """Counted, not derived: average precision of each placement of k anchors on n ranks."""
    falling = -np.arange(n)
    placed = [
        average_precision_score([rank in ranks for rank in range(n)], falling)
        for ranks in itertools.combinations(range(n), k)
    ]
    assert chance_pr_auc(n, k) == pytest.approx(np.mean(placed), abs=1e-12)


def test_chance_stands_above_prevalence_and_falls_to_it():
    assert chance_pr_auc(150, 15) == pytest.approx(0.1277, abs=1e-4)
    assert chance_pr_auc(100_000, 10_000) == pytest.approx(0.1, abs=2e-4)


def test_many_levels_equal_one_at_a_time():
    sizes = [(n, k) for n in range(1, 30) for k in range(n + 1)]
    found = chance_levels(*np.array(sizes).T)
    for (n, k), level in zip(sizes, found, strict=True):
        if 0 < k < n:
            assert level == pytest.approx(chance_pr_auc(n, k), abs=1e-12)
        else:
            assert np.isnan(level)
    assert chance_levels(np.empty(0, int), np.empty(0, int)).size == 0


def test_skill_is_nought_at_chance_and_one_at_the_level():
    frame = pl.DataFrame(
        {
            "value": [0.1, 0.55, 1.0, 0.05, 0.3, None],
            "chance": [0.1, 0.1, 0.1, 0.1, 1.0, 0.1],
            "level": [0.4, 0.4, 0.4, 0.4, 0.4, 0.4],
        }
    )
    value, chance = pl.col("value"), pl.col("chance")
    perfect, known = frame.select(
        perfect=normalised_skill(value, chance),
        known=normalised_skill(value, chance, pl.col("level")),
    )
    assert perfect.to_list() == pytest.approx([0.0, 0.5, 1.0, -0.05 / 0.9, None, None])
    assert known.to_list() == pytest.approx([0.0, 1.5, 3.0, -0.05 / 0.3, None, None])
