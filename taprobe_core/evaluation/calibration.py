"""Whether a probability means what it says: reliability, recalibration, proper scores.

Only scores of binary targets are probabilities. They are out of fold (the test side of every fold),
pooled over problems, and over seeds, so that each seed's score counts as one. What does not belong
here: how well sentences are ranked (`metrics`).

About a tenth of the sentences of each problem are anchors by construction, and probes weigh the
classes equally while they learn: scores are then too high throughout, which shows as an intercept
below zero and takes nothing from the ranking.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.special import expit, logit

from taprobe_core.evaluation.blocks import ScoreBlocks
from taprobe_core.study.targets import TARGETS, Target
from taprobe_core.tables import CALIBRATION, RELIABILITY_BINS, schema_of

Doubles = NDArray[np.float64]

_EDGE = 1e-7
"""Scores are single precision: 0 and 1 stand for what rounds to them."""

_MAX_STEPS, _STEEPEST = 50, 1e3


class ReliabilityBins(NamedTuple):
    """Scores by bin, from the lowest: n, mean score and share of positives, [bin] each."""

    n: NDArray[np.int64]
    mean_score: Doubles
    share_positive: Doubles


class BrierParts(NamedTuple):
    """Mean squared error of probabilities, in parts.

    brier = reliability - resolution + uncertainty + within_bins.

    Attributes:
        brier: mean of (p - y)^2.
        reliability: mean squared distance of a bin's mean score from its share of positives.
        resolution: mean squared distance of a bin's share of positives from the prevalence.
        uncertainty: prevalence times its complement.
        within_bins: what bins hide: variance of the scores inside a bin, less twice their
            covariance with the labels; 0 if all scores of a bin are equal.
    """

    brier: float
    reliability: float
    resolution: float
    uncertainty: float
    within_bins: float


def calibrate(
    scored: ScoreBlocks, targets: Mapping[str, Target], n_bins: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Measure the calibration of every recipe of a binary target, on test.

    Args:
        scored: from `make_blocks`.
        targets: recipe -> what its scores predict; others than classes are left out, and
            so are recipes with a score outside [0, 1].
        n_bins: bins of about equally many scores.

    Returns:
        `tables.CALIBRATION` and `tables.RELIABILITY_BINS`.
    """
    key = ["recipe", "protocol"]
    is_binary = pl.col("recipe").is_in([n for n, t in targets.items() if TARGETS[t].is_binary])
    wanted = scored.units.select(is_binary).to_series().to_numpy()
    parts: dict[tuple[str, str], list[tuple[Doubles, NDArray[np.bool_]]]] = {}
    names = scored.units.select(key).rows()
    for block in scored.of_split("test"):
        by_key: dict[tuple[str, str], list[int]] = {}
        for row in np.flatnonzero(wanted[block.units]).tolist():
            by_key.setdefault(names[block.units[row]], []).append(row)
        for name, rows in by_key.items():
            pair = block.scores[rows].ravel().astype(np.float64), block.positive[rows].ravel()
            parts.setdefault(name, []).append(pair)
    summary: list[dict[str, Any]] = []
    bins: list[dict[str, Any]] = []
    for (recipe, protocol), pairs in sorted(parts.items()):
        score, positive = (np.concatenate(side) for side in zip(*pairs, strict=True))
        if not score.size or score.min() < 0 or score.max() > 1:
            continue
        place = {"recipe": recipe, "protocol": protocol}
        in_bin = equal_mass_bins(score, n_bins)
        by_bin = reliability_bins(score, positive, in_bin)
        summary.append({**place, **_summary(score, positive, in_bin)})
        bins += [
            {**place, "bin": row, "n_scores": n, "mean_score": mean, "share_positive": share}
            for row, (n, mean, share) in enumerate(zip(*by_bin, strict=True))
        ]
    return (
        pl.DataFrame(summary, schema_of(CALIBRATION)).sort(key),
        pl.DataFrame(bins, schema_of(RELIABILITY_BINS)).sort(*key, "bin"),
    )


def equal_mass_bins(score: Doubles, n_bins: int) -> NDArray[np.int64]:
    """Divide scores into bins of about equal mass.

    Args:
        score: [row] in [0, 1].
        n_bins: at least 1; fewer are used where scores tie, as equal scores share a bin.

    Returns:
        [row] int64, numbered from the lowest scores without gaps. A score's bin follows from how
        many scores are lower, and so from no order of the rows.
    """
    order = np.argsort(score, kind="stable")
    ranked = score[order]
    is_start = np.diff(ranked, prepend=-np.inf) > 0
    n_lower = np.maximum.accumulate(np.where(is_start, np.arange(score.size), 0))
    bins = n_lower * n_bins // max(score.size, 1)
    out = np.empty(score.size, dtype=np.int64)
    out[order] = np.cumsum(np.diff(bins, prepend=0) > 0)
    return out


def reliability_bins(
    score: Doubles, positive: NDArray[np.bool_], bins: NDArray[np.int64]
) -> ReliabilityBins:
    """Summarise scores and positives by bin.

    Args:
        score: [row] in [0, 1], at least one.
        positive: [row] bool.
        bins: [row], from `equal_mass_bins`.
    """
    n = np.bincount(bins)
    mean, share = np.bincount(bins, score) / n, np.bincount(bins, positive) / n
    return ReliabilityBins(n.astype(np.int64), mean, share)


def brier_parts(score: Doubles, positive: NDArray[np.bool_], bins: NDArray[np.int64]) -> BrierParts:
    """Divide the Brier score into reliability, resolution and uncertainty.

    Args:
        score: [row] in [0, 1], at least one.
        positive: [row] bool.
        bins: [row], from `equal_mass_bins`.

    Returns:
        The parts; they add up exactly, within-bin terms included.

    Source:
        Murphy (1973), A new vector partition of the probability score; within-bin terms:
        Stephenson, Coelho and Jolliffe (2008), Two extra components in the Brier score.
    """
    y = positive.astype(np.float64)
    n, mean, share = reliability_bins(score, positive, bins)
    from_mean, from_share = score - mean[bins], y - share[bins]
    return BrierParts(
        brier=float(((score - y) ** 2).mean()),
        reliability=float(((mean - share) ** 2 @ n) / y.size),
        resolution=float(((share - y.mean()) ** 2 @ n) / y.size),
        uncertainty=float(y.mean() * (1 - y.mean())),
        within_bins=float((from_mean**2).mean() - 2 * (from_mean * from_share).mean()),
    )


def log_loss(score: Doubles, positive: NDArray[np.bool_]) -> float:
    """Mean negative log probability of what happened, in nats.

    Args:
        score: [row] in [0, 1], at least one; cut to [1e-7, 1 - 1e-7].
        positive: [row] bool.
    """
    p = np.clip(score, _EDGE, 1 - _EDGE)
    return float(-np.log(np.where(positive, p, 1 - p)).mean())


def recalibration(score: Doubles, positive: NDArray[np.bool_]) -> tuple[float | None, float | None]:
    """Fit logit P(positive) = intercept + slope * logit(score) by maximum likelihood.

    A calibrated score has slope 1 and intercept 0; a slope below 1 means scores too extreme.

    Args:
        score: [row] in [0, 1].
        positive: [row] bool.

    Returns:
        Slope and intercept; None with one class, equal scores, or scores that separate the classes,
        where the likelihood has no maximum.

    Source:
        Cox (1958), Two further applications of a model for binary regression.
    """
    x, y = logit(np.clip(score, _EDGE, 1 - _EDGE)), positive.astype(np.float64)
    if y.min(initial=1) == y.max(initial=0) or not x.size or np.ptp(x) == 0:
        return None, None
    centre, scale = x.mean(), x.std()
    design = np.column_stack([np.ones_like(x), (x - centre) / scale])
    weights = np.array([logit(np.clip(y.mean(), _EDGE, 1 - _EDGE)), 0.0])
    for _ in range(_MAX_STEPS):
        p = expit(design @ weights)
        hessian = (design * (p * (1 - p))[:, None]).T @ design
        if np.abs(weights).max() > _STEEPEST or np.linalg.cond(hessian) > 1e12:
            return None, None
        step = np.linalg.solve(hessian, design.T @ (y - p))
        weights += step
        if np.abs(step).max() < 1e-10:
            slope = weights[1] / scale
            return float(slope), float(weights[0] - slope * centre)
    return None, None


def _summary(
    score: Doubles, positive: NDArray[np.bool_], bins: NDArray[np.int64]
) -> dict[str, Any]:
    slope, intercept = recalibration(score, positive)
    n, mean, share = reliability_bins(score, positive, bins)
    return {
        "n_scores": score.size,
        "prevalence": float(positive.mean()),
        "mean_score": float(score.mean()),
        "log_loss": log_loss(score, positive),
        **brier_parts(score, positive, bins)._asdict(),
        "expected_calibration_error": float(np.abs(mean - share) @ n / score.size),
        "slope": slope,
        "intercept": intercept,
    }
