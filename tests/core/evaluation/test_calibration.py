from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as reference_log_loss

from taprobe_core.evaluation.blocks import make_blocks
from taprobe_core.evaluation.calibration import (
    brier_parts,
    calibrate,
    equal_mass_bins,
    log_loss,
    recalibration,
    reliability_bins,
)
from taprobe_core.tables import CALIBRATION, RELIABILITY_BINS, check_table

rows = st.lists(
    st.tuples(st.integers(0, 12).map(lambda value: value / 12), st.booleans()),
    min_size=1,
    max_size=80,
)


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(1, 12))
def test_the_brier_score_is_the_sum_of_its_parts(rows, n_bins):
    score, positive = (np.array(side) for side in zip(*rows, strict=True))
    parts = brier_parts(score, positive, equal_mass_bins(score, n_bins))
    total = parts.reliability - parts.resolution + parts.uncertainty + parts.within_bins
    assert parts.brier == pytest.approx(total, abs=1e-12)
    assert parts.brier == pytest.approx(brier_score_loss(positive, score, pos_label=True))
    assert min(parts.reliability, parts.resolution, parts.uncertainty) >= 0


def test_bins_of_one_score_hide_nothing():
    score = np.repeat([0.1, 0.4, 0.8], 30)
    positive = np.random.default_rng(0).random(90) < score
    parts = brier_parts(score, positive, equal_mass_bins(score, 3))
    assert parts.within_bins == pytest.approx(0.0, abs=1e-15)
    assert parts.brier == pytest.approx(parts.reliability - parts.resolution + parts.uncertainty)


@settings(max_examples=40, deadline=None)
@given(rows, st.integers(1, 10), st.integers(0, 99))
def test_bins_follow_from_the_scores_alone(rows, n_bins, seed):
    score, positive = (np.array(side) for side in zip(*rows, strict=True))
    bins = equal_mass_bins(score, n_bins)
    assert set(bins) == set(range(bins.max() + 1))
    assert bins.max() < n_bins
    order = np.random.default_rng(seed).permutation(len(score))
    assert np.array_equal(equal_mass_bins(score[order], n_bins), bins[order])
    for value in set(score):
        assert len(set(bins[score == value])) == 1
    found = reliability_bins(score, positive, bins)
    assert found.n.sum() == len(score)
    assert np.all(np.diff(found.mean_score) > 0)


def test_bins_of_distinct_scores_hold_equally_many():
    score = np.random.default_rng(0).permutation(1003) / 1003
    assert set(np.bincount(equal_mass_bins(score, 10))) <= {100, 101}


def test_log_loss_equals_scikit_learns():
    rng = np.random.default_rng(0)
    score, positive = rng.random(50), rng.random(50) < 0.3
    assert log_loss(score, positive) == pytest.approx(reference_log_loss(positive, score))
    assert np.isfinite(log_loss(np.array([0.0, 1.0]), np.array([True, False])))


def test_recalibration_is_the_maximum_likelihood_of_the_logit():
    rng = np.random.default_rng(1)
    score = rng.beta(2, 5, 500)
    positive = rng.random(500) < expit(0.5 * logit(score) - 1.2)
    slope, intercept = recalibration(score, positive)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000)
    reference.fit(logit(score)[:, None], positive)
    assert slope == pytest.approx(reference.coef_[0, 0], abs=1e-5)
    assert intercept == pytest.approx(reference.intercept_[0], abs=1e-5)


def test_calibrated_scores_have_slope_one_and_intercept_nought():
    rng = np.random.default_rng(2)
    score = rng.beta(1, 4, 40_000)
    slope, intercept = recalibration(score, rng.random(40_000) < score)
    assert slope == pytest.approx(1.0, abs=0.05)
    assert intercept == pytest.approx(0.0, abs=0.08)


@pytest.mark.parametrize(
    ("score", "positive"),
    [
        ([0.1, 0.2, 0.8, 0.9], [False, False, True, True]),
        ([0.9, 0.8, 0.2, 0.1], [False, False, True, True]),
        ([0.5, 0.5, 0.5], [True, False, True]),
        ([0.2, 0.6, 0.7], [True, True, True]),
        ([], []),
    ],
)
def test_what_has_no_maximum_has_no_slope(score, positive):
    found = recalibration(np.array(score, dtype=np.float64), np.array(positive, dtype=bool))
    assert found == (None, None)


def test_only_probabilities_are_calibrated_and_seeds_are_pooled(make_scores):
    scores, labels = make_scores(recipes=("a", "b", "c"), seeds=(0, 1))
    far = {
        seed: frame.with_columns(
            score=frame["score"] + 3 * (frame["recipe"] == "c").cast(frame["score"].dtype)
        )
        for seed, frame in scores.items()
    }
    targets = {"a": "anchor_binary", "b": "importance_abs", "c": "anchor_binary"}
    summary, bins = calibrate(make_blocks(far, labels), targets, 5)
    check_table(summary, CALIBRATION, "test")
    check_table(bins, RELIABILITY_BINS, "test")
    (row,) = summary.to_dicts()
    own = [
        frame.filter(recipe="a", split="test").select("score", "is_positive")
        for frame in scores.values()
    ]
    pooled = np.concatenate([frame["score"].to_numpy().astype(np.float64) for frame in own])
    positive = np.concatenate([frame["is_positive"].to_numpy() for frame in own])
    assert row["n_scores"] == len(pooled) == bins["n_scores"].sum()
    assert row["brier"] == pytest.approx(brier_score_loss(positive, pooled))
    assert row["log_loss"] == pytest.approx(reference_log_loss(positive, pooled))
    gaps = (bins["mean_score"] - bins["share_positive"]).abs() * bins["n_scores"]
    assert row["expected_calibration_error"] == pytest.approx(gaps.sum() / len(pooled))
