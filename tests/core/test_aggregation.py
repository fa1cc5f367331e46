from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from taprobe_core.aggregation import chance_pr_auc


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
