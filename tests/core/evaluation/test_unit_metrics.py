from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import stats

from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.units import measure_units
from taprobe_core.metrics import pr_auc, recall_at_k, spearman

TARGETS = {"own": "anchor_binary", "other": "importance_signed"}


@pytest.fixture(scope="module")
def judged(make_scores):
    """`own` predicts anchors of another percentile, `other` signed importance."""
    by_seed, labels = make_scores(recipes=("own", "other"))
    labels = labels.with_columns(
        true_importance=pl.col("importance_signed") * pl.col("sentence_idx"),
        is_true_anchor=pl.col("sentence_idx") < 4,
    )
    signed = labels.select("problem_id", "sentence_idx", "importance_signed")
    is_other = pl.col("recipe") == "other"
    wide = (
        pl.col("target_value").rank("ordinal", descending=True).over("recipe", "fold", "problem_id")
        <= 7
    )
    scores = (
        by_seed[0]
        .join(signed, on=["problem_id", "sentence_idx"], maintain_order="left")
        .with_columns(
            pl.when(is_other)
            .then("importance_signed")
            .otherwise(pl.col("target_value") - 0.4)
            .alias("target_value"),
            pl.when(~is_other).then(wide).alias("is_positive"),
        )
        .drop("importance_signed")
    )
    return scores, labels


def _measured(judged, residualize=None):
    scores, labels = judged
    return measure_units(make_blocks({0: scores}, labels), (3,), TARGETS, residualize or {})


def test_every_value_equals_the_scalar_metric(judged):
    scores, labels = judged
    table = _measured(judged)
    assert table.height == 2 * 7 * 2
    for row in table.iter_rows(named=True):
        unit = {name: row[name] for name in ("recipe", "split", "fold", "problem_id")}
        own = scores.filter(**unit).join(
            labels, on=["problem_id", "sentence_idx"], maintain_order="left"
        )
        score, target = own["score"].to_numpy(), own["target_value"].to_numpy()
        true = own["true_importance"].to_numpy()
        expected = {
            "spearman": spearman(target, score),
            "pearson": stats.pearsonr(target, score)[0],
            "n_sentences": own.height,
        }
        if row["recipe"] == "own":
            positive = own["is_positive"].to_numpy()
            expected |= {
                "primary": pr_auc(positive, score),
                "pr_auc": pr_auc(positive, score),
                "recall_at_3": recall_at_k(target, score, 3),
                "label_pr_auc": pr_auc(own["is_anchor"], score),
                "label_spearman": spearman(own["importance_abs"], score),
                "true_pr_auc": pr_auc(own["is_true_anchor"], score),
                "oracle_pr_auc": pr_auc(positive, np.abs(true)),
                "oracle_spearman": spearman(target, np.abs(true)),
                "n_anchors": 7,
            }
        else:
            undefined = ("pr_auc", "recall_at_3", "label_pr_auc", "true_pr_auc", "oracle_pr_auc")
            expected |= dict.fromkeys((*undefined, "n_anchors")) | {
                "primary": spearman(target, score),
                "label_spearman": spearman(own["importance_signed"], score),
                "oracle_spearman": spearman(target, true),
            }
        for name, value in expected.items():
            assert row[name] == (value if value is None else pytest.approx(value, abs=1e-6)), name


def test_a_residual_has_no_oracle_and_keeps_its_value_on_the_labels(judged):
    table = _measured(judged, {"own": "position"}).filter(recipe="own")
    assert table["oracle_pr_auc"].null_count() == table.height
    assert table["oracle_spearman"].null_count() == table.height
    assert table["label_pr_auc"].null_count() == 0


def test_a_windowed_change_is_not_judged_by_the_importance(judged):
    scores, labels = judged
    targets = TARGETS | {"other": "windowed_change"}
    table = measure_units(make_blocks({0: scores}, labels), (3,), targets, {}).filter(
        recipe="other"
    )
    assert table["label_spearman"].null_count() == table.height
    assert table["oracle_spearman"].null_count() == table.height
    assert table["primary"].null_count() == 0


def test_a_constant_score_has_no_correlation_and_a_chance_precision(judged):
    scores, labels = judged
    flat = scores.with_columns(score=pl.lit(0.5, pl.Float32))
    table = measure_units(make_blocks({0: flat}, labels), (3,), TARGETS, {})
    assert table["spearman"].null_count() == table["pearson"].null_count() == table.height
    own = table.filter(recipe="own")
    assert own["pr_auc"].to_list() == pytest.approx(
        (own["n_anchors"] / own["n_sentences"]).to_list()
    )
