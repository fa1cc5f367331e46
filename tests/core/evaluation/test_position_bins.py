from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.summary import chance_pr_auc
from taprobe_core.evaluation.units import position_metrics
from taprobe_core.metrics import pr_auc, spearman
from taprobe_core.probes.control_task import position_bin
from taprobe_core.tables import POSITION_BINS, check_table


def test_bins_are_closed_on_the_left_and_the_last_on_both_sides():
    edges = np.array([0.0, 0.1999, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0])
    assert position_bin(edges).tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    for n in range(2, 200):
        exact = [min(5 * place // (n - 1), 4) for place in range(n)]
        assert position_bin(np.arange(n) / (n - 1)).tolist() == exact


@pytest.mark.parametrize("target", ["anchor_binary", "importance_abs"])
def test_each_fifth_is_measured_by_itself(make_scores, target):
    scores, labels = make_scores(recipes=("a",), seeds=(0, 1))
    table = position_metrics(make_blocks(scores, labels), {"a": target})
    check_table(table, POSITION_BINS, "test")
    assert table["bin"].to_list() == [0, 1, 2, 3, 4]
    for row in table.iter_rows(named=True):
        values, levels = {}, {}
        for seed, frame in scores.items():
            for (problem,), own in frame.filter(split="test").group_by("problem_id"):
                bins = position_bin((own["sentence_idx"] / own["sentence_idx"].max()).to_numpy())
                part = own.filter(pl.Series(bins == row["bin"]))
                n, k = part.height, int(part["is_positive"].sum())
                if target == "importance_abs":
                    value, level = spearman(part["target_value"], part["score"]), 0.0
                else:
                    value = pr_auc(part["is_positive"], part["score"])
                    level = chance_pr_auc(n, k) if 0 < k < n else np.nan
                values.setdefault(problem, {})[seed] = value
                levels[problem] = level
        means = [np.mean(list(each.values())) for each in values.values()]
        defined = [mean for mean in means if not np.isnan(mean)]
        assert row["n_problems"] == 7
        assert row["n_defined"] == len(defined)
        assert row["value"] == pytest.approx(np.mean(defined))
        assert row["chance"] == pytest.approx(np.nanmean(list(levels.values())))
    if target == "anchor_binary":
        assert table["n_defined"].min() < 7


def test_short_traces_leave_fifths_empty(make_scores):
    by_seed, labels = make_scores(recipes=("a",), n_problems=2, n_sentences=3)
    scores = {0: by_seed[0].filter(split="test", fold=0)}
    table = position_metrics(make_blocks(scores, labels), {"a": "importance_abs"})
    assert table["bin"].to_list() == [0, 2, 4]
    assert table["n_defined"].to_list() == [0, 0, 0]
    assert table["value"].null_count() == 3
