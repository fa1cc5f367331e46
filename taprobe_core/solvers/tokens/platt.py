"""Calibrate the logits of many models at once by Platt scaling: p = sigmoid(a * logit + b).

What does not belong here: which sentences calibrate (the caller's validation sentences) and how
calibration is judged. Invariants: a calibration never turns a ranking round (a > 0); where none can
be fitted the identity (1, 0) is returned and marked as such.

Source:
    Platt 1999, "Probabilistic outputs for support vector machines": the two-parameter logistic and
    its smoothed targets, (n1 + 1) / (n1 + 2) for positives and 1 / (n0 + 2) for negatives. Lin, Lin
    and Weng 2007, Machine Learning 68: Newton's method with halved steps, and the loss in the form
    that does not overflow. Ours is batched over columns, works on standardised logits and has the
    opposite sign of a and b.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from taprobe_core.errors import NumericsError

Floats = NDArray[np.float64]

MAX_STEPS = 100
MAX_HALVINGS = 40
TOLERANCE = 1e-10
"""Of the gradient per sentence, on standardised logits."""


class Calibration(NamedTuple):
    """Slopes and offsets of many models.

    Attributes:
        coefficients: [column, 2] float64, slope a > 0 and offset b.
        is_fitted: [column] bool; False where the identity stands for a calibration: the sentences
            have one class only, all logits are equal, or the best slope is not positive.
    """

    coefficients: Floats
    is_fitted: NDArray[np.bool_]


def calibrate(logits: Floats, y: Floats, is_used: NDArray[np.bool_]) -> Calibration:
    """Fit Platt's scaling to each column.

    Args:
        logits: [sentence, column], finite where used.
        y: [sentence, column], 1 for positives, 0 for negatives.
        is_used: [sentence, column], the sentences that calibrate; each counts once.

    Raises:
        NumericsError: the iteration did not converge; names the first column.
    """
    used = is_used.astype(np.float64)
    n = used.sum(axis=0)
    positives = (used * (y > 0.5)).sum(axis=0)
    centre, scale = _spread(np.where(is_used, logits, 0.0), used, n)
    is_possible = (positives > 0) & (positives < n) & (scale > 0)
    smoothed = np.where(y > 0.5, (positives + 1) / (positives + 2), 1 / (n - positives + 2))
    z = np.where(is_used, (logits - centre) / np.where(scale > 0, scale, 1.0), 0.0)
    chosen = np.flatnonzero(is_possible)
    slope, offset = _newton(z[:, chosen], smoothed[:, chosen], used[:, chosen])
    coefficients = np.tile([1.0, 0.0], (logits.shape[1], 1))
    is_fitted = is_possible.copy()
    is_fitted[chosen] = slope > 0
    kept = slope > 0
    rising = chosen[kept]
    a = slope[kept] / scale[rising]
    coefficients[rising] = np.stack([a, offset[kept] - a * centre[rising]], axis=1)
    return Calibration(coefficients, is_fitted)


def probabilities(logits: Floats, coefficients: Floats) -> Floats:
    """Apply a calibration.

    Args:
        logits: [sentence, column].
        coefficients: [column, 2], slope and offset.

    Returns:
        [sentence, column] float64 in [0, 1].
    """
    return np.asarray(expit(logits * coefficients[:, 0] + coefficients[:, 1]), dtype=np.float64)


def _spread(logits: Floats, used: Floats, n: Floats) -> tuple[Floats, Floats]:
    some = np.maximum(n, 1)
    centre = (used * logits).sum(axis=0) / some
    scale = np.sqrt((used * (logits - centre) ** 2).sum(axis=0) / some)
    is_constant = scale <= 1e-12 * np.abs(centre)
    return centre, np.where(is_constant, 0.0, scale)


def _newton(z: Floats, target: Floats, used: Floats) -> tuple[Floats, Floats]:
    """Minimise the cross entropy of each column; slope and offset, [column] each."""
    n = used.sum(axis=0)
    prior = (used * target).sum(axis=0) / np.maximum(n, 1)
    slope = np.zeros(z.shape[1])
    offset = np.log(prior / (1 - prior))
    loss = _loss(z, target, used, slope, offset)
    is_open = np.ones(z.shape[1], dtype=bool)
    for _ in range(MAX_STEPS):
        p = expit(slope * z + offset)
        rest, curvature = used * (p - target), used * p * (1 - p)
        g_slope, g_offset = (rest * z).sum(axis=0), rest.sum(axis=0)
        is_open &= np.maximum(np.abs(g_slope), np.abs(g_offset)) > TOLERANCE * n
        if not is_open.any():
            return slope, offset
        h_slope = (curvature * z * z).sum(axis=0) + 1e-12
        h_offset = curvature.sum(axis=0) + 1e-12
        h_both = (curvature * z).sum(axis=0)
        determinant = h_slope * h_offset - h_both**2
        to_slope = -(h_offset * g_slope - h_both * g_offset) / determinant
        to_offset = -(h_slope * g_offset - h_both * g_slope) / determinant
        expected = 1e-4 * (g_slope * to_slope + g_offset * to_offset)
        # Near the minimum the loss no longer shows a step's gain; the slack lets Newton finish.
        slack = 1e-13 * (1 + np.abs(loss))
        step = np.where(is_open, 1.0, 0.0)
        is_short = is_open.copy()
        for _ in range(MAX_HALVINGS):
            new = _loss(z, target, used, slope + step * to_slope, offset + step * to_offset)
            is_short &= ~(new <= loss + step * expected + slack)
            if not is_short.any():
                break
            step[is_short] /= 2
        slope, offset = slope + step * to_slope, offset + step * to_offset
        loss = _loss(z, target, used, slope, offset)
    raise NumericsError(
        f"Platt scaling of {int(is_open.sum())} models did not converge",
        f"column {int(np.flatnonzero(is_open)[0])}",
        "look at the validation logits for values many standard deviations apart",
    )


def _loss(z: Floats, target: Floats, used: Floats, slope: Floats, offset: Floats) -> Floats:
    f = slope * z + offset
    return np.asarray((used * (np.logaddexp(0, f) - target * f)).sum(axis=0))
